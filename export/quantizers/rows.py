"""Dynamic INT8 by rows: int8 weights, and each row of an activation in steps of its own.

Source: Dettmers et al. 2022 (arXiv 2208.07339), section 3.1, "vector-wise quantization"; Xiao et al. 2022 (arXiv
2211.10438), table 2, "per-token". Around 128, because the activations of decoders are about symmetric.

A few tokens of a language model have numbers a thousand times larger than all others (Sun et al. 2024, arXiv
2402.17762). A range of the whole tensor leaves the other tokens a handful of steps. Here such a token spoils no other,
and a row's answer depends on that row alone. Products of activations and convolutions stay in float.

Without ``alpha`` it needs no data. With it, columns that are large in every row are divided first, as in `smooth`; the
factors become part of the weight of the norm before, or of the operator that quantizes.

Ranges over the calibration feeds: minima and maxima [C] for inputs of matrix products.
"""

import numpy as np
import onnx
from onnx import TensorProto
from pydantic import Field

from calmclip.export.graph import Draft, attribute, matrices, node_of
from calmclip.export.qdq import quantize_weight
from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, smooth
from calmclip.export.quantizers.packing import pack
from calmclip.models.bundle.manifest import FrozenModel

MIDDLE, STEPS, LEAST = 128, 127.0, 1e-30  # as in `models.ops.spec.QUANT_ROWS`


class Params(FrozenModel):
    alpha: float | None = Field(default=None, ge=0.0, le=1.0, description="how much of outliers moves into weights")
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False  # 7-bit weights; see `static`


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return {} if params.alpha is None else smooth.observe(model, feeds, smooth.Params())


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = Draft(model)
    pack(draft)
    divided = {name: params.alpha if np.ndim(low) else None for name, (low, _) in ranges.items()}
    if params.alpha is not None:
        smooth.smooth(draft, ranges, divided, params.keep)
    chosen = {node.name for node in matrices(draft, params.keep)}
    last, middle = draft.add("last_axis", np.array([-1])), draft.add("rows_middle", np.uint8(MIDDLE))
    numbers = {
        name: draft.add(f"rows_{name}", np.float32(value))
        for name, value in (("steps", STEPS), ("least", LEAST), ("zero", MIDDLE))
    }
    nodes: list[onnx.NodeProto] = []
    written: set[str] = set()

    def write(source: str) -> None:
        """The uint8 rows {source}_uint8 and their scales {source}_scale."""
        nodes.extend([
            node_of("Abs", [source], f"{source}_size"),
            node_of("ReduceMax", [f"{source}_size", last], f"{source}_most", keepdims=1),
            node_of("Div", [f"{source}_most", numbers["steps"]], f"{source}_share"),
            node_of("Max", [f"{source}_share", numbers["least"]], f"{source}_scale"),
            node_of("Div", [source, f"{source}_scale"], f"{source}_ratio"),
            node_of("Round", [f"{source}_ratio"], f"{source}_whole"),
            node_of("Add", [f"{source}_whole", numbers["zero"]], f"{source}_around"),
            node_of("Cast", [f"{source}_around"], f"{source}_uint8", to=TensorProto.UINT8),
        ])  # fmt: skip
        written.add(source)

    for node in draft.nodes:
        if node.name not in chosen:
            nodes.append(node)
            continue
        source, weight, out = node.input[0], node.input[1], node.output[0]
        if source not in written:
            write(source)
        flipped = attribute(node, "transB") == 1
        stored = f"{weight}_{'flipped_' if flipped else ''}int8"
        if stored not in draft.constants:
            integers, scales = quantize_weight(draft.array(weight), 0 if flipped else 1, params.reduce_range)
            draft.add(stored, integers.T if flipped else integers)
            draft.add(f"{stored}_step", scales)
        bias = node.input[2] if len(node.input) > 2 else ""
        product = node_of("MatMulInteger", [f"{source}_uint8", stored, middle], f"{out}_int32")
        product.name = node.name
        product.metadata_props.extend(node.metadata_props)
        nodes += [
            product,
            node_of("Cast", [f"{out}_int32"], f"{out}_sum", to=TensorProto.FLOAT),
            # one after another: of their product ONNX Runtime (1.32) makes MatMulIntegerToFloat, which reads one number
            node_of("Mul", [f"{out}_sum", f"{source}_scale"], f"{out}_scaled"),
            node_of("Mul", [f"{out}_scaled", f"{stored}_step"], f"{out}_unbiased" if bias else out),
        ]
        if bias:
            nodes.append(node_of("Add", [f"{out}_unbiased", bias], out))
    draft.nodes = nodes
    return draft.finish()


QUANTIZERS.register("rows")(Quantizer(Params, quantize, observe, activations="uint8 per row, at run time"))
