"""Request and response of /v1/compress."""

from collections.abc import Sequence

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.compression import LEAST_BUDGET, MOST_BUDGET, Compressed
from calmclip.service.schemas import Answer, Body, round_score
from calmclip.service.settings import MAX_TEXTS


class CompressBody(Body):
    model: str | None = Field(None, description="a loaded bundle; default: the first that embeds texts")
    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
    budget: int | None = Field(
        None,
        ge=LEAST_BUDGET,
        le=MOST_BUDGET,
        description="the most tokens of each answer, with special tokens; default: as many as the model reads",
    )


class CompressedText(Answer):
    text: str = Field(description="sentences of the text in their order; the text itself if it is within the budget")
    tokens: int = Field(description="of the answer, with special tokens")
    tokens_before: int = Field(description="of the text that was sent")
    ratio: float = Field(description="tokens / tokens_before")
    cosine: float = Field(description="of the vectors of the answer and of the whole, -1 to 1")
    kept: list[int] = Field(description="positions of the sentences that were kept, from 0")
    sentences: int = Field(description="number of sentences of the text that was sent")
    cut: bool = Field(description="every sentence exceeds the budget: the answer is the first words of one")

    @classmethod
    def of(cls, compressed: Compressed) -> "CompressedText":
        return cls.model_construct(
            text=compressed.text,
            tokens=compressed.tokens,
            tokens_before=compressed.tokens_before,
            ratio=round_score(compressed.ratio),
            cosine=round_score(compressed.cosine),
            kept=list(compressed.kept),
            sentences=compressed.sentences,
            cut=compressed.cut,
        )


class CompressAnswer(Answer):
    model: str
    texts: list[CompressedText] = Field(description="in the order of the texts")

    @classmethod
    def of(cls, body: CompressBody, bundle: Bundle, texts: Sequence[Compressed]) -> "CompressAnswer":
        return cls.model_construct(model=bundle.name, texts=[CompressedText.of(text) for text in texts])
