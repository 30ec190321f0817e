"""Request and response of /v1/explain."""

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.explain import AUTO, METHODS, Explanation, Word
from calmclip.service.schemas import Answer, PictureBody, round_score


class ExplainBody(PictureBody):
    caption: str = Field(description="a sentence about the picture")
    method: str = Field(
        AUTO,
        description="how contributions are computed; auto: the bundle's, else the first that it has the graphs for",
        json_schema_extra={"enum": [AUTO, *METHODS]},
    )
    threshold: float | None = Field(
        None, ge=-1, le=1, description="a word with a lower margin is flagged; default: the bundle's for the method"
    )


class ExplainedWord(Answer):
    text: str
    start: int = Field(description="of its first character in the caption, in code points")
    end: int = Field(description="after its last character")
    contribution: float = Field(
        description="positive: the word brings the caption nearer to the picture; values of two methods cannot be "
        "compared"
    )
    margin: float = Field(
        description="the contribution, less what a word that fits and means as much for the caption would contribute; "
        "equal to the contribution if nothing is expected"
    )
    flagged: bool = Field(description="whether the margin is below the threshold, and the word is no function word")

    @classmethod
    def of(cls, word: Word) -> "ExplainedWord":
        return cls.model_construct(
            text=word.text,
            start=word.start,
            end=word.end,
            contribution=round_score(word.contribution),
            margin=round_score(word.margin),
            flagged=word.flagged,
        )


class ExplainAnswer(Answer):
    model: str
    method: str = Field(description="the one that answered")
    threshold: float = Field(description="of the margins; a word with a lower one is flagged")
    score: float = Field(description="the cosine of picture and caption, -1 to 1")
    clip_score: float = Field(description="CLIPScore: 2.5 times the score, at least 0")
    f_score: float = Field(
        description="CLIPScore plus 2.5 times the sum of the negative contributions; function words do not count"
    )
    words: list[ExplainedWord] = Field(description="in the caption's order")
    lowest: int | None = Field(
        description="position in `words` of the lowest margin; null: all words are function words"
    )
    flagged: list[str] = Field(description="the flagged words, in the caption's order")

    @classmethod
    def of(cls, body: ExplainBody, bundle: Bundle, explanation: Explanation) -> "ExplainAnswer":
        return cls.model_construct(
            model=bundle.name,
            method=explanation.method,
            threshold=explanation.threshold,
            score=round_score(explanation.score),
            clip_score=round_score(explanation.clip_score),
            f_score=round_score(explanation.f_score),
            words=[ExplainedWord.of(word) for word in explanation.words],
            lowest=explanation.lowest,
            flagged=[word.text for word in explanation.flagged],
        )
