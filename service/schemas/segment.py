"""Request and response of /v1/segment; one format of the answer is a PNG file."""

import base64
from typing import Annotated, Any, Literal

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.segmenters import Windows, default
from calmclip.models.tasks.segment import MAX_BACKGROUND, Segment, Segments
from calmclip.service.schemas import Answer, LabelledPicture, round_score
from calmclip.service.schemas.detect import Box, Size

Share = Annotated[float, Field(ge=0.1, le=1)]


class SegmentBody(LabelledPicture):
    method: str | None = Field(
        None, min_length=1, description="a plug-in of the family segmenters; default: the bundle's, see /v1/models"
    )
    params: dict[str, Any] = Field({}, description="of the method; default: the bundle's, else the method's own")
    background: list[str] | None = Field(
        None,
        max_length=MAX_BACKGROUND,
        fail_fast=True,
        description="words for what is none of the labels; empty: each pixel has a label; default: the bundle's",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a pixel whose label is less likely has none; default: the bundle's, or 0.5 with `independent`",
    )
    independent: bool = Field(
        False, description="compare each label with the background alone, so that masks may overlap"
    )
    window: Share | None = Field(
        None,
        description="look at overlapping windows, with this part of the picture's shorter side as their side; default: "
        "the whole picture at once",
    )
    stride: Share = Field(Windows.stride, description="of `window`: between neighbours, as a part of the window")
    format: Literal["rle", "png", "indexed"] = Field(
        "rle",
        description="of the masks. rle: run lengths as COCO writes them; png: a PNG of each label in base64; indexed: "
        "the answer is one PNG, with 1 + the label's index as the value of a pixel",
    )

    def windows(self) -> Windows | None:
        return None if self.window is None else Windows(self.window, self.stride)


class RunLengths(Answer):
    """A mask as COCO writes it, for `pycocotools.mask.decode`."""

    size: list[int] = Field(min_length=2, max_length=2, description="height and width of the upright picture")
    counts: str = Field(description="lengths of runs down the columns, compressed as in COCO")


class MaskPart(Answer):
    """A connected component of a mask."""

    score: float = Field(description="mean probability in it, after soft-NMS")
    box: Box


class SegmentedLabel(Answer):
    label: str
    index: int = Field(description="position in the request's labels")
    score: float = Field(description="mean over the mask of the label's probability")
    area: int = Field(description="pixels of the mask")
    boxes: list[MaskPart] = Field(description="of its connected components, best first")
    rle: RunLengths | None = Field(description="the mask; null with another `format`")
    png: str | None = Field(
        description="the mask, white on black, as a PNG file in base64; null with another `format`",
    )

    @classmethod
    def of(cls, segment: Segment, *, png: bool) -> "SegmentedLabel":
        return cls.model_construct(
            label=segment.label,
            index=segment.index,
            score=round_score(segment.score),
            area=segment.area,
            boxes=[
                MaskPart.model_construct(score=round_score(score), box=Box.of(box))
                for score, box in zip(segment.box_scores.tolist(), segment.boxes, strict=True)
            ],
            rle=None if png else RunLengths.model_construct(**segment.mask.rle()),
            png=base64.b64encode(segment.mask.png()).decode() if png else None,
        )


class SegmentAnswer(Answer):
    model: str
    method: str = Field(description="the one that answered")
    image: Size
    segments: list[SegmentedLabel] = Field(description="best first; a label without a pixel is left out")

    @classmethod
    def of(cls, body: SegmentBody, bundle: Bundle, segments: Segments) -> "SegmentAnswer":
        return cls.model_construct(
            model=bundle.name,
            method=body.method or default(bundle.manifest),
            image=Size.model_construct(width=segments.width, height=segments.height),
            segments=[SegmentedLabel.of(each, png=body.format == "png") for each in segments],
        )
