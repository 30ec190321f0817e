"""Request and response of /v1/detect."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array
from calmclip.models.suppression import DEFAULT, IouThreshold, MaxOutput, Method, MinScore, PerClass, Sigma, Suppression
from calmclip.models.tasks.detect import Detections, Example, default_suppression
from calmclip.models.tasks.regions import Grid
from calmclip.service.schemas import Answer, Body, LabelledPictures, Picture, PixelBox, PixelBoxes, round_score

Parts = Annotated[list[Annotated[float, Field(ge=0.02, le=1)]], Field(min_length=1, max_length=16, fail_fast=True)]
Ratios = Annotated[list[Annotated[float, Field(ge=0.02, le=10)]], Field(min_length=1, max_length=16, fail_fast=True)]


class ExampleBody(Body):
    """A picture of the object to find. In a form it is a file."""

    image: Picture
    box: PixelBox | None = Field(
        None, description="the object's box: x0, y0, x1, y1 in pixels of the upright picture; default: what stands out"
    )
    label: str | None = Field(None, min_length=1, description="its name in the answer; default: 'example N'")

    @model_validator(mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        if isinstance(value, bytes):
            return {"image": value}
        if not isinstance(value, dict):
            raise ValueError('expected {"image": {"b64": …}}, with or without `box` and `label`; in a form, a file')
        return value


class GridBody(Body):
    """Windows of several sizes and shapes that slide over the picture."""

    sizes: Parts = Field([*Grid().sizes], description="sides of squares as parts of the picture's shorter side")
    ratios: Ratios = Field([*Grid().ratios], description="width to height: each makes the squares wider or higher")
    stride: float = Field(Grid().stride, ge=0.1, le=1, description="between neighbours, as a part of the window")


class DetectBody(LabelledPictures):
    """The defaults of the suppression fields apply if the bundle has none of its own."""

    examples: list[ExampleBody] = Field(
        [], fail_fast=True, description="pictures of objects to find, in addition to labels or instead of them"
    )
    boxes: PixelBoxes | None = Field(
        None, description="the regions to search instead of proposals: x0, y0, x1, y1 in pixels of the upright picture"
    )
    grid: GridBody | None = Field(None, description="search windows instead of proposals; not beside `boxes`")
    method: Method = DEFAULT.method
    sigma: Sigma = DEFAULT.sigma
    iou_threshold: IouThreshold = DEFAULT.iou_threshold
    min_score: MinScore = DEFAULT.min_score
    max_output: MaxOutput = DEFAULT.max_output
    per_class: PerClass = DEFAULT.per_class

    def suppression(self, default: Suppression) -> Suppression:
        """``default``, with the fields that the request sets."""
        sent = vars(default).keys() & self.model_fields_set
        return replace(default, **{name: getattr(self, name) for name in sent})

    def task_grid(self) -> Grid | None:
        return None if self.grid is None else Grid(self.grid.sizes, self.grid.ratios, self.grid.stride)

    def task_examples(self) -> list[Example]:
        return [Example(example.image, example.box, example.label) for example in self.examples]


class Box(Answer):
    """Pixels of the original upright picture, continuous coordinates: x1 - x0 is the width."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def of(cls, box: Array) -> "Box":
        return cls.model_construct(
            **{side: round(x, 2) for side, x in zip(cls.model_fields, box.tolist(), strict=True)}
        )


class DetectedBox(Answer):
    label: str
    index: int = Field(description="position in the request's labels; examples are counted after the labels")
    score: float = Field(description="after suppression")
    raw_score: float = Field(description="before suppression")
    box: Box


class Size(Answer):
    width: int
    height: int


@dataclass(frozen=True)
class SuppressionAsked(Suppression):
    """How overlapping boxes are suppressed: the fields of a detect request."""

    __pydantic_config__ = ConfigDict(json_schema_serialization_defaults_required=True)  # an answer has every field


@dataclass(frozen=True, kw_only=True)
class SuppressionUsed(SuppressionAsked):
    candidates: Annotated[int, Field(description="number of box-label pairs before suppression")]
    kept: int


class DetectAnswer(Answer):
    model: str
    image: Size
    detections: list[DetectedBox] = Field(description="best first")
    suppression: SuppressionUsed

    @classmethod
    def of(cls, body: DetectBody, bundle: Bundle, detections: Detections) -> "DetectAnswer":
        return cls.model_construct(
            model=bundle.name,
            image=Size.model_construct(width=detections.width, height=detections.height),
            detections=[
                DetectedBox.model_construct(
                    label=d.label,
                    index=d.index,
                    score=round_score(d.score),
                    raw_score=round_score(d.raw_score),
                    box=Box.of(d.box),
                )
                for d in detections
            ],
            suppression=SuppressionUsed(
                **vars(body.suppression(default_suppression(bundle))),
                candidates=detections.candidates,
                kept=len(detections.detections),
            ),
        )
