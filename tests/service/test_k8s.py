"""The Kubernetes manifests agree with each other and with the code, without a cluster."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from calmclip import service
from calmclip.service.app import create_app
from calmclip.service.metrics import Metrics
from calmclip.service.monitoring import rules
from calmclip.service.settings import Settings, Slo
from tests.test_compose import STAGES, settings_there

FOLDER = Path(service.__file__).parent / "deploy" / "k8s"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yml").read_text())
# The API versions that hold these kinds in Kubernetes 1.25 and later, and in the Prometheus Operator.
VERSIONS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
CLOSING_S = 5  # from the last answer to the end of the process


def manifests() -> Iterator[dict[str, Any]]:
    for name in KUSTOMIZATION["resources"]:
        yield from yaml.safe_load_all((FOLDER / name).read_text())


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
    other = {"kustomization.yml", "prometheus-adapter.yml", "README.md"}
    assert {file.name for file in FOLDER.iterdir()} == {*KUSTOMIZATION["resources"], *other}


def test_selectors_match_the_labels_of_their_targets() -> None:
    assert DEPLOYMENT["selector"]["matchLabels"] == LABELS
    assert KINDS["Service"]["spec"]["selector"] == LABELS
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert KINDS["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == KINDS["Service"]["metadata"]["labels"]
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == LABELS
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    scaled = KINDS[target["kind"]]
    assert (target["apiVersion"], target["name"]) == (scaled["apiVersion"], scaled["metadata"]["name"])
    assert "replicas" not in DEPLOYMENT, "kubectl apply would overwrite the autoscaler's number of replicas"


def test_one_port_from_the_image_to_the_scrape() -> None:
    (port,) = CONTAINER["ports"]
    assert [str(port["containerPort"])] == STAGES["service"].all("EXPOSE")
    (of_service,) = KINDS["Service"]["spec"]["ports"]
    assert of_service["targetPort"] == port["name"]
    (endpoint,) = KINDS["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == of_service["name"]
    assert (
        KINDS["Service"]["metadata"]["name"] == "calmclip"
    )  # the Operator makes it the job, and the rules name the job
    assert any('up{job="calmclip"}' in alert.expr for alert in rules.ALERTS)
    assert all(CONTAINER[name]["httpGet"]["port"] == port["name"] for name in CONTAINER if name.endswith("Probe"))


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
    assert set(paths.values()) == {STAGES["service"].env()["CALMCLIP_DATA_DIR"], "/tmp"}


def test_every_setting_exists_and_takes_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENVIRONMENT.keys() <= settings_there().keys()
    for name, value in ENVIRONMENT.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert str(settings.threads) == CONTAINER["resources"]["requests"]["cpu"]
    assert "memory" in CONTAINER["resources"]["limits"]


def test_a_pod_has_time_to_shut_down_without_dropping_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALMCLIP_GRACE_S", "CALMCLIP_DEADLINE_MS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    settings = Settings()
    assert POD["terminationGracePeriodSeconds"] >= settings.grace_s + settings.deadline_ms / 1000 + CLOSING_S
    assert settings.grace_s > seconds("readinessProbe")


def test_the_autoscaler_reads_a_metric_that_the_adapter_computes_from_existing_metrics() -> None:
    (metric,) = KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yml").read_text())["rules"]["custom"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    target = metric["pods"]["target"]
    assert target["type"] == "AverageValue"
    assert 0 < int(target["averageValue"].removesuffix("m")) / 1000 < 1  # a ratio
    families = {family.name for family in Metrics(Slo()).registry.collect()}
    named = set(re.findall(r"calmclip_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert named == {"calmclip_queue_depth", "calmclip_queue_limit"}
    assert named <= families
    assert re.match(rule["name"]["matches"], "calmclip_queue_depth")
    assert (
        KINDS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > KINDS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    )


def test_kustomize_names_the_image_of_the_deployment_and_the_operator_gets_the_monitoring_rules() -> None:
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [CONTAINER["image"]]
    assert KINDS["PrometheusRule"]["spec"] == json.loads((rules.FOLDER / "rules.json").read_text())
