"""The Python API over the fixture bundle: files, sessions and tasks together."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calmclip import Runner, Suppression, models, open_bundle
from calmclip.models.errors import (
    BadImage,
    BadRequest,
    BundleNotFound,
    ImageTooLarge,
    TaskNotServed,
    TooManyLabels,
    UnknownName,
)
from calmclip.models.flow import Arrays
from calmclip.models.tasks.embed import EmbedRequest
from calmclip.models.tasks.raw import RawRequest, raw

ASSETS = Path(__file__).parents[2] / "export" / "samples"
Png = Callable[..., bytes]


def test_a_red_picture_is_red(sealed: Path, png: Png):
    # cosines 1, 0, 0; softmax of 2, 0, 0: e^2 / (e^2 + 2) = 0.7870
    ranking = open_bundle(sealed).classify(png("red"), ["green", "red", "blue"])
    assert [(r.label, r.index) for r in ranking] == [("red", 1), ("green", 0), ("blue", 2)]
    assert [r.score for r in ranking] == pytest.approx([0.7870, 0.1065, 0.1065], abs=1e-4)
    assert [r.cosine for r in ranking] == pytest.approx([1, 0, 0], abs=1e-6)


def test_pictures_and_texts_are_in_one_space(sealed: Path, png: Png, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png("blue"))
    vectors = open_bundle(sealed).embed(texts=["red green"], images=[png("yellow"), tmp_path / "a.png"])
    half = 0.5**0.5  # yellow is red and green
    assert vectors == pytest.approx(np.array([[half, half, 0], [half, half, 0], [0, 0, 1]]), abs=1e-6)
    assert vectors.dtype == np.float32


def test_detect_finds_a_box_in_the_original(detector: Path, png: Png):
    """The only region is the 8 x 8 letterbox. A 32 x 16 picture fills its upper half at a quarter of its size."""
    detections = open_bundle(detector).detect(png("yellow", (32, 16)), ["blue", "red"])
    (only,) = detections
    # yellow above and black below: cosine of (1, 1, 0) and red
    assert (only.label, only.index, detections.candidates) == ("red", 1, 1)
    assert (only.score, only.raw_score) == pytest.approx((0.5**0.5, 0.5**0.5), abs=1e-6)
    assert only.box.tolist() == [0, 0, 32, 16]
    strict = Suppression(min_score=0.9)
    assert list(open_bundle(detector).detect(png("yellow"), ["red"], suppression=strict)) == []


def test_the_examples_of_the_page_run(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (Path(models.__file__).parent / "README.md").read_text(encoding="utf-8")
    example, evals = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(detector, tmp_path / "models" / "bundles" / "mini-int8")
    shutil.copy(ASSETS / "cat.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("a cat", "red").replace("a dog", "blue").replace("a red bicycle", "red"), {})
    ranked, *_, shape, first, second, third = capsys.readouterr().out.splitlines()
    assert ranked.startswith("red ")  # the cat is brown
    assert shape.startswith("(2, 3) {")
    assert [first, second, third] == ["red"] * 3
    shutil.copytree(detector, tmp_path / "models" / "bundles" / "mini-float")
    exec(evals, {"__name__": "__main__"})
    assert "zero_shot: 2 pictures, 2 labels" in capsys.readouterr().out


def test_raw_runs_one_graph(sealed: Path):
    answer = open_bundle(sealed).raw("text", {"ids": np.array([[4, 4]])})
    assert answer["text_embeds"].tolist() == [[0, 0, 1]]


def test_the_clock_times_what_ran_inside(sealed: Path, png: Png):
    runner = open_bundle(sealed, threads=1)
    with runner.clock() as clock:
        runner.classify(png("red"), ["red"])
    stages = dict(clock.stages)
    assert list(stages) == ["preprocess", "decode", "infer", "postprocess"]
    runner.classify(png("red"), ["red"])
    assert clock.stages == stages


def test_requests_without_an_answer_are_refused(sealed: Path, tmp_path: Path):
    runner = open_bundle(sealed)
    with pytest.raises(TaskNotServed, match="does not serve 'detect'; it serves classify, embed, raw"):
        runner.detect(b"", ["red"])
    with pytest.raises(BadImage, match="0 bytes"):
        runner.classify(b"", ["red"])
    with pytest.raises(BadRequest, match=r"absent\.jpg' cannot be read"):
        runner.classify(tmp_path / "absent.jpg", ["red"])
    with pytest.raises(BundleNotFound, match=r"holds no bundle\.json"):
        open_bundle(tmp_path)


# --- many pictures ------------------------------------------------------------------------------------------------


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Spy:
    """Counts the rows of each run of a runner's graphs."""

    def __init__(self, runner: Runner) -> None:
        self.runs: list[tuple[str, int]] = []
        for role in ("image", "text"):
            session = runner.session(role)
            monkey = session.run

            def run(feeds: Arrays, role: str = role, plain: Callable[[Arrays], Arrays] = monkey) -> Arrays:
                self.runs.append((role, len(next(iter(feeds.values())))))
                return plain(feeds)

            session.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_answers_of_many_come_in_their_order(sealed: Path, png: Png, batch: int | None, threads: int):
    runner = open_bundle(sealed)
    spy, text, tokenized = Spy(runner), runner.bundle.text(), []
    plain = text.prepare
    text.prepare = lambda texts: tokenized.append(len(texts)) or plain(texts)  # type: ignore[method-assign]
    names = [("red", "green", "blue")[i * i % 3] for i in range(23)]
    pictures = (png(name, (8 + i, 6)) for i, name in enumerate(names))  # a generator: each is read once
    rankings = runner.classify_many(pictures, [*COLOURS], top_k=1, batch=batch, threads=threads)
    assert [ranking.labels[0].label for ranking in rankings] == names
    assert [run for run in spy.runs if run[0] == "text"] == [("text", 3)]  # labels are embedded once
    assert tokenized == [3]
    rows = [count for role, count in spy.runs if role == "image"]
    assert sum(rows) == 23
    assert max(rows) <= (batch or 23)
    assert batch == 1 or max(rows) > 1 or threads  # with threads, the number of waiting calls is a race


def test_only_calls_of_one_shape_run_together(sealed: Path):
    runner, words = open_bundle(sealed), {"red": 2, "green": 3, "blue": 4}
    spy = Spy(runner)
    texts = ["red", "blue", "red green", "green", "blue blue", "red"]
    feeds = [{"ids": np.array([[words[word] for word in text.split()]])} for text in texts]
    flows = (raw(runner.bundle, RawRequest("text", ids)) for ids in feeds)
    rows = [outputs["text_embeds"][0] for outputs in runner.map(flows, batch=8, threads=0)]
    assert np.array(rows) == pytest.approx(runner.embed(texts=texts), abs=1e-6)
    assert max(count for _, count in spy.runs[:-1]) > 1


def test_flows_are_taken_as_they_are_needed_and_closed_with_the_iterator(sealed: Path, png: Png):
    runner, taken = open_bundle(sealed), []

    def pictures() -> Iterator[bytes]:
        for i in range(1000):
            taken.append(i)
            yield png("red")

    answers = runner.embed_many(pictures(), batch=2, threads=1)
    first = [next(answers) for _ in range(5)]
    assert np.array(first) == pytest.approx(np.array([[1, 0, 0]] * 5))
    assert len(taken) < 20
    answers.close()  # type: ignore[attr-defined]
    assert len(taken) < 20


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_in_place_of_its_answer_after_the_answers_before_it(sealed: Path, png: Png, threads: int):
    runner, pictures = open_bundle(sealed), [png("red"), png("blue"), b"no picture", png("green")]
    answers = runner.embed_many(pictures, threads=threads)
    assert [next(answers).tolist() for _ in range(2)] == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(BadImage, match="10 bytes starting"):
        next(answers)
    with pytest.raises(BadRequest, match="batch is 0; expected at least 1"):
        list(runner.embed_many(pictures, batch=0))


def test_kinds_of_pictures(sealed: Path, png: Png, tmp_path: Path):
    array = np.full((6, 8, 3), (0, 255, 0), np.uint8)
    (tmp_path / "green.png").write_bytes(png("green"))
    kinds = [png((0, 255, 0)), tmp_path / "green.png", str(tmp_path / "green.png"), array, Image.fromarray(array)]
    rows = open_bundle(sealed).embed(images=kinds)
    assert rows == pytest.approx(np.array([[0, 1, 0]] * 5), abs=1e-6)
    for wrong, says in (
        (array[..., 0], r"uint8 \[6, 8\]; expected uint8 \[height, width, 3\]"),
        (array.astype(np.float32), r"float32 \[6, 8, 3\]"),
        (7, "the picture is a int; expected a path"),
    ):
        with pytest.raises(BadRequest, match=says):
            open_bundle(sealed).embed(images=[wrong])  # type: ignore[list-item]
    with pytest.raises(ImageTooLarge, match="8 x 6 pixels; at most 47 are read"):
        open_bundle(sealed, max_pixels=47).embed(images=[array])


def test_temperature_and_none_below_reach_one_picture_and_many(sealed: Path, png: Png):
    runner, settings = open_bundle(sealed), {"temperature": 4.0, "none_below": 0.5}
    ranking = runner.classify(png("red"), ["green", "red"], **settings)
    # logits 2 and 0 divided by 4: 1 / (1 + e^-0.5) = 0.622459
    assert (ranking.labels[0].score, ranking.none, ranking.temperature) == (pytest.approx(0.622459), False, 4.0)
    assert list(runner.classify_many([png("red")], ["green", "red"], **settings)) == [ranking]
    assert runner.classify(png("red"), ["green", "red"], none_below=0.99).none is True


def test_logits_are_rows_of_pictures_and_columns_of_labels(sealed: Path, png: Png):
    logits = open_bundle(sealed).logits([png("red"), png("yellow")], ["blue", "red"])
    assert logits == pytest.approx(np.array([[0, 2], [0, 2 * 0.5**0.5]]), abs=1e-6)
    assert open_bundle(sealed).logits([], ["blue", "red"]).shape == (0, 2)


def test_the_cache_of_a_runner_is_counted_and_may_be_off(sealed: Path, png: Png):
    runner = open_bundle(sealed)
    for _ in range(3):
        runner.classify(png("red"), ["red", "blue"])
        runner.embed(texts=["red"])
    assert (runner.cache.misses, runner.cache.hits) == (2, 3 + 2 * 2)
    uncached = open_bundle(sealed, cached_rows=0)
    assert uncached.classify(png("red"), ["red"]).labels == runner.classify(png("red"), ["red"]).labels
    assert len(uncached.cache) == 0


def test_any_task_is_run_by_name(sealed: Path, png: Png):
    runner = open_bundle(sealed)
    embeddings = runner.ask("embed", EmbedRequest(["red", png("red")]))
    assert embeddings.vectors == pytest.approx(np.array([[1, 0, 0]] * 2), abs=1e-6)
    with pytest.raises(UnknownName, match="did you mean 'embed'"):
        runner.ask("embde", None)


def test_a_head_is_fitted_and_calibrated_from_python(sealed: Path, png: Png):
    """The pictures have labels of other colours, so their texts would not match."""
    runner = open_bundle(sealed)
    pictures, truth = [png("red"), png((0, 255, 0)), png("blue")], ["sea", "grass", "fire"]
    fitted = runner.fit(pictures, truth, "prototype", labels=["fire", "sea", "grass"], scale=2.0)
    assert (fitted.family, fitted.assets["prototypes"].tolist()) == (
        runner.bundle.family,
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    )
    ranked = runner.classify(png("blue"), ["grass", "fire"], classifier=fitted)
    assert [(r.label, r.score) for r in ranked] == [  # logits 2 and 0
        ("fire", pytest.approx(0.880797, abs=1e-6)), ("grass", pytest.approx(0.119203, abs=1e-6))
    ]  # fmt: skip
    # three right, one wrong: targets 5/6 and 1/6, with a mean of 2/3 for the best of two: T = 2 / ln 2
    two = runner.fit(pictures[:2], ["sea", "grass"], "prototype", scale=2.0)
    warm = runner.calibrate([png("red")] * 4, ["sea", "sea", "sea", "grass"], two)
    assert warm.temperature == pytest.approx(2 / np.log(2), rel=0.025)
    assert runner.classify(png("red"), classifier=warm).temperature == warm.temperature
    for arguments, says in (
        ((pictures, truth[:2], "prototype"), "3 pictures and 2 labels were given"),
        ((pictures, truth, "cosine"), "the head 'cosine' has nothing to fit; those that do: prototype"),
        (([], [], "prototype"), "no labels were given"),
    ):
        with pytest.raises((BadRequest, TooManyLabels), match=says):
            runner.fit(*arguments)
    with pytest.raises(BadRequest, match="the label 'sand' of a picture is none of the 1 labels"):
        runner.fit(pictures, ["sand"] * 3, "prototype", labels=["sea"])
