"""The container files agree with the project. These tests need no container engine; releases are tested with one."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import BaseModel

from calmclip.models import extras
from calmclip.models.ops import build
from calmclip.service.monitoring import dashboard
from calmclip.service.settings import Settings
from tests import requirements

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((ROOT / "service/monitoring/prometheus.yml").read_text())
GRAFANA = ROOT / "service/monitoring/grafana/provisioning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIBRARY = build.FOLDER.resolve().relative_to(ROOT).as_posix()


@dataclass
class Stage:
    """A FROM and its steps: (instruction, arguments)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """The arguments of every ``instruction``, those of the base stages first."""
        below = STAGES[self.base].all(instruction) if self.base in STAGES else []
        return below + [text for name, text in self.steps if name == instruction]

    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in shlex.split(text))


def read_stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = arguments.split()
            stage = stages[name] = Stage(name, base)
        else:
            stage.steps.append((instruction, arguments))
    return stages


STAGES = read_stages()


def settings_there(model: type[BaseModel] = Settings, prefix: str = "CALMCLIP_") -> dict[str, Any]:
    """Name of an environment variable -> default."""
    defaults: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            defaults |= settings_there(inner, f"{prefix}{name.upper()}__")
        else:
            defaults[f"{prefix}{name.upper()}"] = info.default
    return defaults


def published(service: str) -> list[tuple[str, str, str]]:
    """(host address, host port, container port)"""
    return [tuple(port.rsplit(":", 2)) for port in SERVICES[service].get("ports", [])]


def mounts(service: str) -> dict[str, str]:
    """container path -> volume or host path"""
    return {target: source for source, target, *_ in (v.split(":") for v in SERVICES[service].get("volumes", []))}


def aliases(service: str) -> set[str]:
    """The host names of a service for other containers."""
    networks = SERVICES[service].get("networks", {})
    return {service, *(alias for network in networks.values() for alias in network["aliases"])}


def profiles(service: str) -> set[str]:
    """The profiles that start a service; without any it is in both."""
    return set(SERVICES[service].get("profiles", ["single", "scale"]))


def settings_of(service: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in SERVICES[service]["environment"].items():
        monkeypatch.setenv(name, value)
    return Settings()


def test_the_last_stage_is_the_service_and_compose_builds_stages_that_exist() -> None:
    assert list(STAGES)[-1] == "service"
    assert {s["build"]["target"] for s in SERVICES.values() if "build" in s} == {"service", "export"}
    for stage in STAGES.values():
        for text in stage.all("COPY"):
            if source := re.search(r"--from=(\S+)", text):
                assert source[1] in STAGES


def ignored_by_the_build() -> list[str]:
    return [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]


def test_the_build_context_has_what_is_copied_and_little_else() -> None:
    ignored = ignored_by_the_build()
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
    (command,) = (text for text in STAGES[name].all("RUN") if "useradd" in text)
    assert re.search(rf"useradd --uid [1-9]\d* .*\b{user}\b", command)


def test_the_service_image_copies_its_environment_its_bundle_and_its_sbom() -> None:
    copied = {tuple(text.split()[-2:]) for text in STAGES["service"].all("COPY") if "--from" in text}
    assert copied == {
        ("/opt/calmclip", "/opt/calmclip"),
        ("/bundles/mini-int8", "/bundles/mini-int8"),
        ("/sbom", "/usr/share/sbom"),
    }


def test_the_service_image_has_no_torch() -> None:
    locked = set(lock(STAGES["packages"], "/opt/calmclip"))
    assert {"onnxruntime", "lancedb", "psycopg", "opentelemetry-sdk"} <= locked
    assert not locked & {"torch", "torchvision", "onnx", "transformers", "huggingface-hub"}


def test_packages_of_the_service_image_have_hashes_or_are_ours() -> None:
    for name in ("tools", "packages"):
        for text in STAGES[name].all("RUN"):
            for command in re.split(r"&&|\\;", text):
                if re.search(r"\bpip\b.* (install|wheel|download)\b", command):
                    ours = {"--no-deps"} <= set(command.split()) and command.split()[-1] in (".", "/wheels/*.whl")
                    assert ours or "--require-hashes" in command, command
                    assert "wheel" not in command.split() or "--no-build-isolation" in command


def test_the_service_image_has_no_pip_and_no_compiler() -> None:
    service, base, packages = STAGES["service"], STAGES["base"], STAGES["packages"]
    assert not [text for text in service.all("RUN") if re.search(r"\bapt|pip install|venv|ensurepip", text)]
    # COPY --from deletes nothing, so unwanted files must not be in the base stage
    assert service.base == "base"
    assert base.base not in STAGES
    assert not [text for text in [*base.all("RUN"), *base.all("COPY")] if "/opt/calmclip" in text]
    (command,) = (text for text in packages.all("RUN") if "-m venv" in text and "/opt/calmclip" in text)
    assert "--without-pip" in command
    assert not {"pip", "setuptools", "wheel"} & set(lock(packages, "/opt/calmclip"))
    # those of the base image, in /usr/local
    assert {"pip", "setuptools", "wheel"} <= removed(service.all("RUN")[len(base.all("RUN"))])
    first_copy = next(at for at, (name, _) in enumerate(service.steps) if name == "COPY")
    assert "pip uninstall" in dict(service.steps[:first_copy])["RUN"], (
        "after the copy, python is the one of the environment"
    )


def test_the_sbom_lists_the_packages_of_the_environment_and_of_the_system() -> None:
    sbom = STAGES["sbom"]
    # Debian's list is that of the stage, which must have exactly the packages of the service
    assert STAGES["packages"].base == "tools"
    assert STAGES["tools"].base == "base"
    assert sbom.base == "packages"
    assert not [text for text in sbom.all("RUN") if "apt-get" in text]
    command = sbom.all("RUN")[-1]
    assert "cyclonedx-py environment /opt/calmclip/bin/python" in command
    assert "debsbom generate --sbom-type cdx" in command
    assert {"cyclonedx-bom", "debsbom", "setuptools"} <= set(lock(STAGES["tools"], "/opt/tools"))


def lock(stage: Stage, environment: str) -> dict[str, str]:
    """name -> version of the packages that ``stage`` installs into ``environment``."""
    (command,) = (text for text in stage.all("RUN") if "--require-hashes" in text and environment in text)
    name = command.split()[-1]
    (path,) = (source for text in stage.all("COPY") for source in text.split()[:-1] if Path(source).name == name)
    return requirements.pinned(ROOT / path)


def removed(command: str) -> set[str]:
    assert "pip uninstall --yes" in command
    return {word for word in command.partition("uninstall")[2].split() if not word.startswith("-")}


def test_the_export_image_reads_the_checkpoints_that_compose_names() -> None:
    # `docker compose run --volume` takes a relative path for the name of a volume
    example = r'--volume "\$PWD/([\w-]+):(/\1):ro" export \2 --out /bundles\n'
    assert re.search(example, (ROOT / "docker-compose.yml").read_text())
    (extras,) = (m[1] for text in STAGES["export"].all("RUN") if (m := re.search(r"\.\[(.*?)\]", text)))
    assert set(extras.split(",")) == {"export", "nets"}


def test_the_op_library_reaches_both_images_and_both_require_it() -> None:
    python = re.match(r"python:(\d+\.\d+)-", STAGES["base"].base)
    assert python
    installed = f"/opt/calmclip/lib/python{python[1]}/site-packages"
    for name in ("export", "packages"):
        copied = [text.split()[1:] for text in STAGES[name].all("COPY") if "--from=ops" in text]
        assert copied == [[f"/app/{LIBRARY}", f"{installed}/calmclip/{LIBRARY}"]]
    for name in ("export", "service"):
        steps = STAGES[name].steps
        arrives = max(
            at for at, (kind, text) in enumerate(steps) if kind == "COPY" and re.search("--from=(ops|packages)", text)
        )
        loads = next(at for at, (kind, text) in enumerate(steps) if kind == "RUN" and "calmclip ops build" in text)
        assert arrives < loads  # without a compiler the command loads the library, or the build fails
        assert STAGES[name].env().get("CALMCLIP_OPS") == "required"
        assert not [text for text in STAGES[name].all("RUN") if "apt-get" in text]
    command = next(text for text in STAGES["export"].all("RUN") if "calmclip export" in text)
    assert command.index("ops build") < command.index("export mini")  # the report is measured with the library
    assert LIBRARY in ignored_by_the_build(), "the image must not get the library of this checkout"


def test_the_ops_stage_has_all_files_that_its_build_needs(tmp_path: Path) -> None:
    ops = STAGES["ops"]
    (packages,) = (text for text in ops.all("RUN") if "apt-get install" in text)
    assert {"g++", "libonnxruntime-dev"} <= set(packages.split())
    assert ops.all("WORKDIR")[-1] == "/app"
    for text in ops.all("COPY"):
        *sources, target = text.split()
        for source in sources:
            if (ROOT / source).is_dir():
                hidden = shutil.ignore_patterns("lib", "__pycache__")
                shutil.copytree(ROOT / source, tmp_path / target, symlinks=True, ignore=hidden, dirs_exist_ok=True)
            else:
                (tmp_path / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    python, flag, code = shlex.split(ops.all("RUN")[-1])
    assert (python, flag) == ("python", "-c")
    imports, call = code.split("; ")
    assert call == "build()"
    script = (
        f"{imports}; from calmclip.models.ops.build import FOLDER, fingerprint; print(FOLDER.resolve(), fingerprint())"
    )
    done = subprocess.run(  # -S -E: the stage has no installed packages
        [sys.executable, "-S", "-E", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / LIBRARY), build.fingerprint()]


def test_all_sources_of_the_op_library_ship_with_the_package() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["calmclip.models"]
    shipped = {path for pattern in patterns for path in (ROOT / "models").glob(pattern)}
    every = {path for path in build.SOURCES.resolve().rglob("*") if path.suffix in (".cc", ".h", ".inc")}
    assert {path.resolve() for path in build.sources()} <= every
    assert every <= shipped


def test_every_setting_that_is_set_exists() -> None:
    known = settings_there().keys()
    assert "CALMCLIP_LIMITS__IMAGE_BYTES" in known  # a nested setting
    named = {name for stage in STAGES.values() for name in stage.env()}
    named |= {name for service in SERVICES.values() for name in service.get("environment", {})}
    ours = {name for name in named if name.startswith("CALMCLIP_")}
    assert ours
    assert ours <= known | {extras.IMAGE}
    assert all(STAGES[name].env()[extras.IMAGE] == name for name in ("export", "service"))


def test_one_port_from_the_command_to_the_scrape() -> None:
    service = STAGES["service"]
    (port,) = service.all("EXPOSE")
    assert shlex.split(service.all("CMD")[-1].strip("[]").replace(",", " "))[-2:] == ["--port", port]
    assert f"http://127.0.0.1:{port}/readyz" in service.all("HEALTHCHECK")[-1]
    assert published("service")[0][2] == port
    (job,) = PROMETHEUS["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert str(discovery["port"]) == port
    (name,) = discovery["names"]
    assert {other for other in SERVICES if name in aliases(other)} == {"service", "replica"}


def test_prometheus_has_its_rules_and_the_alertmanager_of_this_file() -> None:
    config = next(flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--config.file="))
    path = Path(config.partition("=")[2])
    paths = mounts("prometheus")
    assert (ROOT / paths[str(path)]).samefile(ROOT / "service/monitoring/prometheus.yml")
    for name in PROMETHEUS["rule_files"]:
        assert (ROOT / paths[str(path.parent / name)]).samefile(ROOT / "service/monitoring" / name)
    (manager,) = PROMETHEUS["alerting"]["alertmanagers"]
    ((target,),) = (config["targets"] for config in manager["static_configs"])
    host, port = target.split(":")
    assert published(host)[0][2] == port
    (config,) = (flag for flag in SERVICES[host]["command"] if flag.startswith("--config.file="))
    assert (ROOT / mounts(host)[config.partition("=")[2]]).samefile(ROOT / "service/monitoring/alertmanager.yml")


@pytest.mark.parametrize("name", ["service", "replica"])
def test_the_service_has_the_time_to_drain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.grace_s + settings.deadline_ms / 1000


def test_grafana_asks_the_prometheus_of_this_file() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources/prometheus.yml").read_text())["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in SERVICES
    assert str(url.port) == published(url.hostname)[0][2]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards/calmclip.yml").read_text())["providers"]
    assert (source["type"], provider["type"]) == ("prometheus", "file")
    for uid in dashboard.BOARDS:
        assert set(re.findall(r'"uid": "([\w-]+)"', dashboard.text(uid))) - {uid} == {source["uid"]}
    folder = ROOT / mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()
    assert Path(home).parent == Path(provider["options"]["path"])


def test_the_default_profile_starts_one_service_and_each_profile_uses_a_port_once() -> None:
    assert "COMPOSE_PROFILES=single\n" in (ROOT / ".env").read_text()
    for profile in ("single", "scale"):
        started = [name for name in SERVICES if profile in profiles(name)]
        assert ("service" in started, "replica" in started) == (profile == "single", profile == "scale")
        ports = [port for name in started for _, port, _ in published(name)]
        assert sorted(ports) == ["3000", "8080", "9090", "9093"]
    assert {name for name in SERVICES if "export" in profiles(name)} == {"export"}


def test_a_replica_is_the_service_except_its_profile_its_store_and_its_port() -> None:
    alone, replica = SERVICES["service"], SERVICES["replica"]
    differing = {"profiles", "environment", "ports", "deploy", "depends_on"}
    assert {key: alone[key] for key in alone if key not in differing} == {
        key: replica[key] for key in replica if key not in differing
    }
    assert "ports" not in replica
    for service in (alone, replica, SERVICES["balancer"]):
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_replicas_share_a_database_and_no_file_has_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, url = str(settings_of("replica", monkeypatch).store).partition(":")
    address, database = urlsplit(url), SERVICES["postgres"]["environment"]
    assert kind == "pgvector"
    assert (address.username, address.hostname, address.path) == (
        database["POSTGRES_USER"],
        "postgres",
        f"/{database['POSTGRES_DB']}",
    )
    assert address.password is None
    # libpq reads PGPASSWORD; with an empty password the database does not start
    assert {SERVICES["replica"]["environment"]["PGPASSWORD"], database["POSTGRES_PASSWORD"]} == {
        "${POSTGRES_PASSWORD:-}"
    }
    assert "POSTGRES_HOST_AUTH_METHOD" not in database


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_mounts_existing_paths_and_listens_on_loopback_alone(name: str) -> None:
    for source in mounts(name).values():
        if source.startswith("."):
            assert (ROOT / source).exists()
        else:
            assert source in COMPOSE["volumes"]
    assert all(address == "127.0.0.1" for address, _, _ in published(name))
    for other, how in SERVICES[name].get("depends_on", {}).items():
        both = profiles(name) <= profiles(other)
        assert both == how.get("required", True), f"{name} may be started without {other}"
        built = "build" in SERVICES[other] and bool(STAGES[SERVICES[other]["build"]["target"]].all("HEALTHCHECK"))
        assert built or "healthcheck" in SERVICES[other]
    if "build" not in SERVICES[name]:
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(-\w+)?", SERVICES[name]["image"]), "pin a version"


def test_volumes_are_mounted_at_the_folders_of_the_images() -> None:
    env = STAGES["service"].env()
    for name in ("service", "replica"):
        assert mounts(name) == {env["CALMCLIP_BUNDLES_DIR"]: "bundles", env["CALMCLIP_DATA_DIR"]: "data"}
    assert mounts("export") == {env["CALMCLIP_BUNDLES_DIR"]: "bundles"}
    assert f"--out {env['CALMCLIP_BUNDLES_DIR']}" in next(t for t in STAGES["export"].all("RUN") if "export mini" in t)
