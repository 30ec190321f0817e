"""QuantPatches: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch's
unfold in float64."""

import ctypes

import numpy as np
import pytest
import torch

from models.ops import reference
from models.ops.spec import QUANT_PATCHES
from tests.models.ops.quantized import ISAS, kernel, near, run

CASES = [((1, 3, 64, 96), (32, 32)), ((2, 3, 32, 48), (16, 16)), ((1, 3, 42, 28), (14, 14)), ((2, 1, 6, 35), (2, 7)),
         ((1, 4, 5, 3), (5, 1)), ((3, 2, 4, 66), (1, 33)), ((1, 3, 224, 224), (32, 32))]  # fmt: skip


def draw(seed, shape, scale=0.02, zero=None):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(0, 2, shape).astype(np.float32),
        "y_scale": np.array(scale, np.float32),
        "y_zero": np.array(rng.integers(256) if zero is None else zero, np.uint8),
    }


def exact(feeds, patch):
    columns = torch.nn.functional.unfold(torch.from_numpy(feeds["x"].astype(np.float64)), patch, stride=patch)
    return columns.transpose(1, 2).numpy() / float(feeds["y_scale"]) + int(feeds["y_zero"])


PROTOTYPE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float,
    ctypes.c_int32,
)  # fmt: skip


@pytest.fixture(params=ISAS)
def cut(library, request):
    """A kernel as a function of a row: -> [count, width], between guards that it must not touch."""
    function = kernel(library, "quant_patches", request.param, PROTOTYPE)
    if function is None:
        pytest.skip(f"no {request.param} here")

    def go(x, width, scale, zero):
        count, step = len(x) // width, width + 5
        y = np.full(count * step + 64, 77, np.uint8)
        function(x.ctypes.data, width, count, y.ctypes.data + 32, step, float(np.float32(1) / np.float32(scale)), zero)
        assert (y[:32] == 77).all()
        assert (y[-32:] == 77).all()
        rows = y[32:-32].reshape(count, step)
        assert (rows[:, width:] == 77).all()
        return rows[:, :width]

    return go


@pytest.mark.parametrize(("shape", "patch"), CASES)
def test_reference_equals_torch(shape, patch):
    feeds = draw(0, shape)
    assert near(reference.quant_patches(**feeds, patch=patch), exact(feeds, patch), most=1e-5)


def test_kernels_equal_float64(cut):
    for width in (*range(1, 36), 47, 48, 49, 63, 64, 65, 130):
        feeds = draw(width, (3 * width,), zero=(0, 128, 255, 77)[width % 4])
        y = cut(feeds["x"], width, float(feeds["y_scale"]), int(feeds["y_zero"]))
        assert near(y.ravel(), feeds["x"].astype(np.float64) / float(feeds["y_scale"]) + int(feeds["y_zero"]))


def test_ties_are_rounded_to_even_and_the_rest_is_cut_off(cut):
    x = np.array(
        [-0.5, 0.5, 1.5, 2.5, -1e30, 1e30, -np.inf, np.inf, 3e9, -3e9, 126.5, 127.5, -101, -102, 154, 155], np.float32
    )
    expected = [101, 101, 103, 103, 0, 255, 0, 255, 255, 0, 227, 229, 0, 0, 255, 255]
    assert cut(x, 16, 1.0, 101)[0].tolist() == expected
    assert cut(x, 8, 1.0, 101).ravel().tolist() == expected


@pytest.mark.parametrize(("shape", "patch"), CASES)
def test_op_and_function_equal_torch_whatever_the_threads(library, shape, patch):
    feeds = draw(1, shape)
    (y,) = run(QUANT_PATCHES, feeds, {"patch": patch}, library=library)
    assert near(y, exact(feeds, patch), most=1e-4)
    (two,) = run(QUANT_PATCHES, feeds, {"patch": patch}, library=library, threads=2)
    assert (two == y).all()
    (plain,) = run(QUANT_PATCHES, feeds, {"patch": patch}, library=None)
    assert near(plain, exact(feeds, patch), most=1e-4)


def test_op_and_function_empty(library):
    for given in (library, None):
        (y,) = run(QUANT_PATCHES, draw(0, (0, 3, 8, 8)), {"patch": (4, 2)}, library=given)
        assert y.shape == (0, 8, 24)


@pytest.mark.parametrize(
    ("feeds", "patch", "says"),
    [
        (draw(0, (3, 8, 8)), (4, 4), r"x has the shape \[3, 8, 8\]; expected \[batch, channels, height, width\]"),
        (draw(0, (1, 3, 8, 9)), (4, 4), r"x has the shape \[1, 3, 8, 9\]; expected multiples of the patch, 4 by 4"),
        (draw(0, (1, 3, 6, 8)), (4, 4), r"x has the shape \[1, 3, 6, 8\]; expected multiples of the patch"),
        (draw(0, (1, 3, 8, 8), scale=0), (4, 4), "y_scale is 0.0+; expected a positive, normal number"),
        (draw(0, (1, 3, 8, 8)), (4, 0), r"patch is \[4, 0\]; expected a height and a width"),
        (draw(0, (1, 3, 8, 8)), (4, 4, 4), r"patch is \[4, 4, 4\]; expected a height and a width"),
    ],
)
def test_op_refuses(library, feeds, patch, says):
    with pytest.raises(Exception, match=f"QuantPatches: {says}"):
        run(QUANT_PATCHES, feeds, {"patch": patch}, library=library)
