"""Texts -> shorter texts: whole sentences that stay near the vector of the whole, within a budget of tokens."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Flow, Together
from calmclip.models.labels import listed
from calmclip.models.tasks import TASKS, Command, Task
from calmclip.models.tasks.compression import Compressed, check_budget
from calmclip.models.tasks.features import Driver, compression


@dataclass(frozen=True)
class CompressRequest:
    """``budget``: the most tokens of an answer, with special tokens; None: the context of the text graph."""

    texts: Sequence[str]
    budget: int | None = None


def compress(bundle: Bundle, request: CompressRequest) -> Flow[list[Compressed]]:
    """One answer for each text. Raises `TaskNotServed`, `BadRequest` (no texts, a budget out of range, an empty text),
    `TextTooLong`."""
    bundle.require("compress")
    texts = listed("texts", request.texts)
    if not texts:
        raise BadRequest("no texts were given; expected at least one")
    preparer = bundle.text()
    budget = preparer.spec.context if request.budget is None else request.budget
    check_budget(budget)
    for index, text in enumerate(texts):  # before a graph runs
        preparer.checked(text, index)
    distinct = dict.fromkeys(texts)
    answers = yield Together([compression(bundle, text, budget) for text in distinct])
    by_text = {text: answer for text, (answer, _) in zip(distinct, answers, strict=True)}
    return [by_text[text] for text in texts]


def example(bundle: Bundle, picture: bytes) -> CompressRequest:
    return CompressRequest(
        ["A small red thing lies on a table. A thing is a thing. Nobody has seen it since then."], 16
    )


def _options(options: ArgumentParser) -> None:
    options.add_argument("--text", action="append", default=[], help="a text; may be given many times")
    options.add_argument("--budget", type=int, metavar="TOKENS", help="of each answer; default: the model's context")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    texts = [*options.text, *map(_read, options.pictures)]
    for (answer,) in driver.map(compress(driver.bundle, CompressRequest([text], options.budget)) for text in texts):
        yield {**asdict(answer), "ratio": answer.ratio}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} cannot be read as UTF-8 text: {error}; name a text file") from None


def _line(answer: dict[str, Any]) -> str:
    figures = f"{answer['tokens']} of {answer['tokens_before']} tokens, cosine {answer['cosine']:.3f}"
    kept = f"{len(answer['kept'])} of {answer['sentences']} sentences{', the last one cut' if answer['cut'] else ''}"
    return f"{answer['text']}\n({figures}; {kept})"


TASKS.register("compress")(
    Task(
        name="compress",
        summary="texts -> their sentences that stay near the vector of the whole, within a budget of tokens",
        request=CompressRequest,
        flow=compress,
        example=example,
        roles={"text": TextPreprocess},
        follows="embed",
        command=Command(_options, _answers, _line),
    )
)
