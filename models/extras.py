"""The extra of an optional dependency, and how to install it: in a checkout, from a wheel, in an image.

calmclip is in no package index, so `pip install calmclip` does not work.
"""

import json
import os
from importlib import metadata
from pathlib import Path

import calmclip
from calmclip.models.errors import ExtraMissing

# top-level package, or a package of calmclip -> its extra
EXTRAS = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "safetensors": "export", "tomli_w": "export",
    "matplotlib": "export",
    "fastapi": "service", "uvicorn": "service", "prometheus_client": "service", "pydantic_settings": "service",
    "orjson": "service", "lancedb": "service", "pyarrow": "service", "httpx": "service",
    "calmclip.export": "export", "calmclip.service": "service",  # an image may have only one of these
    "scipy": "eval",
}  # fmt: skip

IMAGE = "CALMCLIP_IMAGE"  # the name of this image; set by the Dockerfile


def extra_of(module: str) -> str | None:
    """The extra of ``module``, a dotted name; None if no extra has it."""
    parts = module.split(".")
    return EXTRAS.get(".".join(parts[:2])) or EXTRAS.get(parts[0])


def missing(feature: str, package: str, extra: str) -> ExtraMissing:
    """The error of a ``feature`` that needs the absent ``package`` of ``extra``."""
    return ExtraMissing(f"{feature} needs {package!r}, which is not installed; {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The instruction for this copy of calmclip: in an image, a checkout, or a wheel."""
    if image := os.environ.get(IMAGE):
        return f"the image {image!r} leaves out the extra {extra!r}: use the image that has it, or build one with it"
    root = Path(calmclip.__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"in {root}: pip install -e '.[{extra}]'"
    return f"pip install '{_origin()}'".replace("calmclip", f"calmclip[{extra}]", 1)


def _origin() -> str:
    """The requirement that pip installed, with the wheel's URL (PEP 610); else the wheel's name."""
    try:
        direct_url = metadata.distribution("calmclip").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        direct_url = None
    if direct_url and (url := json.loads(direct_url).get("url")):
        return f"calmclip @ {url}"
    return f"calmclip-{calmclip.__version__}-py3-none-any.whl"
