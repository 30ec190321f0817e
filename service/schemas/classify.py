"""Request and response of /v1/classify."""

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.labels import NoneBelow, Temperature
from calmclip.models.tasks.classify import Ranking
from calmclip.service.schemas import Answer, LabelledPicture, round_score


class ClassifyBody(LabelledPicture):
    top_k: int | None = Field(None, ge=1, description="number of labels in the answer; default: all")
    temperature: Temperature | None = Field(None, description="default: the classifier's, else 1")
    none_below: NoneBelow | None = Field(None, description="default: the classifier's, if it has one")


class RankedLabel(Answer):
    label: str
    index: int = Field(description="position in the request's labels")
    score: float = Field(description="from the head: a softmax over the labels, or a sigmoid per label")
    cosine: float = Field(description="cosine of picture and label, before the temperature")


class ClassifyAnswer(Answer):
    model: str
    temperature: float = Field(description="the temperature of these scores")
    labels: list[RankedLabel] = Field(description="best first")
    none_of_these: bool | None = Field(description="whether every score is below `none_below`; null without one")

    @classmethod
    def of(cls, body: ClassifyBody, bundle: Bundle, ranking: Ranking) -> "ClassifyAnswer":
        return cls.model_construct(
            model=bundle.name,
            temperature=ranking.temperature,
            labels=[
                RankedLabel.model_construct(
                    label=r.label, index=r.index, score=round_score(r.score), cosine=round_score(r.cosine)
                )
                for r in ranking
            ],
            none_of_these=ranking.none,
        )
