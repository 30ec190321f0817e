"""anomaly over invented maps: WinCLIP's rule beside a brute force in float64, the memory, places, and the heat map."""

import io
import json
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import AnomalyDefaults, parse
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks import TASKS, heat, served
from calmclip.models.tasks.anomaly import Anomaly, AnomalyRequest, anomaly
from calmclip.models.tasks.cells import cells
from calmclip.models.tasks.fit import FitRequest, fit
from calmclip.models.tasks.winclip import SIDES, states, text_scores

GREY = np.full((8, 8, 3), 90, np.uint8)
AXES = np.eye(3, dtype=np.float32)
TEXTS = {"fine object": AXES[0], "torn object": AXES[1]}


def patches(*rows: Array) -> Array:
    """[1, 2, 2, 3]"""
    return np.stack(rows).reshape(1, 2, 2, 3).astype(np.float32)


def answering(planes: Array) -> Callable[[Call], Arrays]:
    def answer(call: Call) -> Arrays:
        if call.graph == "text":
            assert call.keys is not None
            return {"text_embeds": np.stack([TEXTS[key] for key in call.keys])}
        return {"patches": planes}

    return answer


def ask(bundle: Bundle, planes: Array, **asked: Any) -> Anomaly:
    told = {"normal": ["fine {}"], "damaged": ["torn {}"], "templates": ["{}"]}
    request = AnomalyRequest(asked.pop("image", GREY), **{**told, **asked})
    return drive(anomaly(bundle, request), answering(planes))


@pytest.fixture
def mapped(mapped: Bundle) -> Bundle:
    mapped.tasks = served(mapped.manifest)
    return mapped


def brute_force(rows: Array, sides: Array, scale: float) -> tuple[float, Array]:
    """By definition: each window's score goes to its cells, as a harmonic mean over windows, then over sizes."""

    def damaged(part: Array) -> float:
        mean = part.reshape(-1, part.shape[-1]).mean(axis=0)
        powers = np.exp(scale * (sides.astype(np.float64) @ (mean / np.linalg.norm(mean))))
        return float(powers[1] / powers.sum())

    h, w, _ = rows.shape
    rows = rows.astype(np.float64)
    whole, plane = damaged(rows), np.zeros((h, w))
    windows = [
        (size, y, x, damaged(rows[y : y + size, x : x + size]))
        for size in (1, 2, 3) if size <= min(h, w)
        for y in range(h - size + 1)
        for x in range(w - size + 1)
    ]  # fmt: skip
    for y, x in np.ndindex(h, w):
        means = [whole]
        for size in sorted({row[0] for row in windows}):
            over = [p for s, top, left, p in windows if s == size and 0 <= y - top < s and 0 <= x - left < s]
            means.append(len(over) / sum(1 / p for p in over))
        plane[y, x] = len(means) / sum(1 / mean for mean in means)
    return whole, plane


@pytest.mark.parametrize("shape", [(4, 5), (2, 6), (1, 1)])
def test_scores_of_text_are_those_of_a_brute_force_in_float64(shape: tuple[int, int]):
    draw = np.random.default_rng(0)
    rows, sides = draw.standard_normal((*shape, 3)).astype(np.float32), AXES[:2]
    whole, plane = text_scores(rows, sides, 5.0)
    wanted = brute_force(rows, sides, 5.0)
    assert whole == pytest.approx(wanted[0], abs=1e-6)
    assert plane == pytest.approx(wanted[1], abs=1e-6)


def test_a_constant_map_has_the_score_of_the_whole_picture_everywhere(mapped: Bundle):
    """Cosines .6 and .8 at the head's scale of 2: 1 / (1 + exp(-.4))."""
    answer = ask(mapped, patches(*[np.array([0.6, 0.8, 0])] * 4))
    assert answer.method == "text"
    assert answer.score == pytest.approx(1 / (1 + np.exp(-0.4)), abs=1e-6)
    assert answer.map == pytest.approx(np.full((128, 128), answer.score), abs=1e-6)
    assert (answer.threshold, answer.is_damaged) == (None, None)
    assert ask(mapped, patches(*AXES, AXES[2]), threshold=0.1).is_damaged


def test_sentences_are_all_states_in_all_templates():
    told = states(None, "cup", ["good {}"], ["bad {}", "{} in parts"], ["a {}.", "the {}."])
    assert told.labels == SIDES
    assert told.descriptions == {
        "normal": ("a good cup.", "the good cup."),
        "damaged": ("a bad cup.", "the bad cup.", "a cup in parts.", "the cup in parts."),
    }
    defaults = AnomalyDefaults(thing="nut", normal=("whole {}",), templates=("{}",))
    assert states(defaults).descriptions["normal"] == ("whole nut",)
    assert states(defaults, "bolt").descriptions["normal"] == ("whole bolt",)
    assert "damaged nut" in states(defaults).descriptions["damaged"]
    with pytest.raises(BadRequest, match=r"damaged 0 is 'torn'; it needs a '\{\}'"):
        states(None, damaged=["torn"])
    with pytest.raises(BadRequest, match="make 4014 sentences; at most 2000"):
        states(None, normal=["{}"] * 1000, damaged=["{}"] * 1007, templates=["a {}", "the {}"])


def remembered(bundle: Bundle, *planes: Array, labels: tuple[str, ...] = (), **asked: Any) -> Classifier:
    """Fitted to a picture for each of the maps, or for each 1 + ``augment`` of them."""
    waiting, count = iter(planes), len(planes) // (1 + asked.get("augment", 0))
    names = tuple(dict.fromkeys(labels)) or ("normal",)
    truth = [names.index(label) for label in labels] or [0] * count
    request = FitRequest([GREY] * count, truth, Classifier(names), "memory", **asked)
    return drive(fit(bundle, request), lambda call: {"patches": next(waiting)}).classifier


def test_a_memory_finds_the_cell_that_normal_pictures_lack(mapped: Bundle):
    """The threshold is the distance of the axes y and x, cosine 0: .5. The cell -x has cosine 0 to y: .5; -x - y has
    cosine -.71 to both: .85."""
    classifier = remembered(mapped, patches(*[AXES[0]] * 4), patches(*[AXES[1]] * 4))
    assert (classifier.labels, classifier.head) == (SIDES, "memory")
    seen = patches(AXES[0], 3 * AXES[1], AXES[0], -AXES[0] - AXES[1])
    answer = ask(mapped, seen, classifier=classifier)
    assert answer.method == "memory"
    assert answer.score == pytest.approx((1 + 0.5**0.5) / 2, abs=1e-6)
    assert (answer.threshold, answer.is_damaged) == (pytest.approx(0.5), True)
    assert answer.map[-1, -1] == pytest.approx(answer.score, abs=1e-6)
    assert answer.map[0] == pytest.approx(np.zeros(128), abs=1e-6)
    assert not ask(mapped, seen, classifier=classifier, threshold=0.9).is_damaged
    both = ask(mapped, seen, classifier=classifier, method="both")
    whole, plane = text_scores(seen[0], AXES[:2], 2.0)
    assert both.score == pytest.approx((whole + answer.score) / 2, abs=1e-6)
    assert both.map[-1, -1] == pytest.approx((float(plane[1, 1]) + answer.score) / 2, abs=1e-6)


def test_labels_of_a_fit_are_normal_and_damaged_in_any_order(mapped: Bundle):
    maps = [patches(*[axis] * 4) for axis in AXES]
    classifier = remembered(mapped, *maps, labels=("damaged", "normal", "normal"))
    assert np.array_equal(classifier.assets["patches"][[0, 4]], AXES[1:])
    for labels, says in ((("normal", "torn"), "'torn' is neither"), (("damaged",), "label 'normal' has no picture")):
        with pytest.raises(BadRequest, match=says):
            remembered(mapped, *maps[: len(labels)], labels=labels)


def test_crops_are_patches_of_their_picture(mapped: Bundle):
    """The crops have the vector z: what they lack is compared with neither of them, but with the other picture."""
    maps = [patches(*[AXES[0]] * 4), patches(*[AXES[2]] * 4), patches(*[AXES[1]] * 4), patches(*[AXES[2]] * 4)]
    classifier = remembered(mapped, *maps, augment=1)
    assert len(classifier.assets["patches"]) == 16
    assert classifier.assets["distances"] == pytest.approx([0.5, 0.5])


def test_what_a_memory_cannot_read_is_an_error(mapped: Bundle, bundle: Bundle):
    whole = patches(*[AXES[0]] * 4)
    with pytest.raises(BadRequest, match="has the head 'cosine'; anomaly needs one"):
        ask(mapped, whole, classifier=Classifier(head="cosine"))
    foreign = replace(remembered(mapped, whole), family="0" * 64)
    with pytest.raises(ClassifierMismatch):
        ask(mapped, whole, classifier=foreign)
    with pytest.raises(BadRequest, match="no classifier was given"):
        ask(mapped, whole, method="memory")
    with pytest.raises(BadRequest, match="method is 'best'; expected text, memory, both, graph, or none"):
        ask(mapped, whole, method="best")
    with pytest.raises(BadRequest, match="threshold is 2; expected 0 to 1"):
        ask(mapped, whole, threshold=2)
    with pytest.raises(TaskNotServed, match="does not serve 'anomaly'"):
        ask(bundle, whole)
    with pytest.raises(TaskNotServed, match="has no graph 'anomaly'"):
        ask(mapped, whole, method="graph")
    with pytest.raises(BadRequest, match="measures nothing on a validation"):
        remembered(mapped, whole, validation=([GREY], [0]))
    with pytest.raises(BadRequest, match="1000 pictures and 50 crops of each have 204000 patches; at most 131072"):
        remembered(mapped, *[whole] * 51000, augment=50)


def test_a_learnt_graph_gives_score_and_map(mapped: Bundle, colours: dict[str, Any]):
    colours["graphs"]["anomaly"] = {
        **colours["graphs"]["dense"],
        "outputs": {"map": {"dtype": "float32", "shape": ["B", 4, 4]}, "score": {"dtype": "float32", "shape": ["B"]}},
    }
    colours["graphs"]["anomaly"]["preprocess"] = {**colours["graphs"]["dense"]["preprocess"], "resize": "exact"}
    mapped.manifest = parse(json.dumps(colours).encode(), "colours")
    plane = np.random.default_rng(0).random((1, 4, 4)).astype(np.float32)
    outputs = {"map": plane, "score": np.array([0.7], np.float32)}
    answer = drive(anomaly(mapped, AnomalyRequest(np.zeros((20, 40, 3), np.uint8))), lambda call: outputs)
    assert (answer.method, answer.score, answer.map.shape) == ("graph", pytest.approx(0.7), (64, 128))
    enlarged = np.asarray(Image.fromarray(plane[0]).resize((128, 64), Image.Resampling.BILINEAR))
    assert answer.map == pytest.approx(gaussian_filter(enlarged, (32, 64)), abs=1e-4)  # 4 of 8 pixels on each side


@pytest.mark.parametrize(
    ("frame", "top", "left", "rows", "columns"),
    [
        (Frame(80, 40, (0.5, 0.5), (0.0, 0.0)), 0, 0, 2, 4),  # 40 x 20 of 40 x 40 pixels: half of the cells
        (Frame(80, 50, (0.5, 0.5), (0.0, 0.0)), 0, 0, 2, 4),  # 25 pixels: 2.5 cells, the middle of the third is outside
        (Frame(80, 52, (0.5, 0.5), (0.0, 0.0)), 0, 0, 3, 4),
        (Frame(80, 2, (0.5, 0.5), (0.0, 0.0)), 0, 0, 1, 4),
        (Frame(40, 20, (1.0, 1.0), (0.0, 16.0)), 2, 0, 2, 4),  # from 1.6 to 3.6 cells
    ],
)
def test_cells_count_if_their_middle_lies_in_the_picture(frame: Frame, top: int, left: int, rows: int, columns: int):
    where = cells(frame, (40, 40), (4, 4))
    assert (where.top, where.left, where.rows, where.columns) == (top, left, rows, columns)


def test_a_map_lies_on_the_picture_as_its_cells_do():
    """Cells of 10 pixels over a picture of 30 x 15 pixels. A ramp over the cells stays a ramp of the same place."""
    frame = Frame(30, 15, (1.0, 1.0), (0.0, 0.0))
    where = cells(frame, (40, 40), (4, 4))
    ramp = np.add.outer(np.zeros(where.rows), np.arange(where.columns)).astype(np.float32)
    plane = heat.on_picture(ramp, where, frame, side=30)
    wanted = np.clip((np.arange(30) + 0.5) / 10 - 0.5, 0, 2)
    assert plane.shape == (15, 30)
    assert plane == pytest.approx(np.tile(wanted, (15, 1)), abs=1e-5)


def test_the_gaussian_is_scipys():
    plane = np.random.default_rng(0).random((9, 40)).astype(np.float32)
    assert heat.smoothed(plane, (1.3, 4.0)) == pytest.approx(gaussian_filter(plane, (1.3, 4.0)), abs=1e-5)
    assert heat.smoothed(plane, (0.0, 0.0)) is plane


def test_the_heat_map_has_the_pictures_size_and_the_colours_of_its_levels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heat, "_BAND", 70)  # strips of 3 rows
    plane = np.stack([np.linspace(0, 1, 4), np.linspace(0, 1, 4)[::-1], np.zeros(4)]).astype(np.float32)
    picture = Image.open(io.BytesIO(Anomaly(20, 9, 0.5, plane, "text").png()))
    assert (picture.size, picture.mode) == ((20, 9), "P")
    assert np.asarray(picture.convert("RGB"))[0, [0, -1]].tolist() == [[0, 0, 0], [255, 255, 255]]
    levels = np.asarray(Image.fromarray(plane * 255).resize((20, 9), Image.Resampling.BILINEAR))
    assert np.abs(np.asarray(picture, np.float32) - levels).max() <= 0.51
    shifted = Image.open(io.BytesIO(Anomaly(4, 3, 0.5, plane, "memory", 0.25, (0.0, 0.5)).png()))
    assert np.asarray(shifted)[0].tolist() == [0, 170, 255, 255]
    assert shifted.convert("RGB").getpixel((1, 0)) == (255, 255, 0)


def test_the_command_prints_verdicts_and_writes_heat_maps(mapped: Bundle, tmp_path: Path):
    command = TASKS.get("anomaly").command
    assert command is not None
    Image.fromarray(GREY).save(tmp_path / "a.png")
    options = ArgumentParser()
    options.add_argument("pictures", nargs="+", type=Path)
    command.options(options)
    told = ["--normal", "fine {}", "--damaged", "torn {}", "--template", "{}", "--threshold", "0.1"]
    given = options.parse_args([str(tmp_path / "a.png"), *told, "--heat", str(tmp_path / "heat")])
    flows = answering(patches(*[np.array([0.6, 0.8, 0])] * 4))
    driver = SimpleNamespace(bundle=mapped, map=lambda asked: (drive(flow, flows) for flow in asked))
    (row,) = command.answers(driver, given)
    assert (row["damaged"], row["method"], row["heat"]) == (True, "text", str(tmp_path / "heat" / "a.png"))
    assert Image.open(row["heat"]).size == (8, 8)
    assert command.line(row).startswith(f"{tmp_path / 'a.png'}  0.599  damaged (text) -> ")
    given.pictures *= 2
    with pytest.raises(BadRequest, match="two pictures have one name"):
        next(iter(command.answers(driver, given)))
