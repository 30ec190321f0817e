"""Who may know whom: service -> models <- export, torch in export alone, and each engine behind one door."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "service", "export")

TORCH = ("torch", "torchvision", "transformers", "open_clip", "timm")
HTTP = ("fastapi", "starlette", "uvicorn", "prometheus_client")
ONNX = ("onnx", "onnxscript")

# package -> top-level names that none of its files may import, not even inside a function
FORBIDDEN = {
    "models": {"calmclip.service", "calmclip.export", *TORCH, *HTTP, *ONNX},
    "service": {"calmclip.export", *TORCH, *ONNX},
    "export": {"calmclip.service", *HTTP},
}
# name -> the one file of models and service that may import it
ONE_DOOR = {
    "onnxruntime": "models/runtime/session.py",
    "opentelemetry": "service/tracing.py",
    "prometheus_client": "service/metrics.py",
    "ray": "service/deploy/ray_app.py",
}


def files(package: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / package).rglob("*.py")) if "bundles" not in path.parts)


@cache
def imported(path: Path, *, late: bool = False) -> tuple[str, ...]:
    """Full names, `from a import b` as a.b; those of `import_module("...")` too; no relative imports. ``late``: only
    what is imported inside functions."""
    return tuple(_imported(path, late))


def _imported(path: Path, late: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nodes = {id(node): node for top in functions for node in ast.walk(top)}.values() if late else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def _last_name(function: ast.expr) -> str:
    return str(getattr(function, "attr", getattr(function, "id", "")))


def imports(path: Path, *, late: bool = False) -> Iterator[str]:
    """First names, of ours the first two."""
    return (".".join(name.split(".")[: 1 + name.startswith("calmclip.")]) for name in imported(path, late=late))


def modules(package: str) -> dict[str, Path]:
    """Full names; a package is its `__init__`."""
    names = {path: ("calmclip", *path.relative_to(ROOT).with_suffix("").parts) for path in files(package)}
    return {".".join(name).removesuffix(".__init__"): path for path, name in names.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_what_its_package_must_not_know(package: str):
    forbidden = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in files(package)
        for name in imports(path)
        if name in FORBIDDEN[package]
    }
    assert not forbidden


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_each_other_in_no_cycle(package: str):
    """Imports inside functions and under TYPE_CHECKING count too."""
    known = modules(package)
    graph = {
        module: {name if name in known else name.rpartition(".")[0] for name in imported(path)} & {*known} - {module}
        for module, path in known.items()
    }
    while leaves := [module for module, names in graph.items() if not names]:
        graph = {module: names.difference(leaves) for module, names in graph.items() if names}
    trail = [next(iter(graph), "")]  # all that is left imports something that is left
    while graph and trail.count(trail[-1]) < 2:
        trail.append(min(graph[trail[-1]]))
    assert not graph, " -> ".join(trail[trail.index(trail[-1]) :])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_private_module_is_imported_by_its_own_folder_alone(package: str):
    """Of other distributions no private name is imported: of them we cannot tell names from modules."""
    ours = {module: path.parent for each in PACKAGES for module, path in modules(each).items()}
    strangers = []
    for path in files(package):
        for name in imported(path):
            module = name if name in ours or not name.startswith("calmclip.") else name.rpartition(".")[0]
            private = any(part[0] == "_" and not part.endswith("__") for part in module.split("."))
            if private and ours.get(module) != path.parent:
                strangers.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not strangers


@pytest.mark.parametrize("name", ONE_DOOR)
def test_an_engine_has_one_door(name: str):
    ours = [path for package in ("models", "service") for path in files(package)]
    assert [path.relative_to(ROOT).as_posix() for path in ours if name in imports(path)] == [ONE_DOOR[name]]


def test_a_plain_install_holds_what_models_imports_and_no_more():
    """But for what the extra `eval` brings, which evals and fits of heads import inside functions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = {"pillow": "PIL", "scikit-learn": "sklearn", "imagecorruptions-imaug": "imagecorruptions"}
    plain, extra = (
        {module.get(name, name) for name in (re.split(r"[^\w-]", line)[0] for line in lines)}
        for lines in (project["dependencies"], project["optional-dependencies"]["eval"])
    )
    needed, late = Counter[str](), Counter[str]()
    for path in files("models"):
        needed.update(imports(path))
        if path.parent in (ROOT / "models/evals", ROOT / "models/heads"):
            late.update(name for name in imports(path, late=True) if name in extra)
    assert {*late} == extra
    needed -= late
    assert {n for n in needed if not n.startswith("calmclip") and n not in sys.stdlib_module_names} == plain


def test_the_client_holds_httpx_and_nothing_else():
    assert {*imports(ROOT / "service/client.py")} - sys.stdlib_module_names == {"httpx"}
    assert not list(imports(ROOT / "service/__init__.py"))
    assert {*imports(ROOT / "calmclip/__init__.py")} - sys.stdlib_module_names == {
        "calmclip.models",
        "calmclip.service",
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [re.split(r"[^\w-]", line)[0] for line in extras["client"]] == ["httpx"]


def test_the_reader_of_imports_sees_them_all(tmp_path: Path):
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b as c\nfrom d.e import f\ndef g():\n    import h\n    import_module('i.j')\n"
        "from calmclip import k\nfrom calmclip.l.m import n\n"
    )
    assert list(imports(path)) == ["a", "d", "calmclip.k", "calmclip.l", "h", "i"]
    assert list(imports(path, late=True)) == ["h", "i"]


SERVICE = ("torch", "calmclip.export", "onnx", "transformers", "huggingface_hub", "opentelemetry.sdk", "ray", "lancedb")
APP = "import calmclip.service.app as app, calmclip.service.settings as it"


@pytest.mark.parametrize(
    ("code", "never"),
    [
        (f"{APP}, calmclip.service.cli; app.create_app(it.Settings())", (*SERVICE, "opentelemetry.exporter")),
        ("import calmclip.service.stores as it; it.open_store('lancedb:FOLDER')", ("torch", "calmclip.export")),
        ("import calmclip.models.runner", ("torch", "calmclip.export", "calmclip.service", "onnx", "fastapi")),
        ("import calmclip.models.evals.tables", ("torch", "calmclip.export", "scipy", "matplotlib", "tqdm", "onnx")),
        (
            "import calmclip.service.client",
            ("torch", "calmclip.models", "numpy", "pydantic", "fastapi", "starlette", "uvicorn", "orjson", "lancedb"),
        ),
        (
            "import calmclip.models.cli",
            ("torch", "calmclip.export", "calmclip.service", "onnx", "onnxruntime", "numpy", "fastapi"),
        ),
        (
            "import calmclip.models.commands as it; it.plugins_command([])",
            ("torch", "lancedb", "psycopg", "fastapi", "onnx", "calmclip.export.nets", "calmclip.service.stores"),
        ),
    ],
)
def test_a_fresh_interpreter_loads_only_its_side(code: str, never: tuple[str, ...], tmp_path: Path):
    """LanceDB only when a store is opened, OpenTelemetry's SDK only where there is a collector."""
    code = code.replace("FOLDER", str(tmp_path))
    script = f"{code}; import sys; print(*[name for name in {(*never, *PACKAGES)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.split("\n")[-2]) == (0, ""), done.stderr


def test_no_test_reads_what_lies_outside_the_repository():
    outside = "../" + "shared"
    files = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".md", ".json", ".toml")]
    assert not [path for path in files if outside in path.read_text(encoding="utf-8")]


def test_tests_are_no_packages():
    """Else a folder of theirs would be imported by its bare name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
