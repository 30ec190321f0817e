"""Softmax, thousands of nodes and inputs that fit or do not, in a process of its own: a crash is seen as a crash."""

import os
import subprocess
import sys

import numpy as np
import pytest

ODD = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4028235e38, 1e6, -1e6, 1e-45, -0.0, 88.8, -88.8], np.float32)
SIDES = (0, 1, 1, 2, 3, 5, 8, 16, 17, 33)
LONG = (319, 321, 577, 4097, 20_000, 70_000)
WRONG = (
    {"axis": 1.0}, {"axis": [0]}, {"axis": "0"}, {"axis": 2**63 - 1}, {"axis": -(2**63)}, {"axis": 7},
    {"gamma": 0}, {"gamma": [-0.1]}, {"gamma": 0.1}, {"gamma": float("nan")}, {"gamma": -3e38}, {"gamma": "x" * 9999},
    {"zeta": 1}, {"zeta": 0.999}, {"zeta": float("nan")}, {"zeta": float("inf")}, {"zeta": -2.0},
)  # fmt: skip


def fuzz(path: str, seed: int, count: int) -> dict[str, int]:
    """-> how many ran, and how many were refused. Everything else ends in an exception, or the process."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from calmclip.models.ops import reference
    from calmclip.models.ops.spec import DOMAIN, VERSION

    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    rng = np.random.default_rng(seed)
    tally = {"ran": 0, "refused": 0}
    for number in range(count):
        x = _values(rng)
        attributes = {
            "axis": int(rng.integers(-x.ndim, x.ndim)) if x.ndim else 0,
            "gamma": float(rng.choice([0, -1e-8, -0.003, -1, -1e30])),
            "zeta": float(rng.choice([1, 1.003, 2, 1e30])),
        }
        for name in ("axis", "gamma", "zeta"):
            if rng.random() < 0.2:
                del attributes[name]
        bad = WRONG[int(rng.integers(len(WRONG)))] if rng.random() < 0.25 else {}
        options = ort.SessionOptions()
        options.log_severity_level = 4  # refusals are what we are after
        options.intra_op_num_threads = int(rng.integers(1, 3))
        options.enable_cpu_mem_arena = False  # each tensor has memory of its own, whose ends a sanitizer knows
        options.register_custom_ops_library(path)
        node = helper.make_node("Softmax", ["x"], ["y"], domain=DOMAIN, **attributes | bad)
        graph = helper.make_graph([node], "alone", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        try:
            (y,) = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        except Exception as error:
            assert bad or x.ndim == 0, (number, attributes, x.shape, error)  # noqa: PT017
            assert "Softmax: " in str(error), error  # noqa: PT017
            tally["refused"] += 1
            continue
        assert not bad, (number, bad)
        tally["ran"] += 1
        with np.errstate(all="ignore"):
            expected = reference.softmax(x, **attributes)
        # what a difference of the exponent's last place becomes, times the stretch
        most = 2e-5 * (attributes.get("zeta", 1.0) - attributes.get("gamma", 0.0))
        np.testing.assert_allclose(y, expected, rtol=0, atol=most, err_msg=f"{number}: {attributes}")
    return tally


def _values(rng):
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


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_node_and_no_input_brings_the_process_down(library, count):
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
