"""The types of `bundle.json`, format 2. Knows no files.

`bundle.schema.json` is printed from here (`python -m calmclip.models.bundle.manifest`); models/README.md is the
normative text. Whatever differs between a CLIP, a SigLIP and a Long-CLIP is data here, never a branch on a
model's name at run time.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from calmclip.models.errors import BundleInvalid, BundleTooNew

FORMAT = 2
OLDEST = 2  # format 1 was before the first release
MANIFEST = "bundle.json"
MAX_PATH = 200  # characters; every file system holds as much

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _inside(path: str) -> str:
    """A relative path of plain segments: it can neither leave its folder nor hide."""
    if len(path) > MAX_PATH or not all(map(_SEGMENT.fullmatch, path.split("/"))):
        raise ValueError(
            f"{path[:MAX_PATH]!r} is not a path inside the bundle; use at most {MAX_PATH} letters, digits, "
            "'.', '_' and '-' between single slashes"
        )
    if path == MANIFEST:
        raise ValueError(f"{MANIFEST} cannot name itself")
    return path


Path = Annotated[str, AfterValidator(_inside)]
Name = Annotated[str, Field(pattern=_NAME)]
TaskName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Template = Annotated[str, Field(pattern=r"\{\}")]
Triple = tuple[float, float, float]
MAX_SIDE = 4096  # pixels of a graph's input


class FrozenModel(BaseModel):
    """Immutable, every number finite, and an unknown key is an error that names the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants", protected_namespaces=()
    )


class Tensor(FrozenModel):
    """A graph input or output. In ``shape`` a string is a dimension known only at run time."""

    dtype: Literal["float32", "int64", "uint8", "int8", "int32", "bool"]
    shape: tuple[Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)], ...]


class ImagePreprocess(FrozenModel):
    """Picture -> float32 [1, 3, H, W]: upright RGB, resized, placed in ``size``, then (x / 255 - mean) / std.

    resize  shortest   the short side becomes ``shortest``, the long side int(shortest * long / short); centre crop
            exact      both sides become ``size``
            letterbox  the largest size that fits ``size``, top left; the rest is ``pad`` (0-255)
            square     made square by ``pad``, below or on the right, then both sides become ``size``
    resample  bicubic, bilinear   as Pillow: antialiased, rounded to 8 bits
              gaussian            a Gaussian of (shrink - 1) / 2 pixels, then bilinear; nothing is rounded

    ``square`` and ``gaussian`` go together, and not with ``in_graph``.

    With ``in_graph`` the graph does all this itself: it takes the upright picture, uint8 [height, width, 3].
    """

    kind: Literal["image"] = "image"
    input: str = "pixels"
    in_graph: bool = Field(False, description="the graph prepares the picture: its input is uint8 [height, width, 3]")
    size: tuple[int, int] = Field(description="height, width of the graph's input")
    resize: Literal["shortest", "exact", "letterbox", "square"] = "shortest"
    shortest: int | None = Field(None, description="short side in pixels, for resize = shortest")
    keep_square: bool = Field(False, description="a square picture is resized to `size` and not cropped")
    crop_offset: Literal["round", "floor"] = Field(
        "round", description="torchvision rounds half an odd margin, transformers floors it"
    )
    resample: Literal["bicubic", "bilinear", "gaussian"] = "bicubic"
    mean: Triple
    std: Triple
    pad: int = Field(0, ge=0, le=255)

    @model_validator(mode="after")
    def _complete(self) -> "ImagePreprocess":
        if min(self.size) < 1 or max(self.size) > MAX_SIDE:
            raise ValueError(f"size {self.size} is not within 1 to {MAX_SIDE}")
        if self.resize == "shortest" and not max(self.size) <= (self.shortest or 0) <= MAX_SIDE:
            raise ValueError(
                f"resize = shortest needs `shortest` from {max(self.size)} to {MAX_SIDE}; it is {self.shortest}"
            )
        if (self.resize == "square") != (self.resample == "gaussian"):
            raise ValueError(
                f"resize = square and resample = gaussian go together; they are {self.resize} and {self.resample}"
            )
        if self.in_graph and self.resample == "gaussian":
            raise ValueError("no operator resamples by a Gaussian; `in_graph` must be false")
        if min(self.std) < 1e-3:
            raise ValueError(f"std {self.std} is in units of x / 255; each is at least 0.001")
        return self

    def feeds(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Name -> dtype and shape of what it makes."""
        if self.in_graph:
            return {self.input: ("uint8", ("height", "width", 3))}
        return {self.input: ("float32", ("B", 3, *self.size))}


class TextPreprocess(FrozenModel):
    """Strings -> int64 [B, T] ids (and mask, where the graph takes one), from the bundle's tokenizer.json.

    ``clean``: what is done to a text first, as open_clip calls it: HTML unescaped, white space joined, odd widths,
    ligatures and quotes made plain (`calmclip.models.preprocess.clean`); ``lower`` also makes it lower case.
    ``pad``: to the ``context`` always, or to the ``longest`` of the batch, rounded up to a ``multiple`` of tokens but
    never over the context: texts of nearly one length then have one shape, and a server may run them together. A text
    of more than ``context`` tokens is an error, or cut (its last token kept) when ``truncate``.
    """

    kind: Literal["text"] = "text"
    tokenizer: Path = "tokenizer.json"
    clean: Literal["lower", "whitespace"] | None = None
    ids: str = "ids"
    mask: str | None = None
    context: int = Field(ge=1, le=65_536)
    pad: Literal["context", "longest"] = "longest"
    multiple: int = Field(1, ge=1, le=65_536, description="for pad = longest: the width is a multiple of it")
    pad_id: int = Field(0, ge=0, lt=2**31)
    truncate: bool = False

    @model_validator(mode="after")
    def _even(self) -> "TextPreprocess":
        if self.pad == "context" and self.multiple != 1:
            raise ValueError(
                f"pad = context is one width already, so `multiple` must be 1; it is {self.multiple}. Use pad = longest"
            )
        return self

    def width(self, longest: int) -> int:
        """How wide a batch is whose longest text has so many tokens, at most ``context``."""
        if self.pad == "context":
            return self.context
        return min(self.context, -(-longest // self.multiple) * self.multiple)

    def feeds(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Name -> dtype and shape of what it makes."""
        width = self.context if self.pad == "context" else "T"
        return {name: ("int64", ("B", width)) for name in (self.ids, self.mask) if name}


class Graph(FrozenModel):
    """One ONNX file. ``batch``: the first dimension of every input and output counts independent rows.

    With ``preprocess`` the inputs are exactly what it makes.
    """

    file: Path
    batch: bool = True
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = Field(min_length=1)
    preprocess: ImagePreprocess | TextPreprocess | None = Field(None, discriminator="kind")

    @model_validator(mode="after")
    def _fed(self) -> "Graph":
        made = self.preprocess.feeds() if self.preprocess else {}
        if self.preprocess and sorted(made) != sorted(self.inputs):
            raise ValueError(f"preprocess makes the inputs {sorted(made)}; the graph takes {sorted(self.inputs)}")
        for name, (dtype, shape) in made.items():
            if self.inputs[name].dtype != dtype or not fits(shape, self.inputs[name].shape):
                raise ValueError(f"preprocess makes {name!r} as {dtype} {list(shape)}; the graph takes another")
        if self.batch and isinstance(self.preprocess, ImagePreprocess) and self.preprocess.in_graph:
            raise ValueError("a graph that takes pictures of any size takes one at a time; `batch` must be false")
        return self


class Source(FrozenModel):
    """Where the weights came from."""

    net: str
    model: str
    weights: Mapping[str, str] = Field(default_factory=dict, description="file or package -> sha256 of its weights")
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
    params: Mapping[str, Any] = Field(default_factory=dict)
    assets: Mapping[str, Path] = Field(default_factory=dict)


class DefaultClassifier(FrozenModel):
    """The classifier that a bundle carries; `models.classifier.Classifier` is what it becomes when it is opened."""

    labels: Path | None = Field(None, description="JSON list of strings, each once")
    templates: tuple[Template, ...] = Field((), description="sentences with {} for a label; none: the label alone")
    descriptions: Path | None = Field(
        None, description="JSON object, label -> list of sentences that take the place of the templates"
    )
    head: Plugin | None = None
    temperature: float = Field(1.0, ge=0.01, le=100, description="divides the logits")
    none_below: float | None = Field(None, gt=0, le=1, description="with no score of it, none of the labels fits")

    def paths(self) -> set[str]:
        """Every file that it names."""
        files = {path for path in (self.labels, self.descriptions) if path}
        return files | {*(self.head.assets.values() if self.head else ())}


class Quantization(FrozenModel):
    """How each graph became what it is; ``none`` for float."""

    name: str
    weights: str = ""
    activations: str = ""
    graphs: Mapping[str, str] = Field(default_factory=dict)
    calibration: Mapping[str, Any] = Field(default_factory=dict)


class SuppressionDefaults(FrozenModel):
    """What a detect request asks for that does not say otherwise; what is absent here is calmclip's own default."""

    method: Literal["hard", "linear", "gaussian"] | None = None
    sigma: float | None = Field(None, ge=1e-6, le=1e6)
    iou_threshold: float | None = Field(None, ge=0, le=1)
    min_score: float | None = Field(None, ge=0, le=1)
    max_output: int | None = Field(None, ge=1, le=1000)
    per_class: bool | None = None


class File(FrozenModel):
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)


class Manifest(FrozenModel):
    """`bundle.json`: everything needed to feed the graphs and read their answers."""

    format: Literal[2] = 2
    name: Name
    precision: Literal["int8", "float32", "mixed"]
    tasks: tuple[TaskName, ...] = Field(min_length=1)
    source: Source
    family: str | None = Field(
        None, pattern=_SHA256, description="of what embeds: float and INT8 bundles of one export have the same"
    )
    graphs: Mapping[str, Graph] = Field(min_length=1, description="by role")
    ops: Ops = Ops()
    classifier: DefaultClassifier | None = Field(None, description="of a request that names no other")
    suppression: SuppressionDefaults | None = Field(None, description="of a detect request, where it differs")
    quantization: Quantization
    created: str = Field(description="UTC, ISO 8601")
    files: Mapping[Path, File] = Field(default_factory=dict, description="every file but this one")

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        named = {graph.file for graph in self.graphs.values()}
        named |= {g.preprocess.tokenizer for g in self.graphs.values() if isinstance(g.preprocess, TextPreprocess)}
        named |= self.classifier.paths() if self.classifier else set()
        if self.files and (absent := sorted(named - self.files.keys())):
            raise ValueError(f"named but not listed under `files`: {', '.join(absent)}")
        from calmclip.models.tasks import TASKS  # which is made of these types

        for task in self.tasks:
            if task in TASKS.names():  # of another nothing is known, and the rest is served
                TASKS.get(task).require(self)
        return self


def fits(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    """Same rank, and no two fixed dimensions that differ."""
    return len(one) == len(other) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(one, other, strict=True)
    )


# format of the file -> what turns it into the next one, from `OLDEST` on.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def parse(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``; ``where`` names it in errors.

    Raises `BundleTooNew` for a format above ours, `BundleInvalid` for everything else that is wrong.
    """
    try:
        data = json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{where} is not JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise BundleInvalid(f"{where} holds a JSON {type(data).__name__}, not an object")
    number = data.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BundleInvalid(f"{where}: `format` is {number!r}; expected a whole number from {OLDEST} to {FORMAT}")
    if number > FORMAT:
        raise BundleTooNew(
            f"{where} has format {number}; this calmclip reads up to {FORMAT}. Install a newer calmclip."
        )
    if number < OLDEST:
        raise BundleInvalid(
            f"{where} has format {number}, from before the first release; this calmclip reads from {OLDEST} on. Export "
            "the checkpoint again."
        )
    for step in range(number, FORMAT):
        data = UPGRADES[step](data)
    try:
        return Manifest.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise BundleInvalid(f"{where}: {explain(error)}") from None


def explain(error: ValidationError, most: int = 5) -> str:
    """What pydantic found, on one line: where, and what is wrong there."""
    found = error.errors(include_url=False, include_input=False)
    lines = [
        f"{'.'.join(map(str, e['loc'])) or 'manifest'}: "
        + ("unknown key" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, "))
        for e in found[:most]
    ]
    return "; ".join(lines) + (f"; and {len(found) - most} more" if len(found) > most else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not see two manifests in one file: a repeated key is refused."""
    if len(data := dict(pairs)) < len(pairs):
        ((key, times),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} appears {times} times")
    return data


def _finite(number: str) -> float:
    """NaN and Infinity are no JSON, and 1e999 is infinite too."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:80]} is not a finite number")
    return value


def schema() -> str:
    """JSON Schema of the manifest, for other languages."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
