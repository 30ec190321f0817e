"""What an optional dependency is called, and how it is installed here: in a checkout, from a wheel, in an image.

calmclip is in no package index, so the name alone installs nothing.
"""

import json
import os
from importlib import metadata
from pathlib import Path

import calmclip
from calmclip.models.errors import ExtraMissing

# an import's first name, or two of ours -> the extra that holds it
EXTRAS = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "safetensors": "export", "tomli_w": "export",
    "matplotlib": "export",
    "fastapi": "service", "uvicorn": "service", "prometheus_client": "service", "pydantic_settings": "service",
    "orjson": "service", "lancedb": "service", "pyarrow": "service", "httpx": "service",
    "calmclip.export": "export", "calmclip.service": "service",  # an image may hold one package without the other
    "scipy": "eval",
}  # fmt: skip

IMAGE = "CALMCLIP_IMAGE"  # which image this is; set by the Dockerfile


def extra_of(module: str) -> str | None:
    """The extra that brings ``module``, a dotted name; None where no extra does."""
    parts = module.split(".")
    return EXTRAS.get(".".join(parts[:2])) or EXTRAS.get(parts[0])


def missing(what: str, package: str, extra: str) -> ExtraMissing:
    """The error of ``what``, which needs the absent ``package`` of ``extra``."""
    return ExtraMissing(f"{what} needs {package!r}, which is not installed; {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """A sentence for the place where this copy of calmclip lies.

    An image is not changed from inside: its user takes another one, or builds one.
    """
    if image := os.environ.get(IMAGE):
        return f"the image {image!r} leaves out the extra {extra!r}: use the image that has it, or build one with it"
    root = Path(calmclip.__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"in {root}: pip install -e '.[{extra}]'"
    return f"pip install '{_origin()}'".replace("calmclip", f"calmclip[{extra}]", 1)


def _origin() -> str:
    """What was given to pip: a requirement with the address of the wheel, as PEP 610 has it; else the wheel's name."""
    try:
        found = metadata.distribution("calmclip").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        found = None
    if found and (url := json.loads(found).get("url")):
        return f"calmclip @ {url}"
    return f"calmclip-{calmclip.__version__}-py3-none-any.whl"
