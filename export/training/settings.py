"""`Training` and `Distillation`: all settings of a training in one frozen record, read from a TOML file, from flags, or
from both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from calmclip.export.gates import MEAN, GateKind
from calmclip.models.bundle.frozen import FrozenModel, Language
from calmclip.models.errors import BadRequest

STATE, LOG = "training.pt", "training.jsonl"  # in a training's directory
S = TypeVar("S", bound="Schedule")
Objective = Literal["mlm", "clm", "classes", "contrastive"]
DATA = {"mlm": ("text",), "clm": ("text",), "classes": ("pictures",), "contrastive": ("captions", "pictures")}


def _softmax(text: str) -> str:
    from calmclip.export.towers.attention import Softmax  # with torch, which no help text needs

    try:
        return str(Softmax.parse(text))
    except BadRequest as error:
        raise ValueError(str(error)) from None


class Schedule(FrozenModel):
    """The settings that every training has; `calmclip.export.training.loop` reads no others."""

    steps: int = Field(default=10_000, ge=1)
    batch: int = Field(default=32, ge=1)
    rate: float = Field(default=1e-3, gt=0, description="largest learning rate; linear warmup, then linear decay to 0")
    warmup: int = Field(default=400, ge=0)
    decay: float = Field(
        default=0.1, ge=0, description="weight decay (AdamW), not for biases; for norms with `decay_norms`"
    )
    decay_norms: bool = False
    beta2: float = Field(default=0.999, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    held_out: float = Field(
        default=0.02, gt=0, lt=1, description="the fraction of the data that measures instead of training"
    )
    every: int = Field(default=500, ge=1, description="steps between lines of the log; each saves the state")
    bfloat16: bool = Field(default=False, description="products in bfloat16: faster on processors that support it")
    seed: int = 0


class Training(Schedule):
    objective: Objective = Field(
        description="mlm: masked words, BERT; clm: the next token, OPT; classes: ViT; contrastive: CLIP"
    )
    text: Path | None = Field(default=None, description="one document a line")
    pictures: Path | None = Field(
        default=None, description="one folder per class; for contrastive, the folder of the pictures"
    )
    captions: Path | None = Field(default=None, description="captions per picture, in the format of `calmclip align`")
    start: Path | None = Field(default=None, description="a checkpoint to continue from; without it the net is new")
    tokenizer: Path | None = Field(default=None, description="a tokenizer.json; without it one is trained on the texts")

    softmax: Annotated[str, AfterValidator(_softmax)] = Field(
        default="vanilla", description="vanilla or clipped(gamma:zeta)"
    )
    gate: GateKind = Field(
        default="none",
        description="of attention; linear_mean and mlp_mean average their logits over tokens, not in clm",
    )
    gate_start: float = Field(
        default=0.5, gt=0, lt=1, description="value of a new gate; with `start`, the gate is divided by it"
    )
    gate_hidden: int | None = Field(
        default=None, ge=1, description="width of the gate mlp; default a quarter of a head, at least 4"
    )

    penalty: float = Field(
        default=0.0, ge=0, description="weight of the mean square of the MLPs' outputs; for a net that has outliers"
    )

    layers: int = Field(default=6, ge=1)
    width: int = Field(default=128, ge=1)
    heads: int = Field(default=4, ge=1)
    inner: int | None = Field(default=None, ge=1, description="width of the MLP; default four times `width`")
    spread: float = Field(
        default=0.02, gt=0, description="standard deviation of new weights; a CLIP uses transformers' own"
    )
    length: int = Field(default=64, ge=4, description="tokens in a row")
    words: int = Field(default=4096, ge=300, description="tokens in a new vocabulary")
    side: int = Field(default=32, ge=1, description="side of pictures, in pixels")
    patch: int = Field(default=4, ge=1)

    masked: float = Field(default=0.15, gt=0, lt=1, description="mlm: the fraction of tokens to predict")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if absent := [name for name in DATA[self.objective] if getattr(self, name) is None]:
            raise ValueError(f"{self.objective} needs {' and '.join(absent)}; set it by a flag or in --settings")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the {self.heads} heads; change one of them")
        if self.side % self.patch:
            raise ValueError(f"side {self.side} is no multiple of the patch, {self.patch}; change one of them")
        if self.objective == "clm" and self.gate.endswith(MEAN):
            raise ValueError(
                f"the gate {self.gate} averages over all tokens of a text, also those that clm predicts; expected a "
                f"gate for each token, such as {self.gate.removesuffix(MEAN)}"
            )
        return self


PARALLEL = '{"en": "a dog", "de": "ein Hund"} a line: one text in several languages'


class Distillation(Schedule):
    texts: Path = Field(description="one text a line; with `pictures`, captions in the format of `calmclip align`")
    parallel: Path | None = Field(default=None, description=f"a .jsonl file, {PARALLEL}")
    pictures: Path | None = Field(default=None, description="the folder of the captions' pictures")
    source: Language = Field(default="en", description="the language of `parallel` that the teacher reads")
    projection: bool = Field(
        default=False, description="train one layer on top of the student's vectors, and leave its encoder as it is"
    )
    share: float = Field(default=0.5, ge=0, lt=1, description="the part of a batch that is drawn from `parallel`")
    feature_steps: int = Field(
        default=300, ge=0, description="steps of the first stage; `steps` are those of the second"
    )
    feature_weight: float = Field(default=1.0, ge=0, description="of the SmoothL1 loss in the second stage")
    picture_weight: float = Field(default=0.5, ge=0, description="of the loss between texts and pictures")
    soft: float = Field(
        default=0.3, ge=0, lt=1, description="the part of a target that goes to texts like the right one"
    )
    soft_temperature: float = Field(default=0.05, gt=0)
    steps: int = Field(default=600, ge=1)
    batch: int = Field(default=256, ge=2)
    warmup: int = Field(default=30, ge=0)
    decay: float = Field(default=0.02, ge=0, description="weight decay (AdamW), not for biases")
    every: int = Field(default=100, ge=1, description="steps between lines of the log; each saves the state")


def training(**settings: Any) -> Training:
    """Raises `BadRequest`, which names the key that does not fit."""
    return checked(Training, settings)


def checked(model: type[S], settings: Mapping[str, Any]) -> S:
    """Raises `BadRequest`, which names the key that does not fit."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(": ".join(("training", *map(str, first["loc"]), first["msg"]))) from None
