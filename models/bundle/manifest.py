"""The types of `bundle.json`, format 2. This module reads no files.

`python -m calmclip.models.bundle.manifest` prints `bundle.schema.json`; models/README.md is the normative text. The
differences between CLIP, SigLIP and Long-CLIP are data in the manifest; no code branches on a model's name.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from calmclip.models.bundle.frozen import FrozenModel as FrozenModel  # noqa: PLC0414  # others look for it here
from calmclip.models.bundle.frozen import Language as Language  # noqa: PLC0414
from calmclip.models.errors import BadRequest, BundleInvalid, BundleTooNew, kind
from calmclip.models.labels import MAX_CHARACTERS, NoneBelow, Temperature, Template
from calmclip.models.suppression import IouThreshold, MaxOutput, Method, MinScore, PerClass, Sigma

FORMAT = 2
OLDEST = 2  # format 1 is older than the first release
MANIFEST = "bundle.json"
REPORT = "report.json"
MAX_PATH = 200  # characters; all file systems allow this length

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _inside(path: str) -> str:
    """A relative path of plain segments: no ``..``, no hidden file."""
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
Triple = tuple[float, float, float]
PromptName = Annotated[str, Field(min_length=1, max_length=64)]
MAX_SIDE = 4096  # pixels of a graph's input
MAX_DIM = 65_536  # numbers of a vector that a graph reads in place of a text
GUIDE = "guide"  # an input beside those of `preprocess`: the output `patches` of the graph of this role


class Tensor(FrozenModel):
    """A graph input or output. A string in ``shape`` names a dynamic dimension."""

    dtype: Literal["float32", "int64", "uint8", "int8", "int32", "bool"]
    shape: tuple[Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)], ...]


class ImagePreprocess(FrozenModel):
    """Picture -> float32 [1, 3, H, W]: upright RGB, resized, placed in ``size``, then (x / 255 - mean) / std.

    resize  shortest   the short side becomes ``shortest``, the long side int(shortest * long / short); centre crop
            exact      both sides become ``size``
            letterbox  the largest size that fits ``size``, top left; the remaining area is ``pad`` (0-255)
            square     ``pad`` below or on the right makes a square, then both sides become ``size``
    resample  bicubic, bilinear   as Pillow: antialiased, rounded to 8 bits
              gaussian            a Gaussian of (shrink - 1) / 2 pixels, then bilinear; not rounded

    ``square`` needs ``gaussian`` and the reverse; neither works with ``in_graph``. With ``in_graph`` the graph does all
    of this; its input is the upright picture, uint8 [height, width, 3].
    """

    kind: Literal["image"] = "image"
    input: str = "pixels"
    in_graph: bool = Field(
        default=False, description="the graph prepares the picture: its input is uint8 [height, width, 3]"
    )
    size: tuple[int, int] = Field(description="height, width of the graph's input")
    resize: Literal["shortest", "exact", "letterbox", "square"] = "shortest"
    shortest: int | None = Field(default=None, description="short side in pixels, for resize = shortest")
    keep_square: bool = Field(default=False, description="a square picture is resized to `size`, without a crop")
    crop_offset: Literal["round", "floor"] = Field(
        default="round", description="half of an odd margin: torchvision rounds, transformers floors"
    )
    resample: Literal["bicubic", "bilinear", "gaussian"] = "bicubic"
    mean: Triple
    std: Triple
    pad: int = Field(default=0, ge=0, le=255)

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
                f"resize is {self.resize} and resample is {self.resample}; square and gaussian need each other"
            )
        if self.in_graph and self.resample == "gaussian":
            raise ValueError("resample = gaussian has no operator; `in_graph` must be false")
        if min(self.std) < 1e-3:
            raise ValueError(f"std {self.std} is in units of x / 255; each is at least 0.001")
        return self

    def feeds(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Input name -> dtype and shape."""
        if self.in_graph:
            return {self.input: ("uint8", ("height", "width", 3))}
        return {self.input: ("float32", ("B", 3, *self.size))}


QUERY = ("query",)  # the names of a prompt for what is searched for, in sentence-transformers' order
DOCUMENT = ("document", "passage", "corpus")  # and for what is searched


class TextPreprocess(FrozenModel):
    """Strings -> int64 [B, T] ids, and a mask if the graph takes one, from the bundle's tokenizer.json.

    ``clean``: open_clip's name for the cleaning (`calmclip.models.preprocess.clean`): HTML unescaped, white space
    joined, widths, ligatures and quotes simplified; ``lower`` also makes lower case. ``pad``: always to ``context``, or
    to the ``longest`` text of the batch, rounded up to a ``multiple`` of tokens, at most ``context``: texts of similar
    length then have one shape, and a server can batch them. ``truncate``: of a text of more than ``context`` tokens, if
    the request does not choose (`models.preprocess.truncation`); false is an error, true cuts it and keeps its last
    token.

    ``prompts``: name -> the words that go before a text, as in sentence-transformers; a request names one. The text
    takes the place of {} in a prompt that has it.
    ``pooled``: an input that is 1 for the tokens that are pooled, 0 for padding and for the tokens of the prompt.
    """

    kind: Literal["text"] = "text"
    tokenizer: Path = "tokenizer.json"
    clean: Literal["lower", "whitespace"] | None = None
    ids: str = "ids"
    mask: str | None = None
    context: int = Field(ge=1, le=65_536)
    pad: Literal["context", "longest"] = "longest"
    multiple: int = Field(default=1, ge=1, le=65_536, description="for pad = longest: the width is a multiple of it")
    pad_id: int = Field(default=0, ge=0, lt=2**31)
    truncate: bool | Literal["compress", "chunk"] = False
    prompts: Mapping[PromptName, Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(
        default_factory=dict, description="name -> the words that go before a text, or around {}"
    )
    prompt: str | None = Field(default=None, description="the name in `prompts` that a request has by default")
    pooled: str | None = Field(
        default=None, description="an input like `mask` that is 0 also for the tokens of the prompt"
    )

    @model_validator(mode="after")
    def _known_prompt(self) -> "TextPreprocess":
        if self.prompt is not None and self.prompt not in self.prompts:
            raise ValueError(f"prompt is {self.prompt!r}; expected one of {sorted(self.prompts)}, the names in prompts")
        if self.pooled and (around := [name for name, words in self.prompts.items() if "{}" in words]):
            raise ValueError(f"the prompt {around[0]!r} has {{}}; with `pooled` every prompt stands before the text")
        return self

    @model_validator(mode="after")
    def _one_width(self) -> "TextPreprocess":
        if self.pad == "context" and self.multiple != 1:
            raise ValueError(f"with pad = context, `multiple` must be 1; it is {self.multiple}. Use pad = longest")
        return self

    def width(self, longest: int) -> int:
        """The width of a batch whose longest text has ``longest`` tokens; at most ``context``."""
        if self.pad == "context":
            return self.context
        return min(self.context, -(-longest // self.multiple) * self.multiple)

    def feeds(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Input name -> dtype and shape."""
        width = self.context if self.pad == "context" else "T"
        return {name: ("int64", ("B", width)) for name in (self.ids, self.mask, self.pooled) if name}

    def prompt_text(self, name: str | None = None) -> str:
        """The words of the prompt ``name``; None: of the default, "" if there is none.

        Raises `BadRequest` that lists the names.
        """
        chosen = self.prompt if name is None else name
        if chosen is not None and chosen not in self.prompts:
            raise unknown_prompt(chosen, self.prompts)
        return "" if chosen is None else self.prompts[chosen]

    def prompt_for(self, names: Iterable[str]) -> str | None:
        """The first of ``names`` that is in `prompts`; else the default."""
        return next((name for name in names if name in self.prompts), self.prompt)


class VectorPreprocess(FrozenModel):
    """Vectors of another model, in place of texts -> float32 [B, dim].

    A bundle whose text tower is an adaptor over a language model (LLM2CLIP, ProCLIP) and does not hold that model reads
    what the model made of a text. With ``normalize`` the vectors are divided by their Euclidean length first.
    """

    kind: Literal["vector"] = "vector"
    input: str = "vectors"
    dim: int = Field(ge=1, le=MAX_DIM, description="numbers of a vector")
    normalize: bool = Field(default=True, description="vectors are made unit vectors before the graph reads them")
    model: str = Field(default="", max_length=MAX_PATH, description="the model that makes these vectors of texts")

    def feeds(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Input name -> dtype and shape."""
        return {self.input: ("float32", ("B", self.dim))}


class Graph(FrozenModel):
    """One ONNX file. ``batch``: the first dimension of every input and output counts independent rows.

    With ``preprocess`` the inputs are exactly its feeds, and perhaps `GUIDE`.
    """

    file: Path
    batch: bool = True
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = Field(min_length=1)
    preprocess: ImagePreprocess | TextPreprocess | VectorPreprocess | None = Field(default=None, discriminator="kind")

    @model_validator(mode="after")
    def _fed(self) -> "Graph":
        feeds = self.preprocess.feeds() if self.preprocess else {}
        if self.preprocess and sorted(feeds) != sorted(self.inputs.keys() - {GUIDE}):
            raise ValueError(f"preprocess makes the inputs {sorted(feeds)}; the graph takes {sorted(self.inputs)}")
        for name, (dtype, shape) in feeds.items():
            tensor = self.inputs[name]
            if tensor.dtype != dtype or not fits(shape, tensor.shape):
                raise ValueError(
                    f"preprocess makes {name!r} as {dtype} {list(shape)}; the graph takes {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        if self.batch and isinstance(self.preprocess, ImagePreprocess) and self.preprocess.in_graph:
            raise ValueError("a graph with `in_graph` takes one picture at a time; `batch` must be false")
        return self


class Source(FrozenModel):
    """The origin of the weights."""

    net: str
    model: str
    weights: Mapping[str, str] = Field(default_factory=dict, description="file or package -> sha256 of its weights")
    license: str
    notes: str = ""


class Ops(FrozenModel):
    """Custom operators of the graphs. Each is also a local function in the graph, so a plain runtime can run it."""

    domain: str = "ai.calmclip"
    version: int = 1
    used: tuple[str, ...] = ()


class Plugin(FrozenModel):
    """A name in a plug-in family, with its params and assets."""

    name: str
    params: Mapping[str, Any] = Field(default_factory=dict)
    assets: Mapping[str, Path] = Field(default_factory=dict)


class DefaultClassifier(FrozenModel):
    """The bundle's default classifier; `models.classifier.Classifier` is its type at run time."""

    labels: Path | None = Field(default=None, description="JSON list of strings, each once")
    templates: tuple[Template, ...] = Field(
        default=(), description="sentences with {} for the label; else the label alone"
    )
    descriptions: Path | None = Field(
        default=None, description="JSON object, label -> list of sentences that replace the templates"
    )
    head: Plugin | None = None
    temperature: Temperature = 1.0
    none_below: NoneBelow | None = None

    def paths(self) -> set[str]:
        """All files that it names."""
        files = {path for path in (self.labels, self.descriptions) if path}
        return files | {*(self.head.assets.values() if self.head else ())}


class Quantization(FrozenModel):
    """The quantizer of each graph; ``none`` for float."""

    name: str
    weights: str = ""
    activations: str = ""
    graphs: Mapping[str, str] = Field(default_factory=dict)
    calibration: Mapping[str, Any] = Field(default_factory=dict)


class SuppressionDefaults(FrozenModel):
    """The bundle's defaults for a detect request. An absent setting has calmclip's own default."""

    method: Method | None = None
    sigma: Sigma | None = None
    iou_threshold: IouThreshold | None = None
    min_score: MinScore | None = None
    max_output: MaxOutput | None = None
    per_class: PerClass | None = None


class SegmentationDefaults(FrozenModel):
    """The bundle's defaults for a segment request. An absent setting has calmclip's own default."""

    method: str | None = Field(default=None, description="a plug-in of the family segmenters")
    params: Mapping[str, Any] = Field(default_factory=dict, description="of the default method")
    background: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, description="words for what is none of the labels; empty: none"
    )
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="a pixel whose best label is less likely belongs to none"
    )


class AnomalyDefaults(FrozenModel):
    """The bundle's sentences of an anomaly request. An absent list has calmclip's own default."""

    thing: str | None = Field(default=None, max_length=MAX_CHARACTERS, description="what the pictures show")
    normal: tuple[Template, ...] = Field(default=(), description="phrases with {} of a thing without a fault")
    damaged: tuple[Template, ...] = Field(default=(), description="phrases with {} of a thing with a fault")
    templates: tuple[Template, ...] = Field(default=(), description="sentences with {} for the phrase")


class Fitted(FrozenModel):
    """What was fitted to this bundle for one method of the task explain. A word of weight w is expected to contribute
    ``expected`` w; its margin is what it contributes beyond that."""

    threshold: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        default=None, description="a word with a lower margin is flagged"
    )
    expected: Annotated[float, Field(ge=0, le=1)] = 0.0


class ExplainDefaults(FrozenModel):
    """The bundle's defaults for an explain request. An absent setting has calmclip's own default."""

    method: str | None = Field(default=None, description="the method of the task explain")
    fitted: Mapping[str, Fitted] = Field(default_factory=dict, description="by method")


class File(FrozenModel):
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)


class Manifest(FrozenModel):
    """`bundle.json`: all that a reader needs to feed the graphs and to read their outputs."""

    format: Literal[2] = 2
    name: Name
    precision: Literal["int8", "mixed", "float"]
    tasks: tuple[TaskName, ...] = Field(min_length=1)
    source: Source
    languages: tuple[Language, ...] = Field(
        default=(), description="BCP 47 tags of the languages that its texts may have; empty: not stated"
    )
    family: str | None = Field(
        default=None, pattern=_SHA256, description="the same for the float and the INT8 bundle of one export"
    )
    graphs: Mapping[str, Graph] = Field(min_length=1, description="by role")
    ops: Ops = Ops()
    portable: bool = Field(
        default=False, description="every graph has operators of ai.onnx alone and no local function"
    )
    classifier: DefaultClassifier | None = Field(default=None, description="the default of a request")
    suppression: SuppressionDefaults | None = Field(default=None, description="the defaults of a detect request")
    segmentation: SegmentationDefaults | None = Field(default=None, description="the defaults of a segment request")
    anomaly: AnomalyDefaults | None = Field(default=None, description="the sentences of an anomaly request")
    explain: ExplainDefaults | None = Field(default=None, description="the defaults of an explain request")
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="ascending lengths of prefixes that are embeddings themselves (Matryoshka)",
    )
    quantization: Quantization
    created: str = Field(description="UTC, ISO 8601")
    files: Mapping[Path, File] = Field(default_factory=dict, description="all files except bundle.json")

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.files and (absent := sorted(self.named_files() - self.files.keys())):
            raise ValueError(f"named but not listed under `files`: {', '.join(absent)}")
        if list(self.dimensions) != sorted(set(self.dimensions)):
            raise ValueError(f"`dimensions` is {list(self.dimensions)}; expected ascending numbers, each once")
        return self

    def named_files(self) -> set[str]:
        """The files that a key other than `files` names: graphs, tokenizers, and what the classifier needs."""
        paths = {graph.file for graph in self.graphs.values()}
        paths |= {g.preprocess.tokenizer for g in self.graphs.values() if isinstance(g.preprocess, TextPreprocess)}
        return paths | (self.classifier.paths() if self.classifier else set())


def unknown_prompt(name: str, prompts: Iterable[str]) -> BadRequest:
    known = sorted(prompts)
    if not known:
        return BadRequest(f"prompt_name is {name[:80]!r}; this bundle has no prompts, so leave it out")
    return BadRequest(f"prompt_name is {name[:80]!r}; expected one of {', '.join(known)}", known=known)


def fits(shape: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    """Whether the ranks are equal, and all dimensions that are fixed in both."""
    return len(shape) == len(other) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(shape, other, strict=True)
    )


# format, from `OLDEST` on -> the function that upgrades a manifest to the next format
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def parse(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``; ``where`` names it in errors.

    Raises `BundleTooNew` for a format above `FORMAT`, `BundleInvalid` for all other faults.
    """
    try:
        data = json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{where} is not JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise BundleInvalid(f"{where} is {kind(data)}; expected an object")
    number = data.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BundleInvalid(f"{where}: `format` is {number!r}; expected a whole number from {OLDEST} to {FORMAT}")
    if number > FORMAT:
        raise BundleTooNew(
            f"{where} has format {number}; this calmclip reads up to {FORMAT}. Install a newer calmclip."
        )
    if number < OLDEST:
        raise BundleInvalid(
            f"{where} has format {number}, older than the first release; this calmclip reads from {OLDEST} on. Export "
            "the checkpoint again."
        )
    for step in range(number, FORMAT):
        data = UPGRADES[step](data)
    try:
        return Manifest.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise BundleInvalid(f"{where}: {explain(error)}") from None


def explain(error: ValidationError, most: int = 5) -> str:
    """pydantic's findings on one line: for each its path and its message."""
    findings = error.errors(include_url=False, include_input=False)
    lines = [
        f"{'.'.join(map(str, e['loc'])) or 'manifest'}: "
        + ("unknown key" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, "))
        for e in findings[:most]
    ]
    return "; ".join(lines) + (f"; and {len(findings) - most} more" if len(findings) > most else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key is an error, because readers differ in which value they take."""
    if len(data := dict(pairs)) < len(pairs):
        ((key, times),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} appears {times} times")
    return data


def _finite(number: str) -> float:
    """NaN and Infinity are not JSON; 1e999 is infinite too."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:80]} is not a finite number")
    return value


def schema() -> str:
    """JSON Schema of the manifest, for other languages."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
