"""Requests and responses of /v1/classifiers."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.heads import HEADS
from calmclip.models.labels import NoneBelow, Temperature
from calmclip.models.preprocess.vectors import label_rows
from calmclip.models.stored_classifier import CLASSIFIER, Registered
from calmclip.models.tasks.calibrate import Calibration
from calmclip.models.tasks.fit import MAX_CROPS
from calmclip.service.schemas import MIB, Answer, Body, Picture, Template, VectorLists, round_score
from calmclip.service.settings import MAX_TEXTS

Descriptions = dict[str, Annotated[list[str], Field(min_length=1, fail_fast=True)]]


class KnownPicture(Body):
    image: Picture
    label: str = Field(description="the correct one of the classifier's labels")


class CalibrateBody(Body):
    model: str | None = Field(None, description="the bundle to calibrate with; default: the first that classifies")
    items: list[KnownPicture] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class ShownPicture(KnownPicture):
    label: str = Field(description="what it shows")
    caption: str | None = Field(None, description="a sentence about it, for a method that reads captions")


class FitBody(Body):
    """In a form every file is a picture, and the name of its field is its label. A field `caption` belongs to the file
    before it. The other fields are those below, except for `validation` and `unlabelled`."""

    form: ClassVar[bool] = True

    method: str = Field(description="a plug-in of the family heads that can be fitted")
    params: dict[str, Any] = Field({}, description="the method's; default: chosen by the pictures")
    model: str | None = Field(
        None,
        description="default: the first bundle that serves the method's task, or the bundle that filled the collection",
    )
    labels: list[str] = Field(
        [],
        fail_fast=True,
        description="default: those of the items, in the order of their first use; of a collection, in their order",
    )
    templates: list[Template] = Field([], fail_fast=True, description="default: the bundle's")
    descriptions: Descriptions = Field({}, description="label -> sentences that replace the templates for this label")
    items: list[ShownPicture] = Field([], max_length=MAX_TEXTS, fail_fast=True)
    collection: str | None = Field(
        None, min_length=1, description="without items: the stored vectors of this collection are used"
    )
    label: str | None = Field(
        None,
        min_length=1,
        description="the field of the metadata that holds an item's label; others are left out",
    )
    validation: list[KnownPicture] = Field(
        [],
        max_length=MAX_TEXTS,
        fail_fast=True,
        description="they choose the params and measure the accuracy; default: cross-validation over the items",
    )
    unlabelled: list[Picture] = Field(
        [], max_length=MAX_TEXTS, fail_fast=True, description="pictures without a label, for a method that reads them"
    )
    words: list[str] = Field([], fail_fast=True, description="the vocabulary of a method that explains itself")
    augment: int = Field(0, ge=0, le=MAX_CROPS, description="random crops of each item that are used, too")
    replace: bool = Field(False, description="a classifier of this name is replaced; without it, that is a 409")

    @model_validator(mode="after")
    def _one_source(self) -> "FitBody":
        if (bool(self.items) or bool(self.unlabelled)) == (self.collection is not None):
            raise ValueError("expected pictures (`items`, `unlabelled`) or a `collection`, one of them")
        if (self.collection is None) != (self.label is None):
            raise ValueError("expected `collection` and `label` together")
        of_pictures = [name for name in ("validation", "augment") if getattr(self, name)]
        if self.collection and of_pictures:
            raise ValueError(f"`{of_pictures[0]}` needs pictures, and a collection has vectors; leave it out")
        return self

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        plain = []
        for key, value in pairs:
            if isinstance(value, bytes):
                items.append({"image": value, "label": key})
            elif key != "caption":
                plain.append((key, value))
            elif not items or "caption" in items[-1]:
                raise BadRequest("a `caption` of the form does not follow a picture; expected it after its picture")
            else:
                items[-1]["caption"] = value
        fields = super().of_pairs(plain)
        return {**fields, "items": [*fields.get("items", []), *items]} if items else fields


class HeadBody(Body):
    name: str = Field(description="a plug-in of the family heads")
    params: dict[str, Any] = Field({}, description="the head's parameters")


class ClassifierBody(Body):
    model_config = ConfigDict(  # some labels or some label vectors
        json_schema_extra={"not": {"properties": {"labels": {"maxItems": 0}, "label_vectors": {"maxProperties": 0}}}}
    )
    max_bytes = 32 * MIB  # 256 labels, each with one vector of 4096 numbers, which JSON writes in 20 characters or more

    labels: list[str] = Field([], fail_fast=True, description="default: those of `label_vectors`")
    templates: list[Template] = Field([], fail_fast=True, description="default: the bundle's")
    descriptions: Descriptions = Field({}, description="label -> sentences that replace the templates for this label")
    label_vectors: VectorLists = Field(
        {}, description="label -> vectors in place of its sentences, for bundles that read vectors of another model"
    )
    head: HeadBody | None = Field(
        None, description="default: the bundle's; a head with arrays of its own is fitted, not sent"
    )
    temperature: Temperature = 1.0
    none_below: NoneBelow | None = None

    @model_validator(mode="after")
    def _labels_and_one_kind_of_sentences(self) -> "ClassifierBody":
        if not self.labels and not self.label_vectors:
            raise ValueError("expected `labels`, or `label_vectors`")
        if self.label_vectors and (self.templates or self.descriptions):
            raise ValueError("`label_vectors` stand in place of sentences; leave out `templates` and `descriptions`")
        return self

    def classifier(self) -> Classifier:
        """Raises `BadRequest`."""
        head: dict[str, Any] = {"head": self.head.name, "params": self.head.params} if self.head else {}
        return Classifier(
            tuple(self.labels or self.label_vectors),
            tuple(self.templates),
            {label: tuple(lines) for label, lines in self.descriptions.items()},
            label_vectors=label_rows(self.label_vectors),
            temperature=self.temperature,
            none_below=self.none_below,
            **head,
        )


class FitReportAnswer(Answer):
    method: str
    pictures: int = Field(description="labelled ones")
    labels: int
    before: float | None = Field(description="accuracy of zero-shot; null if no picture could be held out")
    after: float | None = Field(description="accuracy of the fitted head on the same pictures")
    measured: str = Field(description="on which pictures; they also chose the params")
    params: dict[str, Any] = Field(description="the head's parameters, with those that were chosen")
    seconds: float = Field(description="of the fit, without the graphs")
    notes: list[str] = Field(description="what the method says")


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
    vector_dim: int | None = Field(description="numbers of each of its label vectors; null: it has texts")
    family: str | None = Field(
        description="the family of bundles (see /v1/models) that it was fitted or calibrated with; null: any"
    )
    fitted: bool = Field(description="whether its head has arrays of its own, and so works only with its family")
    report: FitReportAnswer | None = Field(description="of its fit; null for one that was not fitted")

    @classmethod
    def of(cls, registered: Registered) -> "ClassifierAnswer":
        report = registered.report and FitReportAnswer.model_construct(**vars(registered.report))
        return cls.model_construct(
            name=registered.name,
            version=registered.version,
            vector_dim=next((rows.shape[1] for rows in registered.classifier.label_vectors.values()), None),
            fitted=bool(registered.arrays),
            report=report,
            **{key: getattr(registered.classifier, key) for key in CLASSIFIER},
        )


class FittedAnswer(ClassifierAnswer):
    skipped: int = Field(description="items of the collection without a text in the field that is one of the labels")

    @classmethod
    def of_fit(cls, registered: Registered, skipped: int) -> "FittedAnswer":
        return cls.model_construct(**vars(ClassifierAnswer.of(registered)), skipped=skipped)


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


class MethodAnswer(Answer):
    name: str
    labels: int | None = Field(description="the number of labels that it takes; null: any from 2 on")
    names: list[str] = Field(description="the only labels that it takes; the first needs a picture; empty: any")
    task: str = Field(description="of the bundle, and of the requests that use the classifier: classify or anomaly")
    reads: list[str] = Field(description="what else it uses: captions, unlabelled, words")


class ClassifiersAnswer(Answer):
    classifiers: list[ClassifierAnswer]
    methods: list[MethodAnswer] = Field(description="the heads that can be fitted")

    @classmethod
    def of(cls, registered: Iterable[Registered]) -> "ClassifiersAnswer":
        heads = [(name, HEADS.get(name).fit) for name in HEADS.names()]
        methods = [
            MethodAnswer.model_construct(
                name=name, labels=fit.labels, names=[*fit.names], task=fit.task, reads=[*fit.reads]
            )
            for name, fit in heads
            if fit
        ]
        return cls.model_construct(classifiers=[*map(ClassifierAnswer.of, registered)], methods=methods)
