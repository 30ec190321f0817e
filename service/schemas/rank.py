"""Request and response of /v1/rank."""

from typing import ClassVar

from pydantic import Field, model_validator

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.rank import Ranks, Scale
from calmclip.service.schemas import Answer, Body, Picture, round_score
from calmclip.service.settings import MAX_TEXTS


class RankBody(Body):
    """In a form each `images` is a file."""

    form: ClassVar[bool] = True

    model: str | None = Field(None, description="a loaded bundle; default: the first that serves the task")
    images: list[Picture] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
    instruction: str | None = Field(None, description="what the first pictures should show; or send `classifier`")
    classifier: str | None = Field(None, min_length=1, description="a registered classifier")
    label: str | None = Field(None, description="of the classifier; default: its first")
    top: int | None = Field(None, ge=1, description="number of pictures in the answer; default: all")

    @model_validator(mode="after")
    def _one_judge(self) -> "RankBody":
        if (self.instruction is None) == (self.classifier is None):
            raise ValueError("expected `instruction` or `classifier`, one of them")
        if self.label is not None and self.classifier is None:
            raise ValueError("expected `classifier` beside `label`")
        return self


class RankedPictureAnswer(Answer):
    index: int = Field(description="position in the request's pictures, from 0")
    score: float


class RankAnswer(Answer):
    model: str
    scale: Scale = Field(
        description="what a score is. cosine: of the vectors of picture and instruction, -1 to 1. logit: of the "
        "classifier's head for the label, before temperature. learned: of the bundle's graph `rank`, of any size. A "
        "score depends on its picture alone"
    )
    pictures: list[RankedPictureAnswer] = Field(description="best first; ties in the order of the request")

    @classmethod
    def of(cls, body: RankBody, bundle: Bundle, ranks: Ranks) -> "RankAnswer":
        rows = [RankedPictureAnswer.model_construct(index=p.index, score=round_score(p.score)) for p in ranks]
        return cls.model_construct(model=bundle.name, scale=ranks.scale, pictures=rows)
