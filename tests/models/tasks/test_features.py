"""Labels -> one unit vector each: sentences, the mean of unit vectors; texts in slices of nearly one length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import seal, stage
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.errors import TextTooLong
from calmclip.models.flow import Array, Arrays, Cached, CacheGet, CachePut, Call, Walk, drive, no_cache
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.tasks.features import labels, texts, unit


class Rows:
    """A driver that answers cache requests. ``rows``: (graph, key) -> outputs."""

    def __init__(self, rows: dict[tuple[str, str], Arrays]) -> None:
        self.rows, self.requests = rows, 0

    def __call__(self, request: CacheGet | CachePut) -> Cached:
        self.requests += 1
        if isinstance(request, CacheGet):
            return {key: self.rows[request.graph, key] for key in request.keys if (request.graph, key) in self.rows}
        assert request.size == len(request.outputs["vectors"])
        self.rows[request.graph, request.key] = request.outputs
        return {}


def answered(call: Call) -> Arrays:
    """The words' counts of each row: what the graph answers before its normalization."""
    return {"text_embeds": (call.feeds["ids"][:, :, None] == [[[2, 3, 4]]]).sum(axis=1).astype(np.float32)}


def counts(sentences: list[str]) -> list[list[int]]:
    return [[line.split().count(word) for word in ("red", "green", "blue")] for line in sentences]


def embedded(bundle: Bundle, names: list[str], rows: Any, **more: Any) -> tuple[Array, Call]:
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": np.array(rows, np.float32)}

    vectors = drive(labels(bundle, Classifier(tuple(names), **more)), run)
    (call,) = calls
    return vectors, call


def test_a_head_with_vectors_of_its_own_embeds_no_text(bundle: Bundle):
    """The two experts of each label lie on two axes, so the unit mean lies between them."""
    bank = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]], np.float32)
    assets = {"bank": bank, "gate": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    classifier = Classifier(("red", "blue"), head="mixture", assets=assets)

    def run(call: Call) -> Arrays:
        raise AssertionError(f"graph {call.graph} runs")

    for asked, want in ((classifier, [[1, 1, 0], [0, 1, 1]]), (classifier.for_request(["blue"]), [[0, 1, 1]])):
        assert drive(labels(bundle, asked), run) == pytest.approx(np.array(want) / 2**0.5, abs=1e-6)


def test_a_label_is_the_unit_mean_of_unit_sentences(bundle: Bundle):
    vectors, call = embedded(
        bundle, ["red"], [[2, 0, 0], [0, 1, 0], [0, 0.5, 0]], templates=("{} one", "{} two", "{} three")
    )
    assert call.keys == ("red one", "red two", "red three")
    # unit: x, y, y; mean (1, 2, 0) / 3; unit again (1, 2, 0) / sqrt(5)
    assert vectors == pytest.approx(np.array([[1, 2, 0]]) / 5**0.5, abs=1e-6)
    assert vectors.dtype == np.float32


def test_each_distinct_sentence_is_embedded_once(bundle: Bundle):
    vectors, call = embedded(bundle, ["red", "green", "red"], [[1, 0, 0], [0, 1, 0]])
    assert call.keys == ("red", "green")
    assert len(call.feeds["ids"]) == 2
    assert vectors.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_descriptions_replace_the_templates_and_are_any_number(bundle: Bundle):
    vectors, call = embedded(
        bundle,
        ["green", "red"],
        [[0, 3, 0], [1, 0, 0], [0, 0, 1]],
        templates=("a {}",),
        descriptions={"red": ("r1", "r2")},
    )
    assert call.keys == ("a green", "r1", "r2")
    assert vectors == pytest.approx(np.array([[0, 1, 0], [0.5**0.5, 0, 0.5**0.5]]), abs=1e-6)


def test_cached_texts_are_not_tokenized(bundle: Bundle):
    bundle.text().checked = None  # a call of it would fail
    axes = np.eye(3, dtype=np.float32)
    cache = Rows({("text", "green"): {"text_embeds": axes[1]}, ("text", "red"): {"text_embeds": axes[0]}})
    for requests in (3, 1):  # the second time the vectors of the labels are cached
        walk = Walk(labels(bundle, Classifier(("green", "red", "green"))), Stopwatch(), cache)
        assert walk.step().value.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert cache.requests == requests
        cache.requests = 0


def test_other_labels_or_templates_do_not_hit_the_cache(bundle: Bundle):
    cache = Rows({})
    for names, more in [
        (("a", "b"), {}),
        (("a', 'b",), {}),
        (("b", "a"), {}),
        (("a",), {"templates": ("b {}",)}),
        (("a", "b {}"), {}),
        (("a", "b"), {"templates": ("x {}",)}),
        (("a", "b"), {"descriptions": {"a": ("x",)}}),
    ]:
        walk = Walk(labels(bundle, Classifier(names, **more)), Stopwatch(), cache)
        count = len(walk.step().keys)
        walk.step({"text_embeds": np.eye(3, dtype=np.float32)[:count]})
    assert len(cache.rows) == 7


def test_a_label_may_hold_braces_and_a_template_no_code(bundle: Bundle):
    _, call = embedded(bundle, ["{0} {}"], [[1, 0, 0]], templates=("{}",))
    assert call.keys == ("{0} {}",)


def test_unit_rows_have_length_one_and_zero_stays_zero():
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]]))
    assert rows == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, 1]]), abs=1e-7)
    assert rows.dtype == np.float32


def test_a_long_text_pads_no_other_and_answers_keep_their_order(bundle: Bundle):
    """The context is 6 tokens. 90 rows of 1 to 3 words, 30 of each, and two of 6: 30 x (1 + 2 + 3) + 2 x 6 = 192
    tokens; without a cut, 30 tokens or more are wasted, and a run costs 16. Padded to 6 they were 552."""
    three = ("blue", "red green", "red red blue")
    sentences = [three[i % 3] + " " * (i // 3) for i in range(90)]  # 90 different texts of three lengths
    sentences[40:40] = ["green blue " * 3]
    sentences.append("blue blue green " * 2)
    calls: list[Call] = []
    rows = drive(texts(bundle, sentences), lambda call: calls.append(call) or answered(call))
    assert rows.tolist() == counts(sentences)
    assert [call.feeds["ids"].shape for call in calls] == [(30, 1), (30, 2), (30, 3), (2, 6)]
    assert [call.keys for call in calls][-1] == (sentences[40], sentences[-1])
    with pytest.raises(TextTooLong, match=r"text 50 .* has 7 tokens"):
        drive(texts(bundle, [*sentences[:50], "red " * 7, *sentences[50:]]), answered)


def test_rows_beside_a_cached_long_text_are_not_padded_to_it(bundle: Bundle):
    long, short = "red green blue red green blue", ["red", "blue", "green"]
    cache = Rows({("text", long): {"text_embeds": np.array([2, 2, 2], np.float32)}})
    walk = Walk(texts(bundle, [*short, long]), Stopwatch(), cache)
    call = walk.step()
    assert (call.keys, call.feeds["ids"].shape) == (tuple(short), (3, 1))
    assert walk.step(answered(call)).value.tolist() == counts([*short, long])


def test_a_repeated_text_runs_once(bundle: Bundle):
    calls: list[Call] = []
    rows = drive(texts(bundle, ["red", "blue", "red", "red"]), lambda call: calls.append(call) or answered(call))
    assert rows.tolist() == counts(["red", "blue", "red", "red"])
    assert [call.keys for call in calls] == [("red", "blue")]


LONG = "red red red red red red blue blue blue"  # of a context of 6: windows with 6 and 3 words


def asked(
    bundle: Bundle, sentences: list[str], how: Truncation | None, cache: Any = no_cache
) -> tuple[Array, list[Call]]:
    """The rows that the graph answers, which are unit vectors here, and the calls."""
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": unit(answered(call)["text_embeds"])}

    return drive(texts(bundle, sentences, None, how), run, None, cache), calls


@pytest.mark.parametrize(
    ("how", "row"),
    [
        (Truncation("end"), (5, 0, 1)),  # the first 5 tokens, and the last
        (Truncation("chunk"), (6, 0, 3)),  # the mean, by tokens
        (Truncation("chunk", 3), (1 + 0.5**0.5, 0, 0.5**0.5)),  # red x 6, and red x 3 with blue x 3
        (Truncation("chunk", None, "max"), (1, 0, 1)),
    ],
    ids=["end", "chunk", "stride", "max"],
)
def test_a_long_text_is_cut_or_read_in_windows(bundle: Bundle, how: Truncation, row: tuple[float, ...]):
    vectors, _ = asked(bundle, ["green", LONG], how)
    assert vectors == pytest.approx(unit(np.array([(0, 1, 0), row])), abs=1e-6)


def test_compress_reads_the_sentences_that_are_nearest_to_the_whole(bundle: Bundle):
    """The windows blue + 2 red + 3 green and green: the whole is near (.46, .83, .23). Two lines fit into 6 tokens; red
    and green have the cosine .97, blue and green, or blue and red, less."""
    long = "blue\n\nred red\n\ngreen green green green"
    vectors, calls = asked(bundle, [long, "red"], Truncation("compress"))
    assert vectors == pytest.approx(unit(np.array([(2, 4, 0), (1, 0, 0)])), abs=1e-6)
    assert [2, 2, 3, 3, 3, 3] in calls[-1].feeds["ids"].tolist()


@pytest.mark.parametrize("method", ["end", "compress", "chunk"])
def test_each_choice_has_rows_of_its_own_in_the_cache(bundle: Bundle, method: Any):
    """A text that fits has one row for all choices. A row of a long text answers no request that made another choice:
    without one, the text stays an error."""
    kept = RowCache(100)

    def rows(request: CacheGet | CachePut) -> Cached:
        return kept.answer("digest", request)

    first, calls = asked(bundle, [LONG], Truncation(method), rows)
    again, none = asked(bundle, [LONG], Truncation(method), rows)
    assert first.tolist() == again.tolist()
    assert calls
    assert not none
    other = Truncation("chunk" if method == "end" else "end")
    assert asked(bundle, [LONG], other, rows)[1]
    with pytest.raises(TextTooLong, match=r"text 0 .* has 9 tokens; this model reads at most 6"):
        asked(bundle, [LONG], None, rows)


def test_a_bundle_may_choose_and_a_request_wins(colours: dict[str, Any], tmp_path: Path, write: Any):
    for truncate, row in ((True, (5, 0, 1)), ("chunk", (6, 0, 3)), ("compress", (1, 0, 0))):
        colours["graphs"]["text"]["preprocess"]["truncate"] = truncate
        with stage(tmp_path / "bundles", "colours") as staged:
            bundle = Bundle(seal(staged, write(staged), replace=True))
        assert asked(bundle, [LONG], None)[0] == pytest.approx(unit(np.array([row])), abs=1e-6)
        assert asked(bundle, [LONG], Truncation("end"))[0] == pytest.approx(unit(np.array([(5, 0, 1)])), abs=1e-6)
        with pytest.raises(TextTooLong):
            asked(bundle, [LONG], Truncation("none"))


def test_a_shortened_text_sends_fewer_tokens(bundle: Bundle):
    """By windows all tokens run, by its end as many as the context."""
    sent = {}
    for method in ("chunk", "end"):
        _, calls = asked(bundle, ["red blue " * 20], Truncation(method))  # type: ignore[arg-type]
        sent[method] = sum(call.feeds["ids"].size for call in calls)
    assert (sent["chunk"], sent["end"]) == (7 * 6, 6)
