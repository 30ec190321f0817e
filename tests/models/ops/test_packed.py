"""Packed weights that nodes share. That they are in memory once: `tests.models.runtime.test_lending`."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import QUANT_CONV, QUANT_DEPTHWISE, QUANT_LINEAR, Op
from tests.models.ops import harness

RANDOM = np.random.default_rng(0)
SHAPES: dict[str, tuple[Op, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear": (QUANT_LINEAR, (5, 70), (70, 90), {}),
    "conv": (QUANT_CONV, (1, 40, 40, 64), (3, 3, 64, 64), {"pads": (1, 1, 1, 1)}),  # by tiles, too
    "depthwise": (QUANT_DEPTHWISE, (1, 9, 9, 48), (3, 3, 48), {"group": 48}),
}


def feeds(x: tuple[int, ...], weight: tuple[int, ...]) -> dict[str, np.ndarray]:
    step, point = np.array(1, np.float32), np.array(128, np.uint8)
    return {
        "x": RANDOM.integers(0, 256, x, np.uint8), "x_scale": step, "x_zero": point,
        "weight": RANDOM.integers(-128, 128, weight, np.int8), "weight_scale": step,
        "bias": np.zeros(weight[-1], np.float32), "y_scale": np.array(3000, np.float32), "y_zero": point,
    }  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_nodes_that_share_weights_outlive_each_other_and_others_do_not_share(library: Library, kind: str):
    """The last number alone differs, so all but one of the bytes are equal."""
    op, x, shape, attributes = SHAPES[kind]
    given = feeds(x, shape)
    constants = [name for name in given if name != "x"]
    other = given["weight"].copy()
    other.flat[-1] ^= 0x40

    def opened(weight: np.ndarray) -> Any:
        return harness.session(op, {**given, "weight": weight}, attributes, library=library, constants=constants)

    expected = [
        harness.run(op, {**given, "weight": w}, attributes, library=library)[0] for w in (given["weight"], other)
    ]
    assert (expected[0] != expected[1]).any()
    sessions = [opened(weight) for weight in (given["weight"], given["weight"], other, given["weight"], other)]
    right = [expected[i] for i in (0, 0, 1, 0, 1)]
    while sessions:
        for session, answer in zip(sessions, right, strict=True):
            np.testing.assert_array_equal(session.run(None, {"x": given["x"]})[0], answer)
        del sessions[0], right[0], session


def test_equal_bytes_of_another_shape_are_another_weight(library: Library):
    """64 x 32 zeros and 32 x 64 zeros, and ones of the same count."""
    for k, n in ((64, 32), (32, 64), (64, 64)):
        given = feeds((3, k), (k, n)) | {"y_scale": np.array(100, np.float32)}
        for number in (0, 1):
            given["weight"] = np.full((k, n), number, np.int8)
            constants = [name for name in given if name != "x"]
            packed = harness.run(QUANT_LINEAR, given, {}, library=library, constants=constants)[0]
            np.testing.assert_array_equal(packed, harness.run(QUANT_LINEAR, given, {}, library=library)[0])
