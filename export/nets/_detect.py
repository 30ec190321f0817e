"""The `detect` graph that detectors share: scores of regions and prompts -> the candidates SoftNMS begins with.

A net says how a region and a prompt make a score; what follows is the same for all of them.
"""

from collections.abc import Mapping

import onnx
from onnx import numpy_helper, parser

from calmclip.export.nets import Built
from calmclip.export.rewrites.soft_nms import CANDIDATES as CANDIDATE
from calmclip.export.rewrites.soft_nms import SETTINGS
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.spec import SOFT_NMS

OPSET = 18
CANDIDATES = 2000  # box-prompt pairs, best first, that reach SoftNMS: its loop must end, whatever is asked


def detect_graph(
    regions: Mapping[str, Tensor],
    dim: int,
    score: str,
    constants: Mapping[str, Array],
    example: Arrays,
    promises: Mapping[str, int],
) -> Built:
    """-> the graph: a candidate is a box-prompt pair with a score of at least min_score; the best `CANDIDATES` are
    answered.

    ``regions``: those outputs of the `regions` graph that it takes, for one picture. ``score``: ONNX text that makes
    ``pairs`` [P, Q] of them, of ``text_embeds`` [Q, ``dim``] and of ``constants``; ``labels`` int64 [1] holds Q, and
    ``first`` 0. ``example``: feeds that give candidates.
    """
    inputs = {
        **regions,
        "text_embeds": Tensor(dtype="float32", shape=("Q", dim)),
        "min_score": SETTINGS["min_score"],
    }
    outputs = {**CANDIDATE, "candidates": Tensor(dtype="int64", shape=(1,))}
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {OPSET}]>
        detect ({_declare(inputs)}) => ({_declare(outputs)})
        <int64[1] first = {{0}}, int64[1] last = {{-1}}, int64[1] most = {{{CANDIDATES}}}>
        {{
            labels = Shape <start = 0, end = 1> (text_embeds)
            {score}
            flat = Reshape (pairs, last)
            good = GreaterOrEqual (flat, min_score)
            found = NonZero (good)
            all_pairs = Squeeze (found, first)
            candidates = Shape (all_pairs)
            all_scores = Gather (flat, all_pairs)
            count = Min (candidates, most)
            candidate_scores, best = TopK (all_scores, count)
            pair = Gather (all_pairs, best)
            box_of = Div (pair, labels)
            candidate_classes = Mod (pair, labels)
            all_boxes = Squeeze (boxes, first)
            candidate_boxes = Gather (all_boxes, box_of)
        }}
    """)
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return Built(model, attach=("soft_nms",), examples=(example,), promises={**promises, SOFT_NMS.name: 1})


def _declare(tensors: Mapping[str, Tensor]) -> str:
    kinds = {"float32": "float", "int64": "int64"}
    return ", ".join(f"{kinds[t.dtype]}[{', '.join(map(str, t.shape))}] {name}" for name, t in tensors.items())
