"""Towers of unusual shapes -> the operators that must take them: nothing of them stays in the unfused graph.

One query over many keys, positions that rotate, more than 1,024 patches, and widths that fill no vector.
"""

import numpy as np
import pytest
import torch

from calmclip.export import rewrites
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.spec import DOMAIN

timm = pytest.importorskip("timm")
PRODUCTS = {"MatMul", "Gemm", "Conv", "Softmax", "Exp", "MatMulInteger"}
# name -> timm's net, what makes it small, and its operators. A net of two blocks has four products in each, which give
# bytes or floats; a norm each before attention and MLP; and one attention.
BLOCKS = {"QuantPatches": 1, "QuantAttention": 2}
SHAPES = {
    "one query over all patches": (
        "vit_base_patch16_siglip_224",
        {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4},
        # the pool: q of the probe, k and v, its attention, out, a norm, and an MLP
        BLOCKS | {"QuantAttention": 3, "QuantLinear": 8, "QuantLinearToFloat": 6, "QuantLayerNorm": 6},
    ),
    "rotated queries and keys": (
        "eva02_tiny_patch14_224",
        {"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 4},
        # q, k, v and both halves of the gated MLP are float32 until they are rotated or gated
        BLOCKS | {"QuantLinear": 1, "QuantLinearToFloat": 8, "QuantLayerNorm": 4},
    ),
    "1,089 patches": (
        "vit_base_patch16_224",
        {"img_size": 528, "depth": 2, "embed_dim": 32, "num_heads": 2},
        BLOCKS | {"QuantLinear": 5, "QuantLinearToFloat": 4, "QuantLayerNorm": 4},
    ),
    "widths of 3 heads of 22": (
        "vit_base_patch16_224",
        {"img_size": 48, "depth": 2, "embed_dim": 66, "num_heads": 3, "mlp_ratio": 1.5},
        BLOCKS | {"QuantLinear": 5, "QuantLinearToFloat": 4, "QuantLayerNorm": 4},
    ),
    "patches of 13 pixels, an odd width": (
        "vit_base_patch16_224",
        {"img_size": 65, "patch_size": 13, "depth": 2, "embed_dim": 51, "num_heads": 3},
        BLOCKS | {"QuantLinear": 5, "QuantLinearToFloat": 4, "QuantLayerNorm": 4},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_product_of_the_shape_becomes_an_op(library, name):
    kind, small, ops = SHAPES[name]
    torch.manual_seed(0)
    net = timm.create_model(kind, pretrained=False, num_classes=0, **small).eval().requires_grad_(False)
    for part in net.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    side = small["img_size"]
    pixels = Tensor(dtype="float32", shape=("B", 3, side, side))
    features = Tensor(dtype="float32", shape=("B", small["embed_dim"]))
    model = to_onnx(Tower(net, {"pixels": pixels}, {"features": features}, None, "none"))
    random = np.random.default_rng(0)
    feeds = [{"pixels": random.normal(size=(1, 3, side, side)).astype(np.float32)} for _ in range(3)]
    fast = QUANTIZERS.get("fast")
    quantized = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    done = rewrites.apply(quantized, rewrites.swaps())
    assert done.ops() == ops
    assert not PRODUCTS & {node.op_type for node in done.model.graph.node if node.domain != DOMAIN}
    answers = [
        onnx_run(graph, library=way)(feeds[0])["features"].ravel()
        for graph, way in ((model, None), (done.model, library), (done.model, None))
    ]
    exact, compiled, function = (answer / np.linalg.norm(answer) for answer in answers)
    assert exact @ compiled > 0.999
    assert compiled @ function > 0.9999
