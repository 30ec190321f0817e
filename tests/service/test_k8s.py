"""The Kubernetes manifests agree with each other and with the code, without a cluster."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from calmclip import service
from calmclip.models.cli import main
from calmclip.service.app import create_app
from calmclip.service.monitoring import dashboard, rules
from calmclip.service.settings import Settings
from tests.process import free_port
from tests.test_compose import STAGES, settings_there

FOLDER = Path(service.__file__).parent / "deploy" / "k8s"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yml").read_text())
# The API versions that hold these kinds in Kubernetes 1.25 and later, and in the Prometheus Operator.
VERSIONS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
VALIDATED = ("1.27", kubernetes_validate.latest_version())
CLOSING_S = 5  # from the last answer to the end of the process


# Read by `kubectl apply -k`, of which these tests do the part that is used here.
DASHBOARDS = FOLDER / "../../monitoring/grafana"
BUNDLES = FOLDER / "bundles"


def manifests() -> Iterator[dict[str, Any]]:
    for name in KUSTOMIZATION["resources"]:
        if (FOLDER / name).is_file():
            yield from load(FOLDER / name)


def load(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


KINDS = {manifest["kind"]: manifest for manifest in manifests()}
DEPLOYMENT = KINDS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]


def seconds(text: str) -> float:
    """How long a probe may fail before Kubernetes acts."""
    probe = CONTAINER[text]
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def test_every_kind_appears_once_in_its_version_and_every_file_is_used() -> None:
    kinds = [(manifest["kind"], manifest["apiVersion"]) for manifest in manifests()]
    assert sorted(kinds) == sorted(VERSIONS.items())
    assert {manifest["metadata"]["name"] for manifest in manifests()} == {"calmclip"}
    other = {"kustomization.yml", "prometheus-adapter.yml", "README.md", "ingress.yml", "bundles"}
    used = {name for name in KUSTOMIZATION["resources"] if not (FOLDER / name).samefile(DASHBOARDS)}
    assert {file.name for file in FOLDER.iterdir()} == {*used, *other}
    named = re.findall(r"(?m)^ *# *(?:- |components: \[)([\w.]+)", (FOLDER / "kustomization.yml").read_text())
    assert named == ["ingress.yml", "bundles"]  # to be named by those who want them


@pytest.mark.parametrize("version", VALIDATED)
def test_every_manifest_fits_the_schema_of_kubernetes(version: str) -> None:
    """Strictly: a field that the schema does not have is an error, as with `kubectl apply --validate`."""
    more = [*load(FOLDER / "ingress.yml"), *load(BUNDLES / "volume.yml"), patched(), *config_maps()]
    checked = [m for m in [*manifests(), *more] if "monitoring.coreos.com" not in m["apiVersion"]]
    assert len(checked) == 12
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**KINDS["Deployment"], "spec": {**DEPLOYMENT, "replica": 2}}, version, strict=True
        )


def test_selectors_match_the_labels_of_their_targets() -> None:
    assert DEPLOYMENT["selector"]["matchLabels"] == LABELS
    assert KINDS["Service"]["spec"]["selector"] == LABELS
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert KINDS["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == KINDS["Service"]["metadata"]["labels"]
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == LABELS
    assert KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    scaled = KINDS[target["kind"]]
    assert (target["apiVersion"], target["name"]) == (scaled["apiVersion"], scaled["metadata"]["name"])
    assert "replicas" not in DEPLOYMENT, "kubectl apply would overwrite the autoscaler's number of replicas"


def test_one_port_from_the_image_to_the_scrape() -> None:
    port, probes = CONTAINER["ports"]
    assert [str(port["containerPort"])] == STAGES["service"].all("EXPOSE")
    (of_service,) = KINDS["Service"]["spec"]["ports"]
    assert of_service["targetPort"] == port["name"]
    (endpoint,) = KINDS["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == of_service["name"]
    assert str(probes["containerPort"]) == ENVIRONMENT["CALMCLIP_PROBES_PORT"]
    assert all(CONTAINER[name]["httpGet"]["port"] == probes["name"] for name in CONTAINER if name.endswith("Probe"))
    (incoming,) = KINDS["NetworkPolicy"]["spec"]["ingress"]
    assert [allowed["port"] for allowed in incoming["ports"]] == [port["name"]]
    (rule,) = load(FOLDER / "ingress.yml")[0]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {
        "name": KINDS["Service"]["metadata"]["name"],
        "port": {"name": of_service["name"]},
    }


def test_paths_are_routes() -> None:
    (endpoint,) = KINDS["ServiceMonitor"]["spec"]["endpoints"]
    probes = {name: CONTAINER[name]["httpGet"]["path"] for name in CONTAINER if name.endswith("Probe")}
    assert probes == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert {*probes.values(), endpoint["path"]} <= set(create_app(Settings()).openapi()["paths"])


def test_the_container_is_an_ordinary_user_that_writes_only_into_volumes() -> None:
    inside, of_pod = CONTAINER["securityContext"], POD["securityContext"]
    assert of_pod["runAsNonRoot"]
    command = next(text for text in STAGES["service"].all("RUN") if "useradd" in text)
    assert re.search(rf"--uid {of_pod['runAsUser']}\b", command)
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    paths = {volume["name"]: volume["mountPath"] for volume in CONTAINER["volumeMounts"]}
    assert paths.keys() == {volume["name"] for volume in POD["volumes"]}
    assert set(paths.values()) == {STAGES["service"].env()["CALMCLIP_DATA_DIR"], "/tmp", "/keys"}


def test_every_setting_exists_and_takes_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENVIRONMENT.keys() <= settings_there().keys()
    for name, value in ENVIRONMENT.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.replicas == KINDS["HorizontalPodAutoscaler"]["spec"]["minReplicas"]
    assert str(settings.threads) == CONTAINER["resources"]["requests"]["cpu"]
    assert "memory" in CONTAINER["resources"]["limits"]


def test_a_pod_has_time_to_shut_down_without_dropping_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALMCLIP_GRACE_S", "CALMCLIP_DEADLINE_MS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    settings = Settings()
    assert POD["terminationGracePeriodSeconds"] >= settings.grace_s + settings.deadline_ms / 1000 + CLOSING_S
    assert settings.grace_s > seconds("readinessProbe")


def test_the_autoscaler_reads_metrics_that_the_adapter_makes_of_recorded_series() -> None:
    """`test_recorded.py` runs them on recorded overload."""
    asked = [metric["pods"] for metric in KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]]
    made = {rule["name"]["as"]: rule for rule in load(FOLDER / "prometheus-adapter.yml")[0]["rules"]["custom"]}
    assert [of["metric"]["name"] for of in asked] == [*made]
    for of in asked:
        assert of["target"]["type"] == "AverageValue"
        assert 0 < int(of["target"]["averageValue"].removesuffix("m")) / 1000 < 1  # a ratio
    recorded = {record.record: record.expr for record in rules.RECORDS}
    for rule in made.values():
        (name,) = set(re.findall(r"instance:\w+:\w+", rule["seriesQuery"] + rule["metricsQuery"]))
        assert "by (job, namespace, pod, instance)" in recorded[name]
        assert re.match(rule["name"]["matches"], name)
    assert (
        KINDS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > KINDS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    )


def test_replicas_without_a_shared_store_are_refused(monkeypatch: pytest.MonkeyPatch, capsys, bundles) -> None:
    """Each would have collections of its own. The pods do not start without the secret, nor with such a store."""
    (store,) = (variable for variable in CONTAINER["env"] if variable["name"] == "CALMCLIP_STORE")
    assert not store["valueFrom"]["secretKeyRef"].get("optional")
    monkeypatch.setenv("CALMCLIP_REPLICAS", ENVIRONMENT["CALMCLIP_REPLICAS"])
    monkeypatch.setenv("CALMCLIP_BUNDLES_DIR", str(bundles))
    for url in ("", "lancedb:/data/collections"):
        monkeypatch.setenv("CALMCLIP_STORE", url)
        assert main(["serve", "--port", str(free_port())]) == 2
        assert "2 replicas cannot share a store of lancedb" in capsys.readouterr().err
    monkeypatch.setenv("CALMCLIP_STORE", "pgvector:postgresql://127.0.0.1:1/none")
    create_app(Settings())


def test_keys_come_from_a_secret_that_may_be_absent() -> None:
    (keys,) = (variable for variable in CONTAINER["env"] if variable["name"] == "CALMCLIP_KEYS")
    (volume,) = (volume["secret"] for volume in POD["volumes"] if volume["name"] == "keys")
    reference = keys["valueFrom"]["secretKeyRef"]
    assert (
        (reference["name"], reference["optional"])
        == (volume["secretName"], volume["optional"])
        == ("calmclip-keys", True)
    )
    (mount,) = (mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount["name"] == "keys")
    command = re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())
    path = re.search(
        rf"generic {volume['secretName']} --from-literal={reference['key']}=(\S+) --from-file=(\S+)`", command
    )
    assert path[1] == f"{mount}/{path[2]}"


def config_maps() -> list[dict[str, Any]]:
    """As kustomize generates them."""
    (file,) = load(DASHBOARDS / "kustomization.yml")
    options = file["generatorOptions"]
    assert options["disableNameSuffixHash"]
    made = []
    for generator in file["configMapGenerator"]:
        data = {Path(name).name: (DASHBOARDS / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"], "labels": options["labels"]}
        made.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return made


def test_every_dashboard_is_in_a_config_map_that_kubectl_can_apply() -> None:
    assert any((FOLDER / name).samefile(DASHBOARDS) for name in KUSTOMIZATION["resources"])
    maps = config_maps()
    assert sorted(name for made in maps for name in made["data"]) == sorted(file.name for file in dashboard.FILES)
    assert len({made["metadata"]["name"] for made in maps}) == len(maps)
    for made in maps:  # `kubectl apply` keeps a copy in an annotation of 256 KiB at most
        assert len(json.dumps(made)) < 200_000


def patched() -> dict[str, Any]:
    """The Deployment with the patch of the component `bundles`: its lists are merged by name, as in kustomize."""
    (patch,) = load(BUNDLES / "deployment.yml")
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    result = copy.deepcopy(KINDS["Deployment"])
    pod = result["spec"]["template"]["spec"]
    assert patch["metadata"] == {"name": result["metadata"]["name"]}
    assert container.pop("name") == pod["containers"][0]["name"]
    assert container.keys() == {"volumeMounts"}
    pod["containers"][0]["volumeMounts"] += container["volumeMounts"]
    pod["volumes"] += patch["spec"]["template"]["spec"]["volumes"]
    return result


def test_the_component_mounts_a_claim_at_the_folder_of_bundles() -> None:
    (component,) = load(BUNDLES / "kustomization.yml")
    assert (component["kind"], component["resources"]) == ("Component", ["volume.yml"])
    assert component["patches"] == [{"path": "deployment.yml"}]
    assert {file.name for file in BUNDLES.iterdir()} == {"kustomization.yml", "volume.yml", "deployment.yml"}
    pod = patched()["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "bundles")
    (claim,) = load(BUNDLES / "volume.yml")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "bundles")
    assert mount["mountPath"] == STAGES["service"].env()["CALMCLIP_BUNDLES_DIR"]


def test_kustomize_names_the_image_of_the_deployment_and_the_operator_gets_the_monitoring_rules() -> None:
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [CONTAINER["image"]]
    assert KINDS["PrometheusRule"]["spec"] == json.loads((rules.FOLDER / "rules.json").read_text())
