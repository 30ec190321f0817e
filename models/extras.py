"""The extra of an optional dependency, and how to install it: in a checkout, from a wheel, in an image.

calmclip is in no package index, so `pip install calmclip` does not work.
"""

import json
import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import calmclip
from calmclip.models.errors import ExtraMissing

# top-level package, or a package of calmclip -> its extra
EXTRAS = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "tomli_w": "export",
    "matplotlib": "export",
    "fastapi": "service", "uvicorn": "service", "prometheus_client": "service", "pydantic_settings": "service",
    "orjson": "service", "lancedb": "service", "pyarrow": "service", "httpx": "service",
    "calmclip.export": "export", "calmclip.service": "service",  # an image may have only one of these
    "shtab": "completion",
    "scipy": "eval", "imagecorruptions": "eval",
}  # fmt: skip
# those of the extra `export` that the built-in model's own extra, `mini`, has too: all that its export imports
MINI = {"onnx", "onnxscript", "tomli_w", "calmclip.export"}

IMAGE = "CALMCLIP_IMAGE"  # the name of this image; set by the Dockerfile
# value of IMAGE -> the image's name in docker-compose.yml, and its extras
IMAGES = {
    "export": ("calmclip-export", ("mini", "export", "nets")),
    "service": ("calmclip", ("service", "postgres", "otel")),
}


def extra_of(module: str, *, builtin: bool = False) -> str | None:
    """The extra of ``module``, a dotted name; None if no extra has it. ``builtin``: of a command on the built-in model,
    which needs less than a command on a checkpoint."""
    parts = module.split(".")
    names = [".".join(parts[:2]), parts[0]]
    if builtin and MINI & {*names}:
        return "mini"
    return next((EXTRAS[name] for name in names if name in EXTRAS), None)


def missing(feature: str, package: str, extra: str) -> ExtraMissing:
    """The error of a ``feature`` that needs the absent ``package`` of ``extra``."""
    return ExtraMissing(f"{feature} needs {package!r}, which is not installed; {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The instruction for this copy of calmclip: in an image, a checkout, or a wheel."""
    if image := os.environ.get(IMAGE):
        others = [name for stage, (name, extras) in IMAGES.items() if extra in extras and stage != image]
        remedy = f"use the image {others[0]}" if others else "install calmclip outside of an image"
        return f"this image leaves out the extra {extra!r}; {remedy}"
    root = Path(calmclip.__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"in {root}: pip install -e '.[{extra}]'"
    if url := _origin():
        return f"pip install 'calmclip[{extra}] @ {url}'"
    return f"pip install './calmclip-{calmclip.__version__}-py3-none-any.whl[{extra}]', with the path of the wheel"


def how_to_install_file(requirements: Path) -> str:
    """The same for a file of pinned requirements that ships with calmclip."""
    if os.environ.get(IMAGE):
        return f"this image leaves them out; use the image {IMAGES['export'][0]}"
    return f"pip install --no-deps --require-hashes -r {shlex.quote(str(requirements))}"


def _origin() -> str | None:
    """The URL that pip installed from (PEP 610), if there is still a file."""
    from importlib import metadata  # takes longer than the rest of a help text

    try:
        direct_url = metadata.distribution("calmclip").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = str(json.loads(direct_url).get("url", "")) if direct_url else ""
    gone = url.startswith("file://") and not Path(unquote(urlsplit(url).path)).exists()
    return None if gone else url or None
