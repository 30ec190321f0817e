"""`Training`: all that a training is, in one frozen record; a TOML file, flags, or both say it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from calmclip.export.towers.attention import GateKind, Softmax
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest

STATE, LOG = "training.pt", "training.jsonl"  # in a training's directory
Objective = Literal["mlm", "clm", "classes", "contrastive"]
DATA = {"mlm": ("text",), "clm": ("text",), "classes": ("pictures",), "contrastive": ("captions", "pictures")}


def _softmax(text: str) -> str:
    try:
        return str(Softmax.parse(text))
    except BadRequest as error:
        raise ValueError(str(error)) from None


class Training(FrozenModel):
    objective: Objective = Field(
        description="mlm: masked words, BERT; clm: the next token, OPT; classes: ViT; contrastive: CLIP"
    )
    text: Path | None = Field(None, description="one document a line")
    pictures: Path | None = Field(
        None, description="a folder for each class; of contrastive, the folder of its pictures"
    )
    captions: Path | None = Field(None, description="captions by picture, as `calmclip align` takes them")
    start: Path | None = Field(None, description="a checkpoint to go on from; without it the net is new")
    tokenizer: Path | None = Field(None, description="a tokenizer.json; without it one is made of the texts")

    softmax: Annotated[str, AfterValidator(_softmax)] = Field("vanilla", description="or clipped(gamma:zeta)")
    gate: GateKind = "none"
    gate_start: float = Field(
        0.5, gt=0, lt=1, description="where a new gate starts; with `start` 1 / it multiplies the gate"
    )
    gate_hidden: int | None = Field(None, ge=1, description="of the gate mlp: default a quarter of a head, at least 4")

    layers: int = Field(6, ge=1)
    width: int = Field(128, ge=1)
    heads: int = Field(4, ge=1)
    inner: int | None = Field(None, ge=1, description="of the MLP; default four times the width")
    spread: float = Field(0.02, gt=0, description="standard deviation of new weights; of a CLIP transformers' own")
    length: int = Field(64, ge=4, description="tokens in a row")
    words: int = Field(4096, ge=300, description="tokens in a new vocabulary")
    side: int = Field(32, ge=1, description="of pictures, in pixels")
    patch: int = Field(4, ge=1)

    steps: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1)
    rate: float = Field(1e-3, gt=0, description="the largest learning rate; it rises to it and falls to 0 in lines")
    warmup: int = Field(400, ge=0)
    decay: float = Field(0.1, ge=0, description="of weights (AdamW); not of biases, nor of norms without `decay_norms`")
    decay_norms: bool = False
    beta2: float = Field(0.999, gt=0, lt=1)
    clip: float = Field(1.0, gt=0, description="of the gradient's norm")
    masked: float = Field(0.15, gt=0, lt=1, description="of mlm: the share of tokens that is asked for")
    held_out: float = Field(0.02, gt=0, lt=1, description="the share that is not trained on")
    every: int = Field(500, ge=1, description="steps between two lines of the log; the state is saved with each")
    bfloat16: bool = Field(False, description="products in bfloat16: quicker on processors that have it")
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if absent := [name for name in DATA[self.objective] if getattr(self, name) is None]:
            raise ValueError(f"{self.objective} needs {' and '.join(absent)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the {self.heads} heads")
        if self.side % self.patch:
            raise ValueError(f"side {self.side} is no multiple of the patch, {self.patch}")
        return self


def training(**given: Any) -> Training:
    """Raises `BadRequest` naming the key that does not fit."""
    try:
        return Training.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"training: {where + ': ' if where else ''}{first['msg']}") from None
