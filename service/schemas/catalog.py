"""Responses of /v1/models and of the health probes."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.service.schemas import Answer
from calmclip.service.schemas.detect import SuppressionAsked


class SegmentationAsked(Answer):
    """What a segment request gets that sets nothing."""

    methods: list[str] = Field(description="plug-ins of the family segmenters for this bundle, the default first")
    background: list[str]
    threshold: float


class ExplanationAsked(Answer):
    """What an explain request gets that sets nothing."""

    methods: list[str] = Field(description="those that the bundle has the graphs for, the default first")
    threshold: float = Field(description="of the default method")


class ModelSummary(Answer):
    name: str
    digest: str = Field(description="sha256 of bundle.json")
    embedding_digest: str | None = Field(
        description="sha256 of what embeds: bundles with the same one make the same vectors; null: it does not embed"
    )
    family: str = Field(description="the float and the INT8 bundle of one export have the same family")
    tasks: list[str]
    languages: list[str] = Field(
        description="BCP 47 tags of the languages that its texts may have; empty: the bundle does not say"
    )
    precision: str
    dim: int | None
    dimensions: list[int] = Field(
        description="the lengths that a request may ask for, ascending; the last is `dim`; empty: it does not embed"
    )
    labels: int = Field(description="number of labels in the bundle")
    suppression: SuppressionAsked | None = Field(
        description="the defaults of a detect request; null: the bundle does not detect"
    )
    segmentation: SegmentationAsked | None = Field(
        description="the defaults of a segment request; null: the bundle does not segment"
    )
    explanation: ExplanationAsked | None = Field(
        description="the defaults of an explain request; null: the bundle does not explain"
    )
    examples: int = Field(description="largest number of examples in a detect request; 0: the bundle takes none")


class OpenAIModel(Answer):
    """A bundle as OpenAI describes a model."""

    id: str = Field(description="the bundle's name, which is the `model` of a request")
    object: Literal["model"] = "model"
    created: int = Field(description="when it was exported, in seconds since 1970")
    owned_by: str = Field(description="always calmclip")

    @classmethod
    def of(cls, bundle: Bundle) -> "OpenAIModel":
        return cls(id=bundle.name, created=_seconds(bundle.manifest.created), owned_by="calmclip")


def _seconds(date: str) -> int:
    """Of a date of ISO 8601; without a zone it is in UTC. 0 for another text: a manifest is not checked for it."""
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


class ModelsAnswer(Answer):
    models: list[ModelSummary] = Field(description="in load order: the first that serves a task is its default")
    object: Literal["list"] = "list"
    data: list[OpenAIModel] = Field(description="the same bundles in OpenAI's format")


class ModelAnswer(OpenAIModel):
    name: str
    digest: str
    manifest: dict[str, Any] = Field(description="bundle.json")
    report: dict[str, Any] | None = Field(description="report.json: what the export measured")


class HealthAnswer(Answer):
    status: Literal["ok"]


class ReadyAnswer(Answer):
    ready: bool
    loaded: list[str]
    failed: dict[str, str] = Field(description="bundle -> why it did not load; with an entry the service is not ready")
    degraded: dict[str, str] = Field(description="the store or a collection -> why it is not served")
