"""The `detect` graph of all detectors: scores of regions and prompts -> the candidates that SoftNMS starts with.

A net says how a region and a prompt make a score. The selection of candidates is the same for all nets.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper, parser

from calmclip.export.nets import Built, float32
from calmclip.export.rewrites.soft_nms import CANDIDATES as CANDIDATE
from calmclip.export.rewrites.soft_nms import SETTINGS
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.spec import SOFT_NMS

OPSET = 18
CANDIDATES = 2000  # box-prompt pairs that reach SoftNMS, best first: its loop must end for every request


def detect_graph(
    regions: Mapping[str, Tensor],
    dim: int,
    score: str,
    constants: Mapping[str, Array],
    example: Arrays,
    promises: Mapping[str, int],
) -> Built:
    """A candidate is a box-prompt pair with a score of at least min_score; the graph outputs the best `CANDIDATES`.

    ``regions``: the outputs of the `regions` graph that it takes, for one picture. ``score``: ONNX text that computes
    ``pairs`` [P, Q] from them, from ``text_embeds`` [Q, ``dim``] and from ``constants``; ``labels`` int64 [1] holds Q,
    and ``first`` 0. ``example``: feeds that give candidates.
    """
    inputs = {**regions, "text_embeds": float32("Q", dim), "min_score": SETTINGS["min_score"]}
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
    feeds = {name: np.ascontiguousarray(array, np.float32) for name, array in example.items()}
    return Built(model, attach=("soft_nms",), examples=(feeds,), promises={**promises, SOFT_NMS.name: 1})


def example(random: np.random.Generator, regions: int, dim: int, side: int) -> dict[str, Array]:
    """Feeds of one picture: random boxes, and class embeddings that are near one of five prompts each."""
    texts = random.standard_normal((5, dim))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    rows = texts[random.integers(0, len(texts), regions)] + random.standard_normal((regions, dim)) / dim**0.5
    corners = random.uniform(0, side / 2, (regions, 2))
    return {
        "class_embeds": (rows / np.linalg.norm(rows, axis=1, keepdims=True))[None],
        "boxes": np.concatenate((corners, corners + random.uniform(1, side / 2, (regions, 2))), axis=1)[None],
        "text_embeds": texts,
        "min_score": np.full(1, 0.1),
    }


def _declare(tensors: Mapping[str, Tensor]) -> str:
    kinds = {"float32": "float", "int64": "int64"}
    return ", ".join(f"{kinds[t.dtype]}[{', '.join(map(str, t.shape))}] {name}" for name, t in tensors.items())
