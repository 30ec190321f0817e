"""The container files name things that exist, without a container engine; an engine's own word comes at release."""

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel

from service.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((ROOT / "service/monitoring/prometheus.yml").read_text())
GRAFANA = ROOT / "service/monitoring/grafana/provisioning"


@dataclass
class Stage:
    """One FROM and what follows: (instruction, arguments)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """Arguments of every such instruction, those of the stages below first."""
        below = STAGES[self.base].all(instruction) if self.base in STAGES else []
        return below + [text for name, text in self.steps if name == instruction]

    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in shlex.split(text))


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.split()
            stage = found[name] = Stage(name, base)
        else:
            stage.steps.append((instruction, rest))
    return found


STAGES = stages()


def setting_names(model: type[BaseModel] = Settings, prefix: str = "CALMCLIP_") -> set[str]:
    names: set[str] = set()
    for name, of in model.model_fields.items():
        inner = of.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= setting_names(inner, f"{prefix}{name.upper()}__")
        else:
            names.add(f"{prefix}{name.upper()}")
    return names


def published(service: str) -> list[tuple[str, str, str]]:
    """(host address, host port, container port)"""
    return [tuple(port.rsplit(":", 2)) for port in SERVICES[service].get("ports", [])]


def mounts(service: str) -> dict[str, str]:
    """container path -> volume or host path"""
    return {target: source for source, target, *_ in (v.split(":") for v in SERVICES[service].get("volumes", []))}


def test_the_last_stage_is_the_service_and_compose_builds_stages_that_exist() -> None:
    assert list(STAGES)[-1] == "service"
    assert {s["build"]["target"] for s in SERVICES.values() if "build" in s} == {"service", "export"}
    for stage in STAGES.values():
        for text in stage.all("COPY"):
            if source := re.search(r"--from=(\S+)", text):
                assert source[1] in STAGES


def test_the_build_context_has_what_is_copied_and_little_else() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        path
        for stage in STAGES.values()
        for text in stage.all("COPY")
        if "--from" not in text
        for path in text.split()[:-1]
    }
    assert {path.split("/")[0] for path in copied} == allowed
    assert all((ROOT / path).exists() for path in copied)
    assert "models/bundles" in ignored


@pytest.mark.parametrize("name", ["service", "export"])
def test_images_run_as_an_ordinary_user(name: str) -> None:
    user = STAGES[name].all("USER")[-1]
    (made,) = (text for text in STAGES[name].all("RUN") if "useradd" in text)
    assert re.search(rf"useradd --uid [1-9]\d* .*\b{user}\b", made)


def test_the_service_image_has_no_torch() -> None:
    service = STAGES["service"]
    taken = {tuple(text.split()[-2:]) for text in service.all("COPY") if "--from" in text}
    assert taken == {("/opt/calmclip", "/opt/calmclip"), ("/bundles/mini-int8", "/bundles/mini-int8")}
    installs = [text for stage in ("packages", "service") for text in STAGES[stage].all("RUN") if "pip install" in text]
    assert {extra for text in installs for extra in re.findall(r"\.\[(.*?)\]", text)} == {"service"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    closure = packages_behind([*project["dependencies"], *project["optional-dependencies"]["service"]])
    assert "onnxruntime" in closure
    assert not closure & {"torch", "torchvision", "onnx", "transformers"}


def packages_behind(texts: list[str]) -> set[str]:
    """Every package that installing these brings, as far as it is installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(text) for text in texts]
    while todo:
        wanted = todo.pop()
        key = (wanted.name.lower(), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = [Requirement(text) for text in requires(wanted.name) or ()]
        except PackageNotFoundError:
            continue  # for another platform
        extras = wanted.extras or {""}
        todo += [n for n in needs if not n.marker or any(n.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, _ in seen}


def test_every_setting_that_is_set_exists() -> None:
    known = setting_names()
    assert "CALMCLIP_LIMITS__IMAGE_BYTES" in known  # that the walk went in
    named = {name for stage in STAGES.values() for name in stage.env()}
    named |= {name for one in SERVICES.values() for name in one.get("environment", {})}
    ours = {name for name in named if name.startswith("CALMCLIP_")}
    assert ours
    assert ours <= known


def test_one_port_from_the_command_to_the_scrape() -> None:
    service = STAGES["service"]
    (port,) = service.all("EXPOSE")
    assert shlex.split(service.all("CMD")[-1].strip("[]").replace(",", " "))[-2:] == ["--port", port]
    assert f"http://127.0.0.1:{port}/readyz" in service.all("HEALTHCHECK")[-1]
    assert published("service")[0][2] == port
    (job,) = PROMETHEUS["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert discovery["names"] == ["service"]
    assert str(discovery["port"]) == port


def test_grafana_asks_the_prometheus_of_this_file() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources/prometheus.yml").read_text())["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in SERVICES
    assert str(url.port) == published(url.hostname)[0][2]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards/calmclip.yml").read_text())["providers"]
    folder = ROOT / mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()
    assert Path(home).parent == Path(provider["options"]["path"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_mounts_what_exists_and_listens_here_alone(name: str) -> None:
    for source in mounts(name).values():
        if source.startswith("."):
            assert (ROOT / source).exists()
        else:
            assert source in COMPOSE["volumes"]
    assert all(address == "127.0.0.1" for address, _, _ in published(name))
    for other in SERVICES[name].get("depends_on", {}):
        built = "build" in SERVICES[other] and bool(STAGES[SERVICES[other]["build"]["target"]].all("HEALTHCHECK"))
        assert built or "healthcheck" in SERVICES[other]
    if "build" not in SERVICES[name]:
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"]), "pin a version"


def test_volumes_lie_where_the_images_look() -> None:
    env = STAGES["service"].env()
    assert mounts("service") == {env["CALMCLIP_BUNDLES_DIR"]: "bundles", env["CALMCLIP_DATA_DIR"]: "data"}
    assert mounts("export") == {env["CALMCLIP_BUNDLES_DIR"]: "bundles"}
    assert f"--out {env['CALMCLIP_BUNDLES_DIR']}" in next(t for t in STAGES["export"].all("RUN") if "export mini" in t)
