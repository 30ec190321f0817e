"""`Recipe`: the checkpoint, the quantizers, and the bars to pass. Frozen; read from flags and TOML."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights, hub, read
from calmclip.export.checkpoints.locate import SUFFIXES
from calmclip.export.nets import NETS, Net, NetPlugin
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.rewrites import REWRITES, image_to_pixels, swaps
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess, Name
from calmclip.models.errors import BadRequest, UnknownCheckpoint, suggestion
from calmclip.models.evals import EVALS, measure
from calmclip.models.tasks import embedding


class Quantize(FrozenModel):
    """A quantizer and its params. ``none`` leaves a graph in float."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class Calibration(FrozenModel):
    """The inputs that ranges are observed on, that a search measures on, and that the bundle is measured on. They are
    always different ones (`calibrate.Parts`). Without ``images`` and ``texts``: the net's recorded ranges if they fit,
    else the samples that ship."""

    images: Path | None = None
    texts: Path | None = Field(default=None, description="one text per line; or vectors, .npy or .npz")
    count: int = Field(
        default=192, ge=24, description="largest number of pictures, and of texts, for calibration and search together"
    )
    seed: int = 0


class Bars(FrozenModel):
    """A bundle below one of these is not sealed."""

    max_float_error: float = Field(default=1e-4, description="torch against float ONNX, largest absolute difference")
    min_image_cosine: float = Field(default=0.95, description="mean cosine of INT8 and float picture vectors")
    min_text_cosine: float = Field(default=0.97, description="the same for texts")
    min_output_cosine: float = Field(default=0.9, description="the same for every output of every quantized graph")
    min_int8_coverage: float | None = Field(default=None, description="INT8 part of the multiply-accumulates, 0 to 1")
    max_size_ratio: float | None = Field(default=None, description="INT8 bundle's bytes per byte of the float bundle")
    max_megabytes: float | None = None

    def cosine(self, role: str) -> float:
        """The bar of the graph ``role``."""
        bar = {"image": self.min_image_cosine, "text": self.min_text_cosine}.get(role, 0.0)
        return max(bar, self.min_output_cosine)


class Recipe(FrozenModel):
    checkpoint: str
    net: str
    name: Name = Field(
        max_length=57, description="bundles are NAME-int8 (or -mixed, or -float) and, with keep_float, NAME-float"
    )
    preset: str | None = Field(default=None, description="quantizer of every graph that `quantize` does not name")
    quantize: dict[str, Quantize] = Field(
        default_factory=dict, description="role of a graph -> its quantizer; default: the net's choice"
    )
    rewrites: tuple[str, ...] = Field(
        default_factory=swaps, description="rules that replace standard ops by ours; [] for none"
    )
    picture_input: bool = Field(
        default=False,
        description="image graphs take decoded pictures, one at a time, and prepare them (op ImageToPixels)",
    )
    portable: bool = Field(
        default=False, description="standard ONNX operators alone, for other engines; excludes rewrites, picture_input"
    )
    weights: Weights = Weights()
    adapters: tuple[Adapt, ...] = Field(default=(), description="changes of the net before it is traced, in this order")
    calibration: Calibration = Calibration()
    evals: dict[str, Path] = Field(
        default_factory=dict, description="name of an eval -> its data, measured in float and in INT8 for the report"
    )
    bars: Bars = Bars()
    dimensions: tuple[int, ...] = Field(
        default=(), description="lengths of prefixes that are embeddings themselves (Matryoshka): the manifest's key"
    )
    keep_float: bool = False
    replace: bool = False

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """A portable recipe has no rewrites. Raises `BadRequest` if it names one, or has pictures as input."""
        if not (isinstance(data, dict) and data.get("portable")):
            return data
        for key in ("rewrites", "picture_input"):
            if data.get(key):
                raise BadRequest(
                    f"recipe: portable and {key} = {data[key]} are set; expected one of them, because {key} puts "
                    f"operators of ours into the graphs. Leave {key} out, or export without portable"
                )
        return data | {"rewrites": ()}

    def public(self) -> dict[str, Any]:
        """The recipe as a report shows it: file and folder names, without their directories on this machine, and
        without what changes no bundle."""
        data = self.model_dump(mode="json", exclude={"replace", "keep_float"})
        data["checkpoint"] = hub.name(Path(self.checkpoint))
        data["adapters"] = [adapter.public() for adapter in self.adapters]
        data["evals"] = {name: path.name for name, path in self.evals.items()}
        data["calibration"] |= {k: p.name for k in ("images", "texts") if (p := getattr(self.calibration, k))}
        return data


def recognise(checkpoint: str) -> tuple[str, NetPlugin]:
    """The net that reads ``checkpoint``. Raises `UnknownCheckpoint` naming the nets that were tried."""
    for name in sorted(NETS.names(), key=lambda name: name != checkpoint):  # a built-in net before it imports others
        plugin = NETS.get(name)
        if plugin.recognise(checkpoint):
            return name, plugin
    tried = f"tried: {', '.join(NETS.names())}. The built-in one is 'mini'."
    if not Path(checkpoint).exists():
        raise UnknownCheckpoint(f"{checkpoint!r} is no directory and no built-in model; {tried}")
    names = sorted(read(checkpoint).names)
    raise UnknownCheckpoint(
        f"no net recognises {checkpoint!r}, whose {len(names)} tensors include {', '.join(names[:3])}; {tried}"
    )


def load_weights(file: Path | None = None, **flags: Any) -> Weights:
    """The recipe's `Weights`, which a net is loaded with: from the TOML ``file``, then ``flags`` that are not None.

    Raises `BadRequest` naming the key that does not fit.
    """
    data = _merge(_toml(file).get("weights", {}), {key: value for key, value in flags.items() if value is not None})
    try:
        return Weights.model_validate(data)
    except ValidationError as error:
        raise _bad(error, "weights.") from None


def load_adapters(file: Path | None = None) -> tuple[Adapt, ...]:
    """The adapters in the TOML ``file``. Raises `BadRequest` naming the key that does not fit."""
    try:
        return TypeAdapter(tuple[Adapt, ...]).validate_python(_toml(file).get("adapters", ()))
    except ValidationError as error:
        raise _bad(error, "adapters.") from None


def load_recipe(checkpoint: str, net_name: str, net: Net, file: Path | None = None, **flags: Any) -> Recipe:
    """Defaults of the net (after its adapters), then the TOML ``file``, then ``flags`` that are not None.

    Raises `BadRequest` naming the key that does not fit.
    """
    data: dict[str, Any] = {"bars": dict(net.bars), "keep_float": net.keep_float}
    data = _merge(data, _toml(file))
    data = _merge(data, {key: value for key, value in flags.items() if value is not None})
    parts = (_name(checkpoint), net.variant, "portable" if data.get("portable") else "")
    data.setdefault("name", "-".join(filter(None, parts)))
    data |= {"checkpoint": checkpoint, "net": net_name}
    try:
        recipe = Recipe.model_validate(data)
        if recipe.preset:
            preset = Quantize(name=recipe.preset)
            quantized = [role for role, tower in net.towers.items() if not tower.borrows]
            recipe = recipe.model_copy(update={"quantize": dict.fromkeys(quantized, preset) | recipe.quantize})
        for role, how in recipe.quantize.items():
            if role not in net.towers:
                raise BadRequest(
                    f"recipe: quantize.{role}: {net.name} has no such graph; {suggestion(role, net.towers)}"
                )
            QUANTIZERS.get(how.name).params.model_validate(how.params)
        for name, path in recipe.evals.items():  # before the export, which may take minutes
            if (task := EVALS.get(name).task) not in net.tasks:
                served = ", ".join(net.tasks)
                raise BadRequest(f"recipe: evals.{name}: it measures {task}, but {net.name} serves {served}")
            measure.read(name, path)
        _check_dimensions(recipe.dimensions, net)
        for name in recipe.rewrites:
            if REWRITES.get(name).attaches:
                raise BadRequest(
                    f"recipe: rewrites: {name} attaches an op to a graph; a net or picture_input asks for it. Expected "
                    f"here: {', '.join(swaps())}"
                )
        for tower in net.towers.values():
            if recipe.picture_input and isinstance(tower.preprocess, ImagePreprocess):
                image_to_pixels.inside(tower.preprocess)  # raises if the op cannot do this preprocessing
    except ValidationError as error:
        raise _bad(error) from None
    return recipe


def _check_dimensions(dimensions: Sequence[int], net: Net) -> None:
    """Raises `BadRequest` unless the numbers are ascending, and below the length of the net's vectors."""
    if not dimensions:
        return
    if "embed" not in net.tasks:
        raise BadRequest(f"recipe: dimensions: {net.name} serves {', '.join(net.tasks)}, not embed; leave them out")
    dim = min(embedding(role, tower)[1] for role, tower in net.towers.items() if role in ("image", "text"))
    if list(dimensions) != sorted({*dimensions}) or not 1 <= dimensions[0] <= dimensions[-1] < dim:
        given = ", ".join(map(str, dimensions))
        raise BadRequest(f"recipe: dimensions is {given}; expected ascending numbers below {dim}, the vectors' length")


def _name(checkpoint: str) -> str:
    """A bundle's name, from the name of a directory or a file, without the suffix of weights."""
    name = hub.short(Path(checkpoint)).lower()
    name = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("._-")


def _toml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"recipe {file} cannot be read: {error}") from None


def _bad(error: ValidationError, prefix: str = "") -> BadRequest:
    first = error.errors()[0]
    return BadRequest(f"recipe: {prefix}{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
