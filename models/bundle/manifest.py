"""The types of `bundle.json`, format 1. Knows no files.

`bundle.schema.json` is printed from here (`python -m models.bundle.manifest`); models/README.md is the
normative text. Whatever differs between a CLIP, a SigLIP and a Long-CLIP is data here, never a branch on a
model's name at run time.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import BundleInvalid, BundleTooNew

FORMAT = 1

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"
_SEGMENT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")


def _inside(path: str) -> str:
    """A relative path of plain segments: it can neither leave its folder nor hide."""
    if not path or not all(_SEGMENT.match(segment) for segment in path.split("/")):
        raise ValueError(
            f"{path!r} is not a path inside the bundle; use letters, digits, '.', '_' and '-' between single slashes"
        )
    return path


Path = Annotated[str, AfterValidator(_inside)]
Name = Annotated[str, Field(pattern=_NAME)]
Triple = tuple[float, float, float]


class FrozenModel(BaseModel):
    """Immutable, and an unknown key is an error that names the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Tensor(FrozenModel):
    """A graph input or output. In ``shape`` a string is a dimension known only at run time."""

    dtype: Literal["float32", "int64", "uint8", "int8", "int32", "bool"]
    shape: tuple[int | str, ...]


class ImagePreprocess(FrozenModel):
    """Picture -> float32 [1, 3, H, W]: upright RGB, resized, placed in ``size``, then (x / 255 - mean) / std.

    resize  shortest   the short side becomes ``shortest``, the long side int(shortest * long / short); centre crop
            exact      both sides become ``size``
            letterbox  the largest size that fits ``size``, top left; the rest is ``pad`` (0-255)
    """

    kind: Literal["image"] = "image"
    input: str = "pixels"
    size: tuple[int, int] = Field(description="height, width of the graph's input")
    resize: Literal["shortest", "exact", "letterbox"] = "shortest"
    shortest: int | None = Field(None, description="short side in pixels, for resize = shortest")
    keep_square: bool = Field(False, description="a square picture is resized to `size` and not cropped")
    crop_offset: Literal["round", "floor"] = Field(
        "round", description="torchvision rounds half an odd margin, transformers floors it"
    )
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Triple
    std: Triple
    pad: int = Field(0, ge=0, le=255)

    @model_validator(mode="after")
    def _complete(self) -> "ImagePreprocess":
        if self.resize == "shortest" and (self.shortest is None or self.shortest < max(self.size)):
            raise ValueError(f"resize = shortest needs `shortest` >= {max(self.size)}; it is {self.shortest}")
        if min(self.size) < 1 or max(self.size) > 4096:
            raise ValueError(f"size {self.size} is not within 1 to 4096")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self


class TextPreprocess(FrozenModel):
    """Strings -> int64 [B, T] ids (and mask, where the graph takes one), from the bundle's tokenizer.json.

    ``pad``: to the ``context`` always, or to the ``longest`` of the batch. A text of more than ``context``
    tokens is an error, or cut (its last token kept) when ``truncate``.
    """

    kind: Literal["text"] = "text"
    tokenizer: Path = "tokenizer.json"
    ids: str = "ids"
    mask: str | None = None
    context: int = Field(ge=1)
    pad: Literal["context", "longest"] = "longest"
    pad_id: int = 0
    truncate: bool = False


class Graph(FrozenModel):
    """One ONNX file. ``batch``: the first dimension of every input and output counts independent rows."""

    file: Path
    batch: bool = True
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    preprocess: ImagePreprocess | TextPreprocess | None = Field(None, discriminator="kind")


class Source(FrozenModel):
    """Where the weights came from."""

    net: str
    model: str
    weights: dict[str, str] = Field(default_factory=dict, description="file or package -> sha256 of its weights")
    license: str
    notes: str = ""


class Ops(FrozenModel):
    """Custom operators in the graphs; each is there as a local function too, so a plain runtime can run them."""

    domain: str = "ai.calmclip"
    version: int = 1
    used: tuple[str, ...] = ()


class Plugin(FrozenModel):
    """A name in a family and what it is given."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)
    assets: dict[str, Path] = Field(default_factory=dict)


class Quantization(FrozenModel):
    """How each graph became what it is; ``none`` for float."""

    name: str
    weights: str = ""
    activations: str = ""
    graphs: dict[str, str] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)


class File(FrozenModel):
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)


Task = Literal["classify", "embed", "detect", "raw"]


class Manifest(FrozenModel):
    """`bundle.json`: everything needed to feed the graphs and read their answers."""

    format: Literal[1] = 1
    name: Name
    precision: Literal["int8", "float32", "mixed"]
    tasks: tuple[Task, ...]
    source: Source
    graphs: dict[str, Graph]
    ops: Ops = Ops()
    prompts: Plugin | None = None
    head: Plugin | None = None
    labels: Path | None = Field(None, description="JSON list of strings: the bundle's own label set")
    quantization: Quantization
    created: str = Field(description="UTC, ISO 8601")
    files: dict[Path, File] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        named = {graph.file for graph in self.graphs.values()}
        named |= {g.preprocess.tokenizer for g in self.graphs.values() if isinstance(g.preprocess, TextPreprocess)}
        named |= {path for plugin in (self.head, self.prompts) if plugin for path in plugin.assets.values()}
        named |= {self.labels} if self.labels else set()
        if self.files and (absent := sorted(named - self.files.keys())):
            raise ValueError(f"named but not listed under `files`: {', '.join(absent)}")
        needs = {"classify": ("image", "text"), "embed": (), "detect": ("regions", "text", "detect"), "raw": ()}
        for task in self.tasks:
            if lacking := [role for role in needs[task] if role not in self.graphs]:
                raise ValueError(f"task {task!r} needs a graph {lacking[0]!r}; there is {sorted(self.graphs)}")
        if "classify" in self.tasks and not (self.head and self.prompts):
            raise ValueError("task 'classify' needs `head` and `prompts`")
        return self


# format of the file -> what turns it into the next one. Empty until there is a format 2.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def parse(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``; ``where`` names it in errors.

    Raises `BundleTooNew` for a format above ours, `BundleInvalid` for everything else that is wrong.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{where} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleInvalid(f"{where} holds a JSON {type(data).__name__}, not an object")
    number = data.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BundleInvalid(f"{where}: `format` is {number!r}; expected a whole number from 1 to {FORMAT}")
    if number > FORMAT:
        raise BundleTooNew(
            f"{where} has format {number}; this calmclip reads up to {FORMAT}. Install a newer calmclip."
        )
    for step in range(number, FORMAT):
        data = UPGRADES[step](data)
    try:
        return Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()]
        raise BundleInvalid(f"{where}: {'; '.join(lines)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not see two manifests in one file: a repeated key is refused."""
    keys = [key for key, _ in pairs]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"the key {sorted(repeated)[0]!r} appears twice")
    return dict(pairs)


def schema() -> str:
    """JSON Schema of the manifest, for other languages."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
