"""Detection with the built-in model beside its `regions` graph: the `detect` graph, and how two runs are compared.

The `detect` graph compares the regions with the prompts and with phrases of background, which absorb regions that show
no prompt. It outputs box-prompt pairs, and export appends SoftNMS:

    p = softmax(SCALE cos)[prompt] * objectness
    score / (1 - score) = FACTOR p^LOW / (1 - p)^HIGH

The last line makes the score the part of detections with it that are right: beta calibration (Kull, Silva Filho and
Flach 2017, Beyond sigmoids, eq. 4). It changes the order of no two pairs.
"""

import numpy as np

from calmclip.export.nets import Built, float32
from calmclip.export.nets.common import detect_graph as detection
from calmclip.export.nets.mini.facts import PROPOSALS, SIDE
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.spec import SOFTMAX

SCALE = 15.0
LOW, HIGH, FACTOR = (
    0.66,
    4.25,
    0.08,
)  # fitted by the part `scores` of tests/bench/detector.py; README.md has the reliability
MIN_SCORE = 0.26  # of the best F1, the mean for 1, 5, 20 and 80 names; the same script and page


def detect_graph(background: Array, scale: float = SCALE) -> Built:
    """background [G, D] unit rows -> the graph that turns regions and prompts into candidates for SoftNMS."""
    dim = background.shape[1]
    regions = {
        "class_embeds": float32(1, "P", dim),
        "boxes": float32(1, "P", 4),
        "objectness": float32(1, "P"),
    }
    score = """
        described = Concat <axis = 0> (text_embeds, background)
        directions = Transpose (described)
        region = Squeeze (class_embeds, first)
        cosines = MatMul (region, directions)
        logits = Mul (cosines, scale)
        chances = Softmax <axis = -1> (logits)
        wanted = Slice (chances, first, labels, axis)
        column = Transpose (objectness)
        product = Mul (wanted, column)
        rest = Sub (one, product)
        others = Max (rest, least)
        rise = Pow (product, low)
        fall = Pow (others, high)
        scaled = Mul (rise, factor)
        odds = Div (scaled, fall)
        all = Add (odds, one)
        pairs = Div (odds, all)
    """
    numbers = {"scale": scale, "one": 1.0, "least": 1e-6, "low": LOW, "high": HIGH, "factor": FACTOR}
    constants = {name: np.array(number, np.float32) for name, number in numbers.items()}
    constants |= {"background": background.astype(np.float32), "axis": np.array([1])}
    random = np.random.default_rng(0)
    example = detection.example(random, PROPOSALS, dim, SIDE)
    example["objectness"] = np.sort(random.random((1, PROPOSALS)))[:, ::-1]
    return detection.detect_graph(regions, dim, score, constants, example, {SOFTMAX.name: 1})


def summary(outputs: Arrays) -> Arrays:
    """A summary of each picture's proposals that does not depend on their order, and hardly on the last of them.

    A rounding error may swap two equal proposals, or replace the hundredth. So these are means over the proposals
    weighted by objectness squared (boxes relative to the input), and the squares themselves, best first: a picture
    without things has a hundred proposals of low objectness, which no request returns.
    """
    weight = outputs["objectness"][..., None].astype(np.float64) ** 2
    total = np.maximum(weight.sum(axis=1), 1e-12)
    means = {
        name: (weight * outputs[name]).sum(axis=1) / total / unit
        for name, unit in (("class_embeds", 1), ("boxes", SIDE))
    }
    return {**means, "objectness": weight[..., 0]}
