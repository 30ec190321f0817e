"""Segmentation with the built-in model beside its `regions` and `dense` graphs: the graphs `masks` and `known`.

`known` tells how near a label is to one of the names that the box network was trained to find: a label that is none of
them, nor means one, is not looked for in boxes (`models.segmenters.boxes`). No graph of them is quantized: `known` is
one product, and `masks` takes a small part of the time of `regions`.
"""

import numpy as np
import onnx
from onnx import numpy_helper, parser

from calmclip.export.nets import Built, Tower, float32
from calmclip.export.nets.common import dense_map
from calmclip.export.nets.mini.facts import FINE_CELLS, MASK_WIDTH, SAMPLES, SIDE, WIDTH
from calmclip.models.flow import Array, Arrays


def dense_summary(outputs: Arrays) -> Arrays:
    """Both maps of `dense` by the means over their windows: a cell of one colour is small, so rounding turns it, and
    no mask depends on one cell."""
    patches, map16 = (dense_map.summary({"patches": outputs[name]})["regions"] for name in ("patches", "map16"))
    return {"regions": patches, "map16": map16}


def masks_tower() -> Tower:
    """The tower of the graph `masks`, without its module: one picture, any number of boxes."""
    inputs = {"mask_features": float32(1, MASK_WIDTH, FINE_CELLS, FINE_CELLS), "boxes": float32(1, "N", 4)}
    return Tower.drawn(None, inputs, {"mask_logits": float32(1, "N", SAMPLES, SAMPLES)}, None, "none", batch=False)


def masks_graph(model: onnx.ModelProto) -> Built:
    random = np.random.default_rng(0)
    corners = random.uniform(0, SIDE / 2, (1, 5, 2))
    boxes = np.concatenate((corners, corners + random.uniform(8, SIDE / 2, corners.shape)), axis=-1)
    features = random.standard_normal((1, MASK_WIDTH, FINE_CELLS, FINE_CELLS))
    return Built(model, examples=({"mask_features": features.astype(np.float32), "boxes": boxes.astype(np.float32)},))


def known_graph(names: Array) -> Built:
    """names float32 [M, D] unit rows -> the graph text_embeds [Q, D] -> nearest [Q], the best cosine with a name.

    The names are columns, so that no file of weights is shared with `regions`: it would change the embedding digest.
    """
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18]>
        known (float[Q, {WIDTH}] text_embeds) => (float[Q] nearest)
        <int64[1] last = {{-1}}>
        {{
            cosines = MatMul (text_embeds, names)
            nearest = ReduceMax <keepdims = 0> (cosines, last)
        }}
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(names.T, np.float32), "names"))
    onnx.checker.check_model(model, full_check=True)
    rows = np.random.default_rng(0).standard_normal((3, names.shape[1]))
    return Built(
        model, examples=({"text_embeds": (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)},)
    )
