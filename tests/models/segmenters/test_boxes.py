from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array, Arrays, Call, Flow, drive
from calmclip.models.preprocess.image import decode
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Scene, boxes
from calmclip.models.segmenters.boxes import Painting, Params, affinity, between, cover, flow, mixed, painted, things

RANDOM = np.random.default_rng(0)
EVERYWHERE = np.full((4, 4), 40.0, np.float32)  # a mask that fills its enlarged box


def scene(labels: int, width: int = 160, height: int = 120, words: int = 2) -> Scene:
    rows = np.eye(8, dtype=np.float32)
    return Scene(
        Image.new("RGB", (width, height)), tuple(map(str, range(labels))), rows[:labels], rows[labels : labels + words]
    )


def test_affinity_is_the_formula_row_by_row():
    features = RANDOM.standard_normal((2, 3, 5))
    rows = features.reshape(6, 5) - features.reshape(6, 5).mean(axis=0)
    expected = np.zeros((6, 6))
    for i, j in np.ndindex(6, 6):
        cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        expected[i, j] = max(0.0, cosine - 0.2)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(affinity(features.astype(np.float32), 0.2), expected, atol=1e-6)


def test_cells_of_a_picture_of_one_colour_stay_as_they_are():
    np.testing.assert_array_equal(affinity(np.ones((2, 2, 3), np.float32), 0.2), np.eye(4))


def test_between_interpolates_and_keeps_the_border():
    np.testing.assert_allclose(between(np.array([-1.0, 0.5, 1.25, 9.0]), 2), [[1, 0], [1, 0], [0.25, 0.75], [0, 1]])


def test_a_mask_covers_its_box_enlarged_by_a_tenth_a_side():
    chances = np.zeros((2, 12, 14), np.float32)
    chances[1] = 1
    cover(chances, (0, 1), 0, np.array([2.0, 1.0, 12.0, 11.0]), EVERYWHERE)  # with margin 1..13, 0..12
    expected = np.zeros((12, 14))
    expected[:, 1:13] = 1
    np.testing.assert_allclose(chances[0], expected, atol=1e-6)
    np.testing.assert_allclose(chances.sum(axis=0), 1, atol=1e-6)


def test_what_is_painted_last_lies_in_front_and_chances_mix():
    half = np.zeros((4, 4), np.float32)  # a chance of one half
    places = np.array([[0, 0, 160, 120], [40, 30, 120, 90], [40, 30, 120, 90]], np.float32)
    answer = painted(
        scene(3), None, Painting(places, np.array([0, 1, 2]), [EVERYWHERE, EVERYWHERE, half]), np.ones(3, bool)
    )
    rows, columns = answer.background.shape
    assert rows * columns == pytest.approx(1 << 13, rel=0.02)
    middle, corner = (rows // 2, columns // 2), (1, 1)
    np.testing.assert_allclose(np.exp(answer.labels[:, *middle]), [1e-4, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(np.exp(answer.labels[:, *corner]), [1, 1e-4, 1e-4], atol=1e-5)
    assert np.exp(answer.background[corner]) == pytest.approx(1e-4)
    np.testing.assert_allclose(answer.frame.to_input(places[:1])[0], [0, 0, columns, rows], rtol=1e-5)


def test_without_boxes_everything_is_background():
    nothing = Painting(np.empty((0, 4), np.float32), np.empty(0, np.int64), [])
    answer = painted(scene(2), None, nothing, np.ones(2, bool))
    assert not answer.background.any()
    np.testing.assert_allclose(answer.labels, np.log(1e-4), rtol=1e-6)


def test_a_picture_that_the_decoder_made_smaller_is_painted_in_pixels_of_its_file(halved):
    small = replace(scene(2), image=decode(halved(320, 240)))
    assert small.image.size == (160, 120)
    left = Painting(np.array([[0, 0, 160, 240]], np.float32), np.array([0]), [EVERYWHERE])
    answer = painted(small, None, left, np.ones(2, bool))
    assert (answer.frame.width, answer.frame.height) == (320, 240)
    covered = (answer.labels[0] > np.log(0.5)).mean()
    assert covered == pytest.approx(0.5 + 0.05, abs=0.02)  # the left half, and a tenth of it beyond


def test_boxes_lie_over_the_dense_map():
    start = np.zeros((3, 3, 4), np.float32)
    start[1, :, :2] = start[2, :, 2:] = 1  # label 1 on the left, the background on the right
    frame = Frame(160, 120, (4 / 160, 3 / 120), (0.0, 0.0))
    box = np.array([[80, 0, 160, 120]], np.float32)
    answer = painted(scene(2), (start, frame), Painting(box, np.array([0]), [EVERYWHERE]), np.array([True, False]))
    winners = np.concatenate((answer.labels, answer.background[None])).argmax(axis=0)
    columns = winners.shape[1]
    assert (winners[:, : columns * 2 // 5] == 1).all()
    assert (winners[:, columns // 2 :] == 0).all()


def test_cells_without_affinity_are_a_softmax_and_padding_is_cut():
    patches = RANDOM.standard_normal((2, 2, 8)).astype(np.float32)
    frame = Frame(160, 120, (4 / 160, 4 / 160), (0.0, 0.0))  # the lowest of four rows is padding
    given, params = scene(2), Params(scale=3.0, bias=0.5, margin=0.999)
    map16 = RANDOM.standard_normal((4, 4, 40)).astype(np.float32)  # no two cells are alike
    chances = mixed(patches, map16, given, np.zeros(2, bool), frame, params)
    assert chances.shape == (3, 3, 4)
    units = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    logits = 3 * units[0, 0, :4].astype(np.float64)
    logits = np.array([logits[0], logits[1], max(logits[2], logits[3]) + 0.5])
    np.testing.assert_allclose(chances[:, 0, 0], np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_a_known_label_is_background_of_the_dense_map():
    patches = np.zeros((1, 1, 8), np.float32)
    patches[..., 0] = 1  # shows label 0
    frame = Frame(32, 32, (2 / 32, 2 / 32), (0.0, 0.0))
    map16 = np.zeros((2, 2, 3), np.float32)
    chances = mixed(patches, map16, scene(2), np.array([True, False]), frame, Params(bias=0.0))
    assert chances[0].max() == 0
    assert chances[2].min() > 0.99


@pytest.mark.parametrize(
    ("nearest", "asked"),
    [
        ((1.0, 0.85), ["boxes"]),
        ((1.0, 0.6), ["dense without [0]", "boxes"]),  # the second is unsure, and has both
        ((0.6, 0.2), ["dense without []", "boxes"]),
        ((0.5, 0.2), ["dense without []"]),
    ],
)
def test_names_near_to_the_detectors_choose_the_graphs(
    nearest: tuple[float, float], asked: list[str], finder: Bundle, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []

    def dense(bundle: Bundle, scene: Scene, known: Array, params: Params) -> Flow[tuple[Array, Frame]]:
        yield from ()
        calls.append(f"dense without {np.flatnonzero(known).tolist()}")
        return np.full((3, 3, 4), 1 / 3, np.float32), Frame(160, 120, (4 / 160, 3 / 120), (0.0, 0.0))

    def no_things(bundle: Bundle, scene: Scene, params: Params) -> Flow[Painting]:
        yield from ()
        calls.append("boxes")
        return Painting(np.empty((0, 4), np.float32), np.empty(0, np.int64), [])

    monkeypatch.setattr(boxes, "dense_chances", dense)
    monkeypatch.setattr(boxes, "things", no_things)
    drive(flow(finder, scene(2), Params()), lambda call: {"nearest": np.array(nearest, np.float32)})
    assert calls == asked


def test_masks_of_an_elongated_picture_are_asked_of_the_view_that_showed_the_box(finder: Bundle):
    """300 x 100 pixels in inputs of 8 x 8: the whole is 8 x 3, a slice of 150 x 100 is 8 x 5 (`test_elongated`)."""
    views = (  # objectness and box
        [(0.3, [0, 0, 8, 3])],
        [(0.9, [2, 0, 4, 5]), (0.85, [3, 1, 4, 4])],
        [(0.8, [1, 1, 3, 3])],
        [(0.5, [4, 0, 8, 5])],
    )
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        if call.graph == "masks":  # a mask tells its view and the left side of its box
            left = call.feeds["boxes"][0, :, :1, None] + 10 * call.feeds["mask_features"][0]
            return {"mask_logits": np.broadcast_to(left, (len(left), 2, 2))[None]}
        number = sum(each.graph == "regions" for each in calls) - 1
        outputs = {"boxes": np.zeros((1, 3, 4), np.float32), "objectness": np.zeros((1, 3), np.float32)}
        for row, (objectness, box) in enumerate(views[number]):
            outputs["boxes"][0, row], outputs["objectness"][0, row] = box, objectness
        features = np.full((1, 1, 1, 1), number, np.float32)
        return {**outputs, "class_embeds": np.eye(8, dtype=np.float32)[None, [0, 0, 0]], "mask_features": features}

    painting = drive(things(finder, scene(2, 300, 100), Params(min_score=0.1)), run)
    assert [call.graph for call in calls] == ["regions"] * 4 + ["masks"] * 2
    # the three best rows of all views, by rising score / root of the area: 37.5 x 100, 37.5 x 40, 18.75 x 60 pixels
    assert [float(mask[0, 0]) for mask in painting.masks] == pytest.approx([12, 21, 13], abs=1e-4)
    expected = [[37.5, 0, 75, 100], [93.75, 20, 131.25, 60], [56.25, 20, 75, 80]]
    np.testing.assert_allclose(painting.boxes, expected, atol=1e-3)
    assert painting.names.tolist() == [0, 0, 0]
