"""Requests and responses of /v1/classifiers."""

from typing import Annotated, Any

from pydantic import Field

from calmclip.models.classifier import Classifier
from calmclip.models.labels import NoneBelow, Temperature
from calmclip.models.tasks.calibrate import Calibration
from calmclip.service.classifiers import Registered
from calmclip.service.schemas import MIB, Answer, Body, Picture, Template, round_score
from calmclip.service.settings import MAX_TEXTS


class KnownPicture(Body):
    image: Picture
    label: str = Field(description="the correct one of the classifier's labels")


class CalibrateBody(Body):
    model: str | None = Field(None, description="the bundle to calibrate with; default: the first that classifies")
    items: list[KnownPicture] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class FitBody(CalibrateBody):
    head: str = Field(description="a plug-in of the family heads that can be fitted")
    params: dict[str, Any] = Field({}, description="the head's parameters")


class HeadBody(Body):
    name: str = Field(description="a plug-in of the family heads")
    params: dict[str, Any] = Field({}, description="the head's parameters")


class ClassifierBody(Body):
    max_bytes = MIB

    labels: list[str] = Field(min_length=1, fail_fast=True)
    templates: list[Template] = Field([], fail_fast=True, description="default: the bundle's")
    descriptions: dict[str, Annotated[list[str], Field(min_length=1, fail_fast=True)]] = Field(
        {}, description="label -> sentences that replace the templates for this label"
    )
    head: HeadBody | None = Field(
        None, description="default: the bundle's; a head with arrays of its own is fitted, not sent"
    )
    temperature: Temperature = 1.0
    none_below: NoneBelow | None = None

    def classifier(self) -> Classifier:
        """Raises `BadRequest`."""
        head: dict[str, Any] = {"head": self.head.name, "params": self.head.params} if self.head else {}
        return Classifier(
            tuple(self.labels),
            tuple(self.templates),
            {label: tuple(lines) for label, lines in self.descriptions.items()},
            temperature=self.temperature,
            none_below=self.none_below,
            **head,
        )


class ClassifierAnswer(Answer):
    name: str
    version: int = Field(description="counts the changes")
    labels: list[str]
    templates: list[str]
    descriptions: dict[str, list[str]]
    head: str | None = Field(description="null: the bundle's head")
    params: dict[str, Any] = Field(description="the head's parameters")
    temperature: Temperature
    none_below: NoneBelow | None
    family: str | None = Field(
        description="the family of bundles (see /v1/models) that it was fitted or calibrated with; null: any"
    )
    fitted: bool = Field(description="whether its head has arrays of its own, and so works only with its family")

    @classmethod
    def of(cls, registered: Registered) -> "ClassifierAnswer":
        content = {key: value for key, value in registered.content().items() if key != "assets"}
        return cls.model_construct(version=registered.version, fitted=bool(registered.assets), **content)


class CalibrationErrorsAnswer(Answer):
    """Of the scores of the request's pictures (Guo et al. 2017)."""

    expected_calibration_error: float = Field(
        description="mean distance between the score of the best label and how often it is right, in 15 bins; 0 to 1"
    )
    negative_log_likelihood: float = Field(description="mean of -ln of the probability that the head gives the truth")


class CalibratedAnswer(ClassifierAnswer):
    pictures: int = Field(description="how many chose the temperature")
    before: CalibrationErrorsAnswer = Field(description="errors at the temperature that the classifier had")
    after: CalibrationErrorsAnswer = Field(description="errors at its new temperature")

    @classmethod
    def of_fit(cls, registered: Registered, fitted: Calibration) -> "CalibratedAnswer":
        before, after = (
            CalibrationErrorsAnswer.model_construct(
                expected_calibration_error=round_score(side.expected_calibration_error),
                negative_log_likelihood=round_score(side.negative_log_likelihood),
            )
            for side in (fitted.before, fitted.after)
        )
        plain = vars(ClassifierAnswer.of(registered))
        return cls.model_construct(**plain, pictures=fitted.pictures, before=before, after=after)


class ClassifiersAnswer(Answer):
    classifiers: list[ClassifierAnswer]
