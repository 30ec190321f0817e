"""The `detect` graph of a net whose regions have vectors in the space of its texts: of given boxes, windows or queries.

A score is the head's probability, times objectness. It is made for the finished net, because its texts are embedded
with the text tower as it is then.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from calmclip.export import parity
from calmclip.export.nets import Built, Net, float32, ready
from calmclip.export.nets.common import detect_graph as detection
from calmclip.export.nets.mini.facts import BACKGROUND
from calmclip.models.bundle.manifest import Plugin, TextPreprocess
from calmclip.models.flow import Array
from calmclip.models.ops.spec import SOFTMAX
from calmclip.models.preprocess.text import TextPreparer

_REGIONS = 64  # of the example on which the graphs before and after the rewrites are compared

# head -> the ONNX text that computes the probabilities ``chances`` [P, Q] of the regions' cosines, see `detect_graph`
SCORES: Mapping[str, str] = {
    "cosine": """
        described = Concat <axis = 0> (text_embeds, background)
        directions = Transpose (described)
        cosines = MatMul (region, directions)
        logits = Mul (cosines, scale)
        all_chances = Softmax <axis = -1> (logits)
        chances = Slice (all_chances, first, labels, axis)
    """,
    "sigmoid": """
        directions = Transpose (text_embeds)
        cosines = MatMul (region, directions)
        scaled = Mul (cosines, scale)
        logits = Add (scaled, bias)
        chances = Sigmoid (logits)
    """,
}


def with_detector(net: Net) -> Net:
    """``net`` with a graph `detect` and the task, if it has vectors of regions and can embed texts beside them."""
    head = net.classifier.head if net.classifier else None
    gives = net.towers.get("regions") or net.towers.get("dense")
    if gives is None or head is None or head.name not in SCORES or "text" not in net.towers:
        return net
    dim = int(next(iter(gives.outputs.values())).shape[-1])
    constants = {name: np.array(head.params[name], np.float32) for name in ("scale", "bias") if name in head.params}
    if head.name == "cosine":
        constants |= {"background": _embedded(net, BACKGROUND), "axis": np.array([1])}
    built = {**net.built, "detect": detect_graph(head, dim, constants)}
    return replace(net, built=built, tasks=(*net.tasks, "detect"))


def detect_graph(head: Plugin, dim: int, constants: Mapping[str, Array]) -> Built:
    """Regions with objectness and texts -> candidates: the head's probability times objectness. Of the head cosine it
    is among the labels and the phrases ``background`` [G, ``dim``], which absorb regions that show no label."""
    regions = {"class_embeds": float32(1, "P", dim), "boxes": float32(1, "P", 4), "objectness": float32(1, "P")}
    score = f"""
        region = Squeeze (class_embeds, first)
        {SCORES[head.name]}
        column = Transpose (objectness)
        pairs = Mul (chances, column)
    """
    random = np.random.default_rng(0)
    example = detection.example(random, _REGIONS, dim, 224)
    example |= {"objectness": random.random((1, _REGIONS)), "min_score": np.full(1, 1e-6)}
    promises = {SOFTMAX.name: 1} if head.name == "cosine" else {}
    return detection.detect_graph(regions, dim, score, constants, example, promises)


def _embedded(net: Net, phrases: tuple[str, ...]) -> Array:
    """-> float32 [len(phrases), D] by the net's text tower, which stays as it is."""
    tower = ready(replace(net, towers={"text": net.towers["text"]})).towers["text"]
    assert isinstance(tower.preprocess, TextPreprocess)
    with tempfile.TemporaryDirectory() as folder, parity.one_thread():
        (Path(folder) / tower.preprocess.tokenizer).write_bytes(net.files[tower.preprocess.tokenizer])
        preparer, run = TextPreparer(tower.preprocess, Path(folder)), parity.torch_run(tower)
        rows = [next(iter(run(preparer.prepare([phrase])).values())) for phrase in phrases]
    return np.concatenate(rows)
