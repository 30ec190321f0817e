"""Request and response of /v1/anomaly; one format of the answer is a PNG file."""

import base64
from typing import Literal

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.anomaly import Anomaly, Method
from calmclip.service.schemas import Answer, PictureBody, Template, round_score
from calmclip.service.schemas.detect import Size

PHRASES = "with a {} for the thing"


class AnomalyBody(PictureBody):
    thing: str = Field("", description="what the picture shows, such as 'bottle'; default: the bundle's, else 'object'")
    normal: list[Template] = Field(
        [], fail_fast=True, description=f"phrases of a thing without a fault, {PHRASES}; default: the bundle's"
    )
    damaged: list[Template] = Field(
        [], fail_fast=True, description=f"phrases of a thing with a fault, {PHRASES}; default: the bundle's"
    )
    templates: list[Template] = Field(
        [], fail_fast=True, description="sentences, with a {} for the phrase; default: the bundle's"
    )
    classifier: str | None = Field(None, min_length=1, description="a classifier that is fitted to normal pictures")
    method: Method | None = Field(None, description="default: the best that the bundle and the classifier allow")
    threshold: float | None = Field(
        None, ge=0, le=1, description="a picture with a higher score is damaged; default: the classifier's"
    )
    format: Literal["json", "png"] = Field("json", description="png: the answer is the heat map alone, as a PNG file")


class AnomalyAnswer(Answer):
    model: str
    method: Method = Field(description="the one that answered")
    image: Size
    score: float = Field(description="0 to 1, higher is more damaged; scores of two methods cannot be compared")
    threshold: float | None = Field(description="of the verdict; null: none is known")
    damaged: bool | None = Field(description="whether the score is above the threshold; null without one")
    heat: str = Field(
        description="where: a PNG file in base64, as large as the upright picture; black, red, yellow, white"
    )

    @classmethod
    def of(cls, bundle: Bundle, anomaly: Anomaly) -> "AnomalyAnswer":
        return cls.model_construct(
            model=bundle.name,
            method=anomaly.method,
            image=Size.model_construct(width=anomaly.width, height=anomaly.height),
            score=round_score(anomaly.score),
            threshold=anomaly.threshold,
            damaged=anomaly.is_damaged,
            heat=base64.b64encode(anomaly.png()).decode(),
        )
