"""Thousands of valid and invalid nodes and inputs, in a separate process, so that a crash fails the test only."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.ops import reference
from calmclip.models.ops.library import Library, look
from calmclip.models.ops.spec import IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS, SOFT_NMS, SOFTMAX, Op
from tests.models.ops.harness import Feeds, gather, load, model, node, run_separately


@dataclass(frozen=True)
class Case:
    """``fits``: whether the node must run; None if either is right. ``check`` takes the outputs."""

    op: Op
    feeds: Feeds
    attributes: dict[str, Any]
    fits: bool | None
    check: Callable[..., None]


ODD = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4028235e38, 1e6, -1e6, 1e-45, -0.0, 88.8, -88.8], np.float32)
SIDES = (0, 1, 1, 2, 3, 5, 8, 16, 17, 33)
LONG = (319, 321, 577, 4097, 20_000, 70_000)
WRONG = (
    {"axis": 1.0}, {"axis": [0]}, {"axis": "0"}, {"axis": 2**63 - 1}, {"axis": -(2**63)}, {"axis": 7},
    {"gamma": 0}, {"gamma": [-0.1]}, {"gamma": 0.1}, {"gamma": float("nan")}, {"gamma": -3e38}, {"gamma": "x" * 9999},
    {"zeta": 1}, {"zeta": 0.999}, {"zeta": float("nan")}, {"zeta": float("inf")}, {"zeta": -2.0},
)  # fmt: skip


def values(rng):
    shape = [
        int(side) for side in rng.choice(SIDES, rng.choice([0, 1, 2, 2, 3, 4], p=[0.04, 0.2, 0.2, 0.2, 0.2, 0.16]))
    ]
    if shape and rng.random() < 0.1:
        shape = [2] * (len(shape) - 1)
        shape.insert(int(rng.integers(len(shape) + 1)), int(rng.choice(LONG)))
    x = np.asarray(rng.standard_normal(shape) * rng.choice([0.1, 4, 100, 1e7]), np.float32)
    if rng.random() < 0.3:
        x = np.where(rng.random(shape) < rng.choice([0.02, 0.5, 1]), rng.choice(ODD, shape), x).astype(np.float32)
    if rng.random() < 0.2:
        x = np.where(rng.random(shape) < rng.choice([0.5, 1]), rng.choice([-np.inf, ODD[4]]), x).astype(np.float32)
    return np.asarray(x, np.float32)


def softmax(rng, number: int) -> Case:
    x = values(rng)
    attributes = {
        "axis": int(rng.integers(-x.ndim, x.ndim)) if x.ndim else 0,
        "gamma": float(rng.choice([0, -1e-8, -0.003, -1, -1e30])),
        "zeta": float(rng.choice([1, 1.003, 2, 1e30])),
    }
    for name in ("axis", "gamma", "zeta"):
        if rng.random() < 0.2:
            del attributes[name]
    bad = WRONG[int(rng.integers(len(WRONG)))] if rng.random() < 0.25 else {}

    def check(y):
        with np.errstate(all="ignore"):
            expected = reference.softmax(x, **attributes)
        # the effect of the last place of the exponent, times the stretch
        most = 2e-5 * (attributes.get("zeta", 1.0) - attributes.get("gamma", 0.0))
        np.testing.assert_allclose(y, expected, rtol=0, atol=most)

    return Case(SOFTMAX, {"x": x}, attributes | bad, not bad and x.ndim > 0, check)


COORDINATES = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 0.0, 1.0], np.float32)


def suppression(rng, number: int) -> Case:
    huge = number % 200 == 0
    n = int(rng.integers(2000, 6000)) if huge else int(rng.choice([0, 1, 2, 3, 15, 16, 17, 33, 64, 65, 130]))
    shape = (n,) if huge or rng.random() < 0.5 else (int(rng.integers(0, 4)), n)
    boxes = rng.uniform(-50, 50, (*shape, 4)).astype(np.float32)
    if rng.random() < 0.7:
        boxes[..., 2:] = boxes[..., :2] + rng.uniform(0, rng.choice([1, 30]), (*shape, 2))
    if rng.random() < 0.3:
        boxes = boxes.round()
    scores = (rng.integers(0, 9, shape) / 8 if rng.random() < 0.3 else rng.random(shape)).astype(np.float32)
    if rng.random() < 0.2:
        scores -= 0.5
    if rng.random() < 0.4:
        boxes = np.where(rng.random(boxes.shape) < 0.1, rng.choice(COORDINATES, boxes.shape), boxes)
    if rng.random() < 0.3:
        odd = COORDINATES if rng.random() < 0.3 else COORDINATES[1:]
        scores = np.where(rng.random(shape) < 0.1, rng.choice(odd, shape), scores)
    classes = rng.integers(*((0, 4) if rng.random() < 0.7 else (-(2**63), 2**63 - 1)), shape, np.int64)
    integers = {
        "method": rng.integers(0, 3),
        "per_class": rng.integers(0, 2),
        "max_output": rng.choice([0, 1, 7, 10**6]),
    }
    floats = {
        "iou_threshold": rng.choice([-1, 0, 0.3, 0.5, 1]),
        "sigma": rng.choice([1e-40, 0.1, 0.5, 1e30]),
        "min_score": rng.choice([-np.inf, -1, 0, 1e-3, 0.5, np.inf]),
    }
    feeds = {
        "boxes": boxes,
        "scores": scores,
        "classes": classes,
        **{name: np.array([value], np.int64) for name, value in integers.items()},
        **{name: np.array([value], np.float32) for name, value in floats.items()},
    }
    if rng.random() < 0.4:  # one input is wrong
        name = rng.choice(list(feeds))
        value = feeds[name]
        if rng.random() < 0.5:
            other = [int(d) for d in rng.integers(0, 6, rng.integers(0, 5))]
            feeds[name] = np.resize(value, other) if value.size else np.zeros(other, value.dtype)
        else:
            bad = COORDINATES if value.dtype == np.float32 else np.array([-1, 2, 3, 2**62, -(2**63), 2**63 - 1])
            feeds[name] = np.where(rng.random(value.shape) < 0.5, rng.choice(bad, value.shape), value)
            feeds[name] = feeds[name].astype(value.dtype)

    def check(indices, scores, classes, images):
        rows = feeds["scores"] if feeds["scores"].ndim == 2 else feeds["scores"][None]
        least, most = feeds["min_score"].item(), feeds["max_output"].item()
        assert indices.shape == scores.shape == classes.shape == images.shape
        assert ((indices >= 0) & (indices < rows.shape[1])).all()
        assert (np.diff(images) >= 0).all()
        assert (scores >= np.float32(least)).all()
        assert len(set(zip(images.tolist(), indices.tolist(), strict=True))) == len(indices)
        np.testing.assert_array_equal(feeds["classes"].reshape(rows.shape)[images, indices], classes)
        for image, row in enumerate(rows):
            mine = images == image
            assert mine.sum() <= most
            if most and (row >= np.float32(least)).any():  # the best of each image keeps its score
                assert scores[mine][0] == row.max()
                assert indices[mine][0] == row.argmax()

    return Case(SOFT_NMS, feeds, {}, None, check)


def pictures(rng, number: int) -> Case:
    def any_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    op = any_of(IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS)
    side = int(rng.integers(1, 40))
    attributes: dict[str, Any] = op.attributes | {
        "size": (side, int(rng.integers(1, 40))),
        "shortest": int(rng.integers(38, 60)),
        "resize": any_of("shortest", "exact", "letterbox"),
        "resample": any_of("bilinear", "bicubic"),
        "keep_square": int(rng.integers(2)),
        "crop_offset": any_of("round", "floor"),
    }
    if rng.random() < 0.3:
        attributes |= any_of(
            {"size": (-side, 3)},
            {"size": (2**40, 3)},
            {"size": tuple(range(50))},
            {"size": 4.5},
            {"shortest": int(rng.integers(-(2**63), 2**63))},
            {"shortest": 4096},
            {"gain": (0.0,) * 3},
            {"gain": (float("nan"),) * 3},
            {"bias": (1e38, -1e38, 0.0)},
            {"pad": int(rng.integers(-(2**63), 2**63))},
            {"resize": "x" * 10_000},
            {"resample": ""},
            {"crop_offset": b"\xff\x00".decode("latin1")},
        )
    if op is IMAGE_TO_QUANTIZED_PIXELS and rng.random() < 0.2:
        attributes |= any_of({"scale": float("inf")}, {"scale": -1.0}, {"zero_point": -1}, {"scale": 1e-45})
    if rng.random() < 0.05:
        del attributes[any_of(*op.attributes)]
    shape = (*map(int, rng.integers(0, any_of(2, 5, 100, 400), 2)), 3)
    if rng.random() < 0.2:
        shape = any_of((), (3,), (4, 3), (4, 4, 1), (1, 4, 4, 3), (0, 0, 0), (70_000, 1, 3), (1, 65_536, 3))

    def check(pixels):
        assert pixels.shape == (1, 3, *attributes["size"])

    return Case(op, {"image": rng.integers(0, 256, shape, np.uint8)}, attributes, None, check)


def contracts(rng, number: int) -> Case:
    """Any operator of the table on its contract's inputs; half of the time one input has other values or sides."""
    contract = CONTRACTS[number % len(CONTRACTS)]
    feeds = contract.draw(number, rng.random() < 0.5)
    name = str(rng.choice(list(feeds)))
    x, changed = feeds[name], rng.random() < 0.5
    if changed and rng.random() < 0.5:
        x = np.resize(x, rng.integers(0, 6, rng.integers(0, 5)))
    elif changed and x.dtype == np.float32:
        x = np.where(rng.random(x.shape) < 0.5, rng.choice(ODD, x.shape), x).astype(x.dtype)
    elif changed:
        info = np.iinfo(x.dtype)
        x = rng.integers(info.min, info.max, x.shape, x.dtype, endpoint=True)

    def check(*outputs):
        assert all(y.dtype == tensor.dtype for y, tensor in zip(outputs, contract.op.outputs.values(), strict=True))

    attributes = contract.op.attributes | contract.attributes
    return Case(contract.op, feeds | {name: np.asarray(x)}, attributes, None if changed else True, check)


CONTRACTS = gather("CONTRACTS")
DRAWN = {draw.__name__: draw for draw in (softmax, suppression, pictures, contracts)}


def fuzz(library: Library, name: str, count: int) -> tuple[int, int]:
    """-> the number of nodes that ran and that were refused. Any other end is an exception or a crash."""
    rng = np.random.default_rng(count)
    ran = 0
    for number in range(count):
        case = DRAWN[name](rng, number)
        ends = [
            {end: (tensor.dtype, None) for end, tensor in side.items()} for side in (case.op.inputs, case.op.outputs)
        ]
        proto = model([node(case.op, *ends, **case.attributes)], *ends)
        try:
            answer = load(proto, library, threads=int(rng.integers(1, 3))).run(None, case.feeds)
        except Exception as error:
            loading, running = (
                f"{case.op.name}: ",
                f"INVALID_ARGUMENT : Non-zero status code returned while running {case.op.name}",
            )
            assert not case.fits, (number, case, error)  # noqa: PT017
            assert loading in str(error) or running in str(error), (number, case, error)  # noqa: PT017
            continue
        assert case.fits is not False, (number, case)
        ran += 1
        case.check(*answer)
    return ran, count - ran


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DRAWN)
def test_no_node_and_no_input_crashes_the_process(library, name, count):
    """Some of the nodes run, and some are refused."""
    ran, refused = map(int, run_separately(__file__, library, name, count))
    assert ran + refused == count
    assert ran > count / 3
    assert refused > count / 10


if __name__ == "__main__":
    opened = look(Path(sys.argv[1]))
    assert isinstance(opened, Library), opened
    print(*fuzz(opened, sys.argv[2], int(sys.argv[3])))
