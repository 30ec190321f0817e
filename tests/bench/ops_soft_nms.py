"""SoftNMS beside other implementations: kernel, op, function, numpy, torchvision's hard NMS, ensemble-boxes.

    python -m tests.bench.ops_soft_nms [--quick] [--isas]

Boxes lie on a 1000 x 1000 canvas. Clustered: a true box for every 20, sides 40 to 200, and 20 boxes around each, their
centres off by 12 % of the sides, their sides by 15 %. Uniform: sides 10 to 50, anywhere. Scores are uniform in [0, 1).
iou_threshold 0.3, sigma 0.5, min_score 0.001; torchvision's hard NMS has 0.5, which keeps far fewer boxes than soft
suppression does. One thread throughout. "kernel" is csrc/kernels/soft_nms.cc with the score threshold and the layout,
from C to C; ctypes adds a few microseconds, which count.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np

from calmclip.models.flow import Array
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN, METHODS, SOFT_NMS, VERSION
from tests.bench import ops
from tests.bench.alternate import alternate, line, machine

OPS = (SOFT_NMS,)
THRESHOLD, SIGMA, LEAST = 0.3, 0.5, 1e-3
SIZES = (100, 1000, 3000, 8000)
FUNCTION_UP_TO = 1000  # boxes; with more the function takes seconds


def clustered(n: int, seed: int = 0) -> tuple[Array, Array]:
    """-> boxes float32 [n, 4], scores float32 [n]."""
    rng = np.random.default_rng(seed)
    true = max(n // 20, 1)
    centre, sides = rng.uniform(0, 1000, (true, 2)), rng.uniform(40, 200, (true, 2))
    which = np.arange(n) % true
    centre = centre[which] + rng.normal(0, 0.12, (n, 2)) * sides[which]
    return _boxes(centre, sides[which] * np.exp(rng.normal(0, 0.15, (n, 2)))), rng.random(n, np.float32)


def uniform(n: int, seed: int = 0) -> tuple[Array, Array]:
    """-> boxes float32 [n, 4], scores float32 [n]."""
    rng = np.random.default_rng(seed)
    return _boxes(rng.uniform(0, 1000, (n, 2)), rng.uniform(10, 50, (n, 2))), rng.random(n, np.float32)


def _boxes(centre: Array, sides: Array) -> Array:
    return np.concatenate([centre - sides / 2, centre + sides / 2], axis=1).astype(np.float32)


def loop(boxes: Array, scores: Array, method: str) -> tuple[Array, Array]:
    """Soft-NMS as usual in numpy: float32 columns, one pass over the remaining boxes for every kept box."""
    places = np.flatnonzero(scores >= LEAST)
    x0, y0, x1, y1 = np.ascontiguousarray(boxes[places].T)
    area, score = (x1 - x0) * (y1 - y0), scores[places]
    kept, decayed = [], []
    while score.size:
        best = score.argmax()
        kept.append(places[best])
        decayed.append(score[best])
        width = np.minimum(x1, x1[best]) - np.maximum(x0, x0[best])
        height = np.minimum(y1, y1[best]) - np.maximum(y0, y0[best])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        iou = shared / (area + area[best] - shared)
        if method == "gaussian":
            score = score * np.exp(-(iou * iou) / np.float32(SIGMA))
        else:
            score = np.where(iou > THRESHOLD, score * (1 - iou), score)
        stays = score >= LEAST
        stays[best] = False
        x0, y0, x1, y1, area = x0[stays], y0[stays], x1[stays], y1[stays], area[stays]
        score, places = score[stays], places[stays]
    return np.array(kept), np.array(decayed, np.float32)


def kernel(library: Library, isa: str, boxes: Array, scores: Array, method: str) -> Callable[[], int]:
    """-> a call of `soft_nms_image` with prepared arguments."""
    size, pointer, real = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_float
    address = next(k.address for k in library.kernels if (k.name, k.isa) == ("soft_nms_image", isa))
    kind = ctypes.CFUNCTYPE(size, *[pointer] * 3, size, *[ctypes.c_int] * 2, *[real] * 3, size, *[pointer] * 2)
    function, n = kind(address), len(scores)
    hold = [boxes, scores, np.zeros(n, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)]
    arguments = [pointer(part.ctypes.data) for part in hold]
    settings = [size(n), METHODS.index(method), 0, real(THRESHOLD), real(SIGMA), real(LEAST), size(n)]
    call = lambda hold=hold: function(*arguments[:3], *settings, *arguments[3:])  # noqa: E731
    return call


def session(library: Library | None) -> Callable[[Array, Array, str], Callable[[], object]]:
    """The node in a plain ONNX Runtime: the op with ``library``, else its local function."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from calmclip.export.functions.soft_nms import OPSET, soft_nms

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kinds[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
        for tensors in (SOFT_NMS.inputs, SOFT_NMS.outputs)
    )
    node = helper.make_node(SOFT_NMS.name, list(SOFT_NMS.inputs), list(SOFT_NMS.outputs), domain=DOMAIN)
    graph = helper.make_graph([node], "alone", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[soft_nms()], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(str(library.path))
    opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def side(boxes: Array, scores: Array, method: str) -> Callable[[], object]:
        whole = np.array([[METHODS.index(method)], [0], [len(scores)]])
        real = np.array([[THRESHOLD], [SIGMA], [LEAST]], np.float32)
        classes = np.zeros(len(scores), np.int64)
        feeds = dict(zip(SOFT_NMS.inputs, (boxes, scores, classes, *whole[:2], *real, whole[2]), strict=True))
        return lambda: opened.run(None, feeds)

    return side


def ensemble() -> Callable[[Array, Array, str], Callable[[], object]] | None:
    try:
        from ensemble_boxes import soft_nms
    except ImportError:
        return None

    def side(boxes: Array, scores: Array, method: str) -> Callable[[], object]:
        unit = boxes.clip(0, 1000) / 1000  # it expects boxes in [0, 1]
        labels, code = np.zeros(len(scores)), 1 if method == "linear" else 2
        how = {"method": code, "iou_thr": THRESHOLD, "sigma": SIGMA, "thresh": LEAST}
        return lambda: soft_nms([unit], [scores], [labels], **how)

    return side


def main() -> None:
    parser = ops.options(__doc__, 3.0, "100 and 1000 boxes only, few rounds")
    parser.add_argument("--isas", action="store_true", help="the kernel of every instruction set instead of the others")
    arguments = parser.parse_args()
    library = ops.library()
    import torch
    from torchvision.ops import nms

    torch.set_num_threads(arguments.threads)
    isas = [k.isa for k in library.kernels if k.name == "soft_nms_image" and k.runs]
    op, function, ensembled = session(library), session(None), ensemble()
    print(machine(arguments.threads))
    if ensembled is None and not arguments.isas:
        print("ensemble-boxes is not installed: not measured")
    for make in (clustered, uniform):
        for n in SIZES[: 2 if arguments.quick else None]:
            boxes, scores = make(n)
            tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
            for method in ("linear", "gaussian"):
                ours = kernel(library, isas[-1], boxes, scores, method)
                kept = len(loop(boxes, scores, method)[0])
                if ours() != kept:
                    raise SystemExit(f"{ours()} boxes are kept, by numpy {kept}")
                sides: dict[str, Callable[[], object]] = {"kernel": ours, "op": op(boxes, scores, method)}
                if arguments.isas:
                    sides = {isa: kernel(library, isa, boxes, scores, method) for isa in reversed(isas)}
                else:
                    sides["hard nms"] = partial(nms, *tensors, 0.5)
                    sides["numpy"] = partial(loop, boxes, scores, method)
                    if n <= FUNCTION_UP_TO:
                        sides["function"] = function(boxes, scores, method)
                    if ensembled:
                        sides["ensemble-boxes"] = ensembled(boxes, scores, method)
                timings = alternate(
                    sides, seconds=0.5 if arguments.quick else arguments.seconds, least=5 if arguments.quick else 9
                )
                case = f"{make.__name__} {n} {method}"
                print(f"{line(case, timings, next(iter(sides)))}   kept {kept}", flush=True)


if __name__ == "__main__":
    main()
