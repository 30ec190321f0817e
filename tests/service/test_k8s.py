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
from calmclip.service.settings import Settings
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
CLOSING_S = 5  # to end the process after the last answer


def manifests() -> Iterator[dict[str, Any]]:
    for name in KUSTOMIZATION["resources"]:
        yield from yaml.safe_load_all((FOLDER / name).read_text())


KINDS = {one["kind"]: one for one in manifests()}
DEPLOYMENT = KINDS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {one["name"]: one.get("value") for one in CONTAINER["env"]}
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]


def seconds(text: str) -> float:
    """A probe's whole patience."""
    probe = CONTAINER[text]
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def test_every_kind_is_there_once_in_its_version_and_every_file_is_used() -> None:
    found = [(one["kind"], one["apiVersion"]) for one in manifests()]
    assert sorted(found) == sorted(VERSIONS.items())
    assert {one["metadata"]["name"] for one in manifests()} == {"calmclip"}
    other = {"kustomization.yml", "prometheus-adapter.yml", "README.md"}
    assert {file.name for file in FOLDER.iterdir()} == {*KUSTOMIZATION["resources"], *other}


def test_selectors_meet_the_labels_of_what_they_select() -> None:
    assert DEPLOYMENT["selector"]["matchLabels"] == LABELS
    assert KINDS["Service"]["spec"]["selector"] == LABELS
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert KINDS["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == KINDS["Service"]["metadata"]["labels"]
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == LABELS
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    of = KINDS[target["kind"]]
    assert (target["apiVersion"], target["name"]) == (of["apiVersion"], of["metadata"]["name"])
    assert "replicas" not in DEPLOYMENT, "an apply would undo what the autoscaler did"


def test_one_port_from_the_image_to_the_scrape() -> None:
    (port,) = CONTAINER["ports"]
    assert [str(port["containerPort"])] == STAGES["service"].all("EXPOSE")
    (of_service,) = KINDS["Service"]["spec"]["ports"]
    assert of_service["targetPort"] == port["name"]
    (endpoint,) = KINDS["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == of_service["name"]
    assert KINDS["Service"]["metadata"]["name"] == "calmclip"  # the Operator's job; the rules ask for it
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
    made = next(text for text in STAGES["service"].all("RUN") if "useradd" in text)
    assert re.search(rf"--uid {of_pod['runAsUser']}\b", made)
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    paths = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}
    assert paths.keys() == {one["name"] for one in POD["volumes"]}
    assert set(paths.values()) == {STAGES["service"].env()["CALMCLIP_DATA_DIR"], "/tmp"}


def test_every_setting_exists_and_takes_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENVIRONMENT.keys() <= settings_there().keys()
    for name, value in ENVIRONMENT.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert str(settings.threads) == CONTAINER["resources"]["requests"]["cpu"]
    assert "memory" in CONTAINER["resources"]["limits"]


def test_a_pod_has_the_time_to_leave_without_dropping_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALMCLIP_GRACE_S", "CALMCLIP_DEADLINE_MS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    settings = Settings()
    assert POD["terminationGracePeriodSeconds"] >= settings.grace_s + settings.deadline_ms / 1000 + CLOSING_S
    assert settings.grace_s > seconds("readinessProbe")


def test_the_autoscaler_asks_for_what_the_adapter_makes_of_metrics_that_exist() -> None:
    (metric,) = KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yml").read_text())["rules"]["custom"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    target = metric["pods"]["target"]
    assert target["type"] == "AverageValue"
    assert 0 < int(target["averageValue"].removesuffix("m")) / 1000 < 1  # a ratio
    there = {family.name for family in Metrics(Settings()).registry.collect()}
    named = set(re.findall(r"calmclip_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert named == {"calmclip_queue_depth", "calmclip_queue_limit"}
    assert named <= there
    assert re.match(rule["name"]["matches"], "calmclip_queue_depth")
    assert (
        KINDS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > KINDS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    )


def test_the_image_that_kustomize_names_is_the_deployment_s() -> None:
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == CONTAINER["image"]


def test_the_operator_gets_the_rules_of_the_monitoring_kit() -> None:
    assert KINDS["PrometheusRule"]["spec"] == json.loads((rules.FOLDER / "rules.json").read_text())
