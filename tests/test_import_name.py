"""calmclip has one import name: in a checkout, in an editable install, and from a wheel in an empty directory."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

import calmclip
from calmclip.export.nets.mini import weights
from calmclip.models import errors, extras, runner, stored_classifier
from calmclip.models.tasks import detect
from calmclip.service import client
from tests.process import serving

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "export", "service")
BUILT = {"bundles", "lib", "__pycache__"}  # generated folders


def test_the_public_names_are_these():
    assert (calmclip.open_bundle, calmclip.Runner) == (runner.open_bundle, runner.Runner)
    assert (calmclip.Client, calmclip.AsyncClient) == (client.Client, client.AsyncClient)
    assert (calmclip.Example, calmclip.Suppression) == (detect.Example, detect.Suppression)
    assert calmclip.CalmclipError is errors.CalmclipError
    stored = (stored_classifier.ClassifierFolder, stored_classifier.read_classifier)
    assert (calmclip.ClassifierFolder, calmclip.read_classifier) == stored
    assert {*calmclip.__all__} == {*calmclip._PUBLIC, "__version__"} <= {*dir(calmclip)}


def test_an_unknown_name_is_answered_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'open'; public: AsyncClient, Attributes, CalmclipError"):
        calmclip.open  # noqa: B018 - the access is the test


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, calmclip; print([m for m in ('numpy', 'onnxruntime', 'PIL', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_file_imports_by_the_old_names():
    """This process has no module of an old name either, so imports by a string are checked too."""
    assert not {name for name in sys.modules if name.split(".")[0] in FOLDERS}
    old = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("calmclip", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for name in names(path)
        if name.split(".")[0] in FOLDERS
    }
    assert not old


def names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy, because the checkout's build folder may hold deleted modules
    for name in ("calmclip", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_of_the_tree_under_one_name(wheel: Path):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"calmclip"}
    tree = {
        f"calmclip/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not BUILT & {*path.relative_to(ROOT).parts}
    }
    assert len(tree) > 200
    assert tree | {"calmclip/__init__.py"} == {name for name in files if name.endswith(".py")}
    for data in ("models/README.md", "models/ops/csrc/register.cc", "service/web/app.js", "export/samples/cat.jpg"):
        assert f"calmclip/{data}" in files
    mini = {path for path in (ROOT / "export/nets/mini").rglob("*") if path.is_file() and not BUILT & {*path.parts}}
    assert {"drawn", "mini"} == {path.parent.name for path in mini}
    assert {f"calmclip/{path.relative_to(ROOT).as_posix()}" for path in mini} <= files  # weights, graphs, licences


@pytest.mark.slow  # an export of the built-in model: two minutes
def test_the_wheel_exports_and_serves_from_an_empty_directory_beside_a_users_models_py(wheel: Path, tmp_path: Path):
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    (home / "models.py").write_text("raise AssertionError('a file of the user, not of calmclip')\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    loaded = "print(*[m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'calmclip'])"
    files = run("-c", f"import sys, calmclip.export.pipeline, calmclip.service.app; {loaded}").split()
    assert len(files) > 100
    assert all(Path(file).is_relative_to(site) for file in files)  # none from the checkout, which is installed too
    sealed = json.loads(run("-m", "calmclip.models.cli", "export", "mini", "--out", "bundles", "--json"))["sealed"]
    assert sealed[0]["bundle"] == "mini-int8"
    with serving(home / "bundles", tmp_path / "data", PYTHONPATH=str(site), cwd=home) as (_, http, _):
        ready = http.get("/readyz").json()
        assert ready["ready"] is True
        assert "mini-int8" in ready["loaded"]


def test_the_client_works_from_a_wheel_without_its_requirements(wheel: Path, tmp_path: Path):
    """docs/clients.md tells it: httpx and the wheel with --no-deps, instead of all that bundles need."""
    site, needed, todo = tmp_path / "site", tmp_path / "needed", ["httpx"]
    zipfile.ZipFile(wheel).extractall(site)
    needed.mkdir()
    while todo:  # the modules of httpx and of what it requires, beside no other package
        for file in metadata.files(name := todo.pop()) or ():
            target = needed / file.parts[0]
            if not file.parts[0].startswith("..") and not target.exists():
                target.symlink_to(Path(file.locate()).parents[len(file.parts) - 2] if file.parts[1:] else file.locate())
        wanted = [Requirement(text) for text in metadata.requires(name) or ()]
        todo += [need.name for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    script = f"""
import sys
sys.path[:0] = [{str(site)!r}, {str(needed)!r}]
from calmclip import Client
from calmclip.service.client import ClientError
with Client("http://127.0.0.1:1") as client:
    try:
        client.classify(b"", ["a cat"])
    except ClientError as error:
        print(type(error).__name__, {{"numpy", "pydantic", "onnxruntime"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-S", "-E", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "Unreachable set()\n", done.stderr


PLACES = ("checkout", "wheel", "wheel that is gone", "image")


def install_at(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if this copy of calmclip were installed at ``place``; -> the wheel, if there is one."""
    wheel = folder / "a folder" / "calmclip-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    if place.startswith("wheel"):
        monkeypatch.setattr(calmclip, "__file__", str(folder / "calmclip" / "__init__.py"))
        origin = json.dumps({"url": wheel.as_uri(), "archive_info": {}})
        installed = SimpleNamespace(read_text=lambda name: {"direct_url.json": origin}[name])
        monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    if place == "wheel":
        wheel.touch()
    if place == "image":
        monkeypatch.setenv("CALMCLIP_IMAGE", "service")
    return wheel


@pytest.mark.parametrize("place", PLACES)
def test_an_error_says_how_to_install_an_extra(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """calmclip is in no package index: its bare name would install nothing, or a foreign package."""
    wheel = install_at(place, tmp_path, monkeypatch)
    instruction = {
        "checkout": f"in {ROOT}: pip install -e '.[nets]'",
        "wheel": f"pip install 'calmclip[nets] @ {wheel.as_uri()}'",
        "wheel that is gone": "pip install './calmclip-0.1.0-py3-none-any.whl[nets]', with the path of the wheel",
        "image": "this image leaves out the extra 'nets'; use the image calmclip-export",
    }[place]
    error = extras.missing("the net clip", "transformers", "nets")
    assert str(error) == f"the net clip needs 'transformers', which is not installed; {instruction}"


def test_the_message_names_a_file_of_this_copy_or_the_image_that_has_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path
):
    """A path that exists in a checkout alone, or pip in an image without it, helps nobody."""
    absent = replace(weights.BACKBONE, module="a_package_nobody_has")
    with pytest.raises(errors.WeightsMissing) as raised:
        absent.locate()
    (path,) = re.findall(r"pip install --no-deps --require-hashes -r (\S+)\. ", str(raised.value))
    assert Path(path).samefile(ROOT / "export/nets/mini/weights.txt")
    assert "calmclip/export/nets/mini/weights.txt" in zipfile.ZipFile(wheel).namelist()  # beside the module, as here
    install_at("image", tmp_path, monkeypatch)
    with pytest.raises(errors.WeightsMissing, match="use the image calmclip-export"):
        absent.locate()
