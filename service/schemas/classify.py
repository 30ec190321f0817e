"""Request and response of /v1/classify."""

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.labels import NoneBelow, Temperature
from calmclip.models.tasks.attributes import MAX_SHOWN, MIN_TAU, Attributes, Inferred
from calmclip.models.tasks.classify import Ranking
from calmclip.service.schemas import Answer, LabelledPictures, TextLists, VectorLists, round_score


class ClassifyBody(LabelledPictures):
    top_k: int | None = Field(None, ge=1, description="number of labels in the answer; default: all")
    temperature: Temperature | None = Field(None, description="default: the classifier's, else 1")
    none_below: NoneBelow | None = Field(None, description="default: the classifier's, if it has one")
    attributes: TextLists = Field(
        {},
        description="attribute -> its values; the picture's are inferred, and each label is scored beside them",
        examples=[{"background": ["on land", "on water"], "time": ["by day", "at night"]}],
    )
    tau: float | None = Field(
        None, ge=MIN_TAU, description="of `attributes`: a larger value makes their distribution flatter; default 1"
    )
    with_labels: bool | None = Field(
        None, description="of `attributes`: whether the labels enter their inference; default true"
    )
    descriptions: TextLists = Field(
        {},
        description="label -> sentences that replace the templates for this label; with `alpha`, see there",
        examples=[{"a cat": ["a cat with whiskers", "a cat with pointed ears"], "a dog": ["a dog with a collar"]}],
    )
    label_vectors: VectorLists = Field(
        {},
        description="label -> vectors in place of its sentences, for a bundle that reads vectors of another model; "
        "`labels` may select some. It excludes `classifier`, `templates`, `descriptions`, `attributes` and `alpha`",
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of picture and templates; the rest is of the descriptions and the regions of the picture",
    )

    def inference(self) -> Attributes | None:
        """The attributes, if there are some. Raises `BadRequest`."""
        options = {name: value for name in ("tau", "with_labels") if (value := getattr(self, name)) is not None}
        if self.attributes:
            return Attributes(self.attributes, **options)
        if options:
            raise BadRequest(f"the request has {' and '.join(options)} but no `attributes`; expected both or neither")
        return None


class RankedLabel(Answer):
    label: str
    index: int = Field(description="position in the request's labels")
    score: float = Field(description="from the head: a softmax over the labels, or a sigmoid per label")
    cosine: float = Field(description="cosine of picture and label, before the temperature")


class CompositeAnswer(Answer):
    text: str = Field(description="a value of each attribute, joined by commas")
    probability: float


class ClassifyAnswer(Answer):
    model: str
    temperature: float = Field(description="the temperature of these scores")
    labels: list[RankedLabel] = Field(description="best first")
    none_of_these: bool | None = Field(description="whether every score is below `none_below`; null without one")
    attributes: dict[str, dict[str, float]] | None = Field(
        None, description="attribute -> value -> its probability for this picture; null without `attributes`"
    )
    composites: list[CompositeAnswer] | None = Field(
        None,
        description=f"all attributes together, best first; null without `attributes` or for more than {MAX_SHOWN}",
    )

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
            attributes=ranking.inferred and _marginals(ranking.inferred),
            composites=ranking.inferred and _composites(ranking.inferred),
        )


def _marginals(inferred: Inferred) -> dict[str, dict[str, float]]:
    return {
        name: {value: round_score(part) for value, part in values.items()}
        for name, values in inferred.marginals.items()
    }


def _composites(inferred: Inferred) -> list[CompositeAnswer] | None:
    if inferred.composites is None:
        return None
    return [
        CompositeAnswer.model_construct(text=text, probability=round_score(part)) for text, part in inferred.composites
    ]
