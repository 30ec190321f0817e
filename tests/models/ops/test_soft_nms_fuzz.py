"""SoftNMS, thousands of inputs that fit or do not, in a process of its own: a crash is seen as a crash."""

import os
import subprocess
import sys

import numpy as np
import pytest

ODD = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 0.0, 1.0], np.float32)
LARGE = np.array([-1, 2, 3, 2**62, -(2**63), 2**63 - 1])


def fuzz(path: str, seed: int, count: int) -> dict[str, int]:
    """-> how many ran, and how many were refused. Everything else ends in an exception, or the process."""
    import onnxruntime as ort
    from onnx import TensorProto, helper
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    from calmclip.models.ops.spec import DOMAIN, SOFT_NMS, VERSION

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(k, kinds[t.dtype], None) for k, t in SOFT_NMS.inputs.items()]
    outputs = [helper.make_tensor_value_info(k, kinds[t.dtype], None) for k, t in SOFT_NMS.outputs.items()]
    node = helper.make_node(SOFT_NMS.name, list(SOFT_NMS.inputs), list(SOFT_NMS.outputs), domain=DOMAIN)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        helper.make_graph([node], "alone", inputs, outputs), opset_imports=opsets, ir_version=10
    ).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # refusals are what we are after
    options.enable_cpu_mem_arena = False  # each tensor has memory of its own, whose ends a sanitizer knows
    options.register_custom_ops_library(path)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    rng = np.random.default_rng(seed)
    tally = {"ran": 0, "refused": 0}
    for number in range(count):
        feeds = _inputs(rng, huge=number % 200 == 0)
        try:
            indices, scores, classes, images = session.run(None, feeds)
        except InvalidArgument as error:
            assert "SoftNMS: " in str(error), error  # noqa: PT017
            tally["refused"] += 1
            continue
        tally["ran"] += 1
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
            if most and (row >= np.float32(least)).any():  # the best of each image is kept as it was
                assert scores[mine][0] == row.max()
                assert indices[mine][0] == row.argmax()
    return tally


def _inputs(rng, *, huge):
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
        boxes = np.where(rng.random(boxes.shape) < 0.1, rng.choice(ODD, boxes.shape), boxes)
    if rng.random() < 0.3:
        odd = ODD if rng.random() < 0.3 else ODD[1:]
        scores = np.where(rng.random(shape) < 0.1, rng.choice(odd, shape), scores)
    classes = rng.integers(*((0, 4) if rng.random() < 0.7 else (-(2**63), 2**63 - 1)), shape, np.int64)
    whole = {"method": rng.integers(0, 3), "per_class": rng.integers(0, 2), "max_output": rng.choice([0, 1, 7, 10**6])}
    real = {
        "iou_threshold": rng.choice([-1, 0, 0.3, 0.5, 1]),
        "sigma": rng.choice([1e-40, 0.1, 0.5, 1e30]),
        "min_score": rng.choice([-np.inf, -1, 0, 1e-3, 0.5, np.inf]),
    }
    feeds = {
        "boxes": boxes,
        "scores": scores,
        "classes": classes,
        **{name: np.array([value], np.int64) for name, value in whole.items()},
        **{name: np.array([value], np.float32) for name, value in real.items()},
    }
    if rng.random() < 0.4:  # one thing is wrong
        name = rng.choice(list(feeds))
        value = feeds[name]
        if rng.random() < 0.5:
            other = [int(d) for d in rng.integers(0, 6, rng.integers(0, 5))]
            feeds[name] = np.resize(value, other) if value.size else np.zeros(other, value.dtype)
        else:
            bad = ODD if value.dtype == np.float32 else np.array([-1, 2, 3, 2**62, -(2**63), 2**63 - 1])
            feeds[name] = np.where(rng.random(value.shape) < 0.5, rng.choice(bad, value.shape), value).astype(
                value.dtype
            )
    return feeds


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_input_brings_the_process_down(library, count):
    done = subprocess.run(
        [sys.executable, __file__, str(library.path), str(count), str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": ":".join(path or "." for path in sys.path)},  # the sanitizers' settings, too
    )
    assert done.returncode == 0, done.stderr
    ran, refused = map(int, done.stdout.split())
    assert ran > count / 2
    assert refused > count / 10


if __name__ == "__main__":
    print(*fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).values())
