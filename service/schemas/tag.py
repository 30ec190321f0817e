"""Request and response of /v1/tag."""

from typing import Any, Literal

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.tag import MAX_TOP, Tag, Tags
from calmclip.service.schemas import Answer, PicturesBody, Template, round_score
from calmclip.service.schemas.detect import Box


class TagBody(PicturesBody):
    words: list[str] = Field([], fail_fast=True, description="words to choose from; default: calmclip's vocabulary")
    templates: list[Template] = Field(
        [], fail_fast=True, description="sentences of a word, with a {}; default: the word alone"
    )
    top: int = Field(10, ge=1, le=MAX_TOP, description="at most so many tags of the picture, and of its regions")
    regions: bool = Field(True, description="look at regions too, if the bundle can")


class TagAnswer(Answer):
    word: str
    index: int = Field(description="position in the words")
    score: float = Field(description="the cosine after soft-NMS: lower if a better tag of the same or nearly the same "
                         "word covers the same place")  # fmt: skip
    cosine: float = Field(description="of the vectors of the word and of the picture or region, 0 to 1")

    @classmethod
    def fields(cls, tag: Tag) -> dict[str, Any]:
        return {
            "word": tag.word, "index": tag.index, "score": round_score(tag.score), "cosine": round_score(tag.cosine),
        }  # fmt: skip


class RegionTagAnswer(TagAnswer):
    box: Box


class TagsAnswer(Answer):
    model: str
    tags: list[TagAnswer] = Field(description="of the whole picture, best first")
    regions: list[RegionTagAnswer] = Field(description="of its regions, best first; empty if the bundle has none")
    caption: str
    captioned_by: Literal["template", "graph"] = Field(
        description="template: the best tags in a fixed sentence; graph: the bundle's captioner"
    )

    @classmethod
    def of(cls, body: TagBody, bundle: Bundle, tags: Tags) -> "TagsAnswer":
        return cls.model_construct(
            model=bundle.name,
            tags=[TagAnswer.model_construct(**TagAnswer.fields(t)) for t in tags.picture],
            regions=[
                RegionTagAnswer.model_construct(**TagAnswer.fields(t), box=Box.of(t.box))
                for t in tags.regions
                if t.box is not None
            ],
            caption=tags.caption,
            captioned_by=tags.captioned_by,
        )
