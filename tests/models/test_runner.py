"""The Python API over the fixture bundle: files, sessions and tasks together."""

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calmclip import Attributes, Example, Runner, Suppression, models, open_bundle
from calmclip.models.classifier import Classifier
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
    """Counts the rows of each run of a runner's graphs, and keeps the shapes of texts."""

    def __init__(self, runner: Runner) -> None:
        self.runs: list[tuple[str, int]] = []
        self.texts: list[tuple[int, ...]] = []
        for role in ("image", "text"):
            session = runner.session(role)
            monkey = session.run

            def run(feeds: Arrays, role: str = role, plain: Callable[[Arrays], Arrays] = monkey) -> Arrays:
                self.runs.append((role, len(next(iter(feeds.values())))))
                if role == "text":
                    self.texts.append(feeds["ids"].shape)
                return plain(feeds)

            session.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_answers_of_many_come_in_their_order(sealed: Path, png: Png, batch: int | None, threads: int):
    runner = open_bundle(sealed)
    spy, text, tokenized = Spy(runner), runner.bundle.text(), []
    plain = text.checked
    text.checked = lambda text, index, prompt: tokenized.append(text) or plain(text, index)  # type: ignore[method-assign]
    names = [("red", "green", "blue")[i * i % 3] for i in range(23)]
    pictures = (png(name, (8 + i, 6)) for i, name in enumerate(names))  # a generator: each is read once
    rankings = runner.classify_many(pictures, [*COLOURS], top_k=1, batch=batch, threads=threads)
    assert [ranking.labels[0].label for ranking in rankings] == names
    assert [run for run in spy.runs if run[0] == "text"] == [("text", 3)]  # labels are embedded once
    assert tokenized == [*COLOURS]
    rows = [count for role, count in spy.runs if role == "image"]
    assert sum(rows) == 23
    assert max(rows) <= (batch or 23)
    assert batch == 1 or max(rows) > 1 or threads  # with threads, the number of waiting calls is a race


def test_a_long_label_pads_no_other_in_any_method(sealed: Path, png: Png):
    """40 labels of one word and one of six: 40 x 1 + 6 = 46 tokens in two runs, whether one picture is classified or
    many; padded to one width they were 41 x 6 = 246. A cached long text widens no later run either."""
    runner, long = open_bundle(sealed), "red green blue red green blue"
    shorts = [f"x{i}" for i in range(39)]
    spy = Spy(runner)
    labels = ["red", long, *shorts]
    best = runner.classify(png("red"), labels).labels[0]
    assert (best.label, best.index) == ("red", 0)
    assert spy.texts == [(40, 1), (1, 6)]
    for answers in (
        list(runner.classify_many([png("red")] * 3, [f"{label} blue" for label in labels[2:]] + [long], batch=2)),
        runner.logits([png("red")] * 3, [f"{label} green" for label in labels[2:]] + [long]),
        runner.embed(texts=[*(f"y{i}" for i in range(39)), long]),
    ):
        assert len(answers) in (3, 40)
    assert spy.texts[2:] == [(39, 2), (39, 2), (39, 1)]


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


def test_equal_pixels_give_equal_answers_in_every_form(sealed: Path, png: Png, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)

    class Named:
        """A path of another library."""

        def __fspath__(self) -> str:
            return str(tmp_path / "picture.png")

    runner = open_bundle(sealed)
    for array in (pixels[..., :3], pixels[..., 0], pixels):  # RGB, grey, RGB with alpha
        Image.fromarray(array).save(path := tmp_path / "picture.png")
        data = path.read_bytes()
        with path.open("rb") as file, path.open("rb", buffering=0) as bare, Image.open(path) as lazy:
            kinds = [data, bytearray(data), memoryview(data), path, str(path), Named(), file, bare, io.BytesIO(data),
                     lazy, Image.fromarray(array), array, np.asfortranarray(array)]  # fmt: skip
            rows = runner.embed(images=kinds)
        assert len(np.unique(rows, axis=0)) == 1, array.shape
    red, white = np.array([[[255, 0, 0, 255]]], np.uint8), np.array([[[255, 0, 0, 0]]], np.uint8)
    assert runner.embed(images=[red, white, np.array([[7]], np.uint8)]) == pytest.approx(
        np.array([[1, 0, 0], [3**-0.5] * 3, [3**-0.5] * 3]), abs=1e-6
    )


def test_what_is_no_picture_is_refused_by_its_type(sealed: Path, png: Png, tmp_path: Path):
    runner, array = open_bundle(sealed), np.full((6, 8, 3), (0, 255, 0), np.uint8)
    (tmp_path / "cut.png").write_bytes(png("green", (99, 99))[:150])
    closed = (tmp_path / "cut.png").open("rb")
    closed.close()
    expected = (
        r"; expected a path, the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file, a file opened in "
        r"binary mode, a Pillow image, or "
    )
    for wrong, says in (
        (7, f"of the type int{expected}"),
        (None, "of the type NoneType"),
        ([[1]], "of the type list"),
        (array[..., :2], rf"an array uint8 \[6, 8, 2\]{expected}a numpy array uint8 \[height, width\], "),
        (array.astype(np.float32), r"an array float32 \[6, 8, 3\]"),
        (array[:0], r"an array uint8 \[0, 8, 3\]"),
        (array[0, 0], r"an array uint8 \[3\]"),
        (io.StringIO("text"), "reads as str; open the file in binary mode"),
        (closed, r"in '.*cut\.png' cannot be read: read of closed file"),
        (tmp_path, "cannot be read: .*directory"),
    ):
        with pytest.raises(BadRequest, match=says):
            runner.embed(images=[wrong])  # type: ignore[list-item]
    with pytest.raises(BadImage, match=r"the Pillow image cannot be read: .* Open it again from a whole file"):
        runner.classify(Image.open(tmp_path / "cut.png"), ["red"])
    with pytest.raises(ImageTooLarge, match="8 x 6 pixels; at most 47 are read"):
        open_bundle(sealed, max_pixels=47).embed(images=[array])


def test_one_text_or_picture_is_no_list_of_them(detector: Path, png: Png):
    """Each letter of a text is a text, each row of a picture may be a picture: an answer would be nonsense."""
    runner, red = open_bundle(detector), png("red")
    array = np.zeros((6, 8, 3), np.uint8)
    word, picture = "is the text 'red'; expected a list of texts", "is one picture, a {}; expected a list of pictures"
    for call, says in (
        (lambda: runner.embed(texts="red"), f"texts {word}"),
        (lambda: runner.embed(texts=b"red"), "texts is a value of the type bytes; expected a list of texts"),
        (lambda: runner.embed(texts=["red", red]), "texts has a value of the type bytes at 1; expected texts alone"),
        (lambda: runner.embed(texts=7), "texts is a value of the type int"),
        (lambda: runner.classify(red, "red"), f"labels {word}"),
        (lambda: runner.classify(red, ""), "labels is the text ''"),
        (lambda: runner.classify(red, ["red"], templates="red"), f"templates {word}"),
        (lambda: runner.classify(red, ["red", 7]), "labels has a value of the type int at 1"),
        (lambda: runner.classify_many([red], "red"), f"labels {word}"),
        (lambda: runner.logits([red], "red"), f"labels {word}"),
        (lambda: runner.detect(red, "red"), f"labels {word}"),
        (lambda: runner.detect(red, ["red"], templates="red"), f"templates {word}"),
        (lambda: runner.detect_many([red], "red"), f"labels {word}"),
        (lambda: runner.fit([red] * 3, "red", "prototype"), f"truth {word}"),
        (lambda: runner.fit([red], ["red"], "prototype", labels="red"), f"labels {word}"),
        (lambda: runner.calibrate([red] * 3, "red", Classifier(("r", "e", "d"))), f"truth {word}"),
        (lambda: runner.ask("embed", EmbedRequest("red")), f"inputs {word[:-5]}"),
        (lambda: runner.embed(images="cat.jpg"), f"images {picture.format('str')}"),
        (lambda: runner.embed(images=array), f"images {picture.format('ndarray')}"),
        (lambda: runner.embed_many(red), f"images {picture.format('bytes')}"),
        (lambda: runner.embed_many(io.BytesIO(red)), f"images {picture.format('BytesIO')}"),
        (lambda: runner.classify_many(bytearray(red), ["red"]), f"images {picture.format('bytearray')}"),
        (lambda: runner.logits(Path("cat.jpg"), ["red"]), f"images {picture.format('PosixPath')}"),
        (lambda: runner.detect_many(Image.new("RGB", (8, 8)), ["red"]), f"images {picture.format('Image')}"),
        (lambda: runner.detect(red, examples=memoryview(red)), f"examples {picture.format('memoryview')}"),
        (lambda: runner.detect(red, examples=Example(red)), f"examples {picture.format('Example')}"),
        (lambda: runner.fit("a", ["b"], "prototype"), f"images {picture.format('str')}"),
        (lambda: runner.embed(images=7), "images is of the type int; expected a list of pictures"),
    ):
        with pytest.raises(BadRequest, match=says):
            call()
    assert len(runner.embed(texts=(word for word in ["red", "blue"]))) == 2  # any iterable
    assert len(runner.embed(images=np.stack([array, array]))) == 2
    assert [len(list(each)) for each in runner.detect_many([red] * 2, (word for word in ["red"]))] == [1, 1]


def test_temperature_and_none_below_reach_one_picture_and_many(sealed: Path, png: Png):
    runner, settings = open_bundle(sealed), {"temperature": 4.0, "none_below": 0.5}
    ranking = runner.classify(png("red"), ["green", "red"], **settings)
    # logits 2 and 0 divided by 4: 1 / (1 + e^-0.5) = 0.622459
    assert (ranking.labels[0].score, ranking.none, ranking.temperature) == (pytest.approx(0.622459), False, 4.0)
    assert list(runner.classify_many([png("red")], ["green", "red"], **settings)) == [ranking]
    assert runner.classify(png("red"), ["green", "red"], none_below=0.99).none is True


def test_attributes_and_descriptions_reach_one_picture_and_many(detector: Path, png: Png):
    runner, labels = open_bundle(detector), ["green", "red"]
    # one value is zero-shot with its sentence: "red , blue" is (1, 0, 1) / sqrt(2), so the logits are 2 / sqrt(2) and 0
    ranking = runner.classify(png("red"), labels, attributes={"hue": ["blue"]})
    assert ranking.labels[0].score == pytest.approx(1 / (1 + np.exp(-(2**0.5))))
    flat = Attributes({"hue": ["blue", "red"]}, tau=np.inf)
    assert runner.classify(png("red"), labels, attributes=flat).inferred.marginals == {"hue": {"blue": 0.5, "red": 0.5}}
    assert list(runner.classify_many([png("red")], labels, attributes={"hue": ["blue"]})) == [ranking]
    described = {"descriptions": {"green": ["red"], "red": ["blue", "green"]}}
    # the only region is the picture: its cosines with the best descriptions are 1 and 0
    grounded = runner.classify(png("red"), labels, alpha=0.5, **described)
    assert [ranked.score for ranked in grounded] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [*runner.classify_many([png("red")], labels, alpha=0.5, **described)] == [grounded]
    replaced = runner.classify(png("red"), labels, **described)
    assert (replaced.labels[0].label, replaced.labels[0].cosine) == ("green", pytest.approx(1))
    assert [*runner.classify_many([png("red")], labels, **described)] == [replaced]


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
    fitted, report = runner.fit(pictures, truth, "prototype", labels=["fire", "sea", "grass"], scale=2.0)
    assert (fitted.family, fitted.assets["prototypes"].tolist()) == (
        runner.bundle.family,
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    )
    assert (report.before, report.after, report.measured) == (None, None, "nothing: no label has two pictures")
    ranked = runner.classify(png("blue"), ["grass", "fire"], classifier=fitted)
    assert [(r.label, r.score) for r in ranked] == [  # logits 2 and 0
        ("fire", pytest.approx(0.880797, abs=1e-6)), ("grass", pytest.approx(0.119203, abs=1e-6))
    ]  # fmt: skip
    # 75 right, 25 wrong: targets 101/102 and 1/102, with a mean of 76/102 for the best of two: T = 2 / ln (76 / 26)
    two, _ = runner.fit(pictures[:2], ["sea", "grass"], "prototype", scale=2.0)
    warm, errors = runner.calibrate([png("red")] * 100, ["sea"] * 75 + ["grass"] * 25, two)
    assert warm.temperature == errors.temperature == pytest.approx(2 / np.log(76 / 26), rel=0.012)
    assert runner.classify(png("red"), classifier=warm).temperature == warm.temperature
    sure = 1 / (1 + np.exp(-2))  # .88 at T = 1, .745 at the fitted T; .75 are right
    assert errors.before.expected_calibration_error == pytest.approx(sure - 0.75, abs=1e-6)
    assert errors.before.negative_log_likelihood == pytest.approx(0.25 * 2 - np.log(sure), abs=1e-6)
    assert errors.after.expected_calibration_error < 0.01
    assert errors.after.negative_log_likelihood == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=1e-3)
    spy = Spy(runner)
    for given, says in (
        (
            ([png("red")], ["sea"]),
            "1 pictures for 2 labels were given; 'sea' has 1, 'grass' has 0; a temperature needs",
        ),
        (([png("red")] * 100, ["sea"] * 100), "'grass' has 0; a temperature needs at least 100 pictures in all and 2"),
    ):
        with pytest.raises(BadRequest, match=says):
            runner.calibrate(*given, two)
    with pytest.raises(BadRequest, match="the label 'fire' has no picture; expected at least one for each of the 3"):
        runner.fit(pictures[:2], ["sea", "grass"], "prototype", labels=["sea", "grass", "fire"])
    assert spy.runs == []  # refused before a picture is embedded
    for arguments, says in (
        ((pictures, truth[:2], "prototype"), "3 pictures and 2 labels were given"),
        ((pictures, truth, "cosine"), "the head 'cosine' has nothing to fit; those that do: caps, direction, gda, "),
        (([], [], "prototype"), "no labels were given"),
    ):
        with pytest.raises((BadRequest, TooManyLabels), match=says):
            runner.fit(*arguments)
    with pytest.raises(BadRequest, match="the label 'sand' of a picture is none of the 1 labels"):
        runner.fit(pictures, ["sand"] * 3, "prototype", labels=["sea"])
