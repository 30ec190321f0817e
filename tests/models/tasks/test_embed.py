"""embed over invented vectors: order, one call for all texts, one for each picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import seal, stage
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadImage, BadRequest
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.runner import Runner
from calmclip.models.tasks.embed import Embeddings, EmbedRequest, document_prompt, embed, query_prompt
from calmclip.models.tasks.features import labels

Png = Callable[..., bytes]
Write = Callable[[Path], Manifest]


def run(bundle: Bundle, inputs: Sequence[str | bytes]) -> tuple[Embeddings, list[Call]]:
    """The n-th picture is [n, 0, 0], the n-th text [0, n, 0]."""
    calls: list[Call] = []

    def answer(call: Call) -> Arrays:
        calls.append(call)
        pictures = sum(c.graph == "image" for c in calls)
        if call.graph == "image":
            return {"image_embeds": np.array([[pictures, 0, 0]], np.float32)}
        return {"text_embeds": np.array([[0, n + 1, 0] for n in range(len(call.feeds["ids"]))], np.float32)}

    return drive(embed(bundle, EmbedRequest(inputs)), answer), calls


def test_answers_keep_the_order_of_the_inputs(bundle: Bundle, png: Png):
    embeddings, calls = run(bundle, [png("red"), "red", png("blue"), "green blue"])
    assert embeddings.vectors.tolist() == [[1, 0, 0], [0, 1, 0], [2, 0, 0], [0, 2, 0]]
    assert embeddings.vectors.dtype == np.float32
    assert embeddings.tokens == 3
    assert [(c.graph, c.keys) for c in calls] == [("text", ("red", "green blue")), ("image", None), ("image", None)]


def test_texts_alone_make_one_call_and_pictures_alone_none_for_text(bundle: Bundle, png: Png):
    texts, calls = run(bundle, ["red", "blue"])
    assert [c.graph for c in calls] == ["text"]
    assert calls[0].feeds["ids"].tolist() == [[2], [4]]
    assert texts.tokens == 2
    pictures, calls = run(bundle, [png("red")])
    assert [c.graph for c in calls] == ["image"]
    assert pictures.tokens == 0


def test_empty_and_invalid_inputs_are_refused(bundle: Bundle, png: Png):
    with pytest.raises(BadRequest, match="no inputs were given"):
        run(bundle, [])
    with pytest.raises(BadRequest, match="text 1 is empty"):
        run(bundle, ["red", "", png("red")])
    with pytest.raises(BadImage):
        run(bundle, ["red", b"no picture"])


def prompted(colours: dict[str, Any], write: Write, directory: Path, **text: Any) -> Bundle:
    colours["graphs"]["text"]["preprocess"] |= {"prompts": {"query": "red ", "document": "blue "}, **text}
    with stage(directory, "prompted") as staged:
        return Bundle(seal(staged, write(staged)))


def test_a_prompt_goes_before_every_text(colours: dict[str, Any], write: Write, tmp_path: Path):
    """Each row of the graph is the sum of the words: red, green and blue are the axes."""
    runner = Runner(prompted(colours, write, tmp_path, prompt="document"))
    wanted = {"query": [1, 1, 0], "document": [0, 1, 1], None: [0, 1, 1]}
    for name, row in [*wanted.items(), *wanted.items()]:  # the second time from the cache
        vectors = runner.embed(texts=["green", "green"], prompt_name=name)
        assert vectors == pytest.approx(np.array([row, row]) / 2**0.5, abs=1e-6)
    answer = runner.ask("embed", EmbedRequest(["green blue"], "query"))
    assert answer.tokens == 3
    assert runner.run(labels(runner.bundle, Classifier(("green",)))) == pytest.approx(np.array([[0, 1, 1]]) / 2**0.5)


def test_no_prompt_and_text_hit_the_row_of_another(colours: dict[str, Any], write: Write, tmp_path: Path):
    """Only the words before the text differ: "4:red green" is no row of the prompt "red " and the text "green"."""
    runner = Runner(prompted(colours, write, tmp_path))
    runner.embed(texts=["green"], prompt_name="query")
    assert runner.embed(texts=["4:red green"]) == pytest.approx(np.array([[1, 1, 0]]) / 2**0.5)
    assert runner.embed(texts=["green"]).tolist() == [[0, 1, 0]]
    calls: list[Call] = []

    def answer(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": np.zeros((1, 3), np.float32)}

    for text, name in (("green", "query"), ("red green", None)):  # a mean may leave out the prompt
        drive(embed(runner.bundle, EmbedRequest([text], name)), answer)
    assert calls[0].feeds["ids"].tolist() == calls[1].feeds["ids"].tolist()
    assert calls[0].keys != calls[1].keys


def test_the_names_of_prompts_for_search(colours: dict[str, Any], write: Write, tmp_path: Path):
    bundle = prompted(colours, write, tmp_path / "a")
    assert (query_prompt(bundle), document_prompt(bundle)) == ("query", "document")
    others = {"passage": "a", "corpus": "b", "other": "c"}
    bundle = prompted(colours, write, tmp_path / "b", prompts=others, prompt="other")
    assert (query_prompt(bundle), document_prompt(bundle)) == ("other", "passage")
    bundle = prompted(colours, write, tmp_path / "c", prompts={}, prompt=None)
    assert (query_prompt(bundle), document_prompt(bundle)) == (None, None)


def test_an_unknown_prompt_lists_the_names(colours: dict[str, Any], write: Write, tmp_path: Path, png: Png):
    bundle = prompted(colours, write, tmp_path / "a")
    for inputs in (["red"], [png("red")]):
        with pytest.raises(BadRequest, match=r"^prompt_name is 'querry'; expected one of document, query$") as error:
            drive(embed(bundle, EmbedRequest(inputs, "querry")), lambda call: {})
        assert error.value.known == ["document", "query"]
    bundle = prompted(colours, write, tmp_path / "b", prompts={})
    with pytest.raises(BadRequest, match="this bundle has no prompts, so leave it out"):
        drive(embed(bundle, EmbedRequest(["red"], "query")), lambda call: {})
    del colours["graphs"]["text"]
    del colours["classifier"]
    colours["tasks"] = ["embed"]
    with stage(tmp_path / "c", "pictures") as staged:
        manifest = write(staged)
        (staged / "text.onnx").unlink()
        (staged / "tokenizer.json").unlink()
        pictures = Bundle(seal(staged, manifest))
    with pytest.raises(BadRequest, match="this bundle has no prompts, so leave it out"):
        drive(embed(pictures, EmbedRequest([png("red")], "query")), lambda call: {})
    assert (query_prompt(pictures), document_prompt(pictures)) == (None, None)
