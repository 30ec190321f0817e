"""Everything 8-bit, one scale per tensor: the setting in which "Quantizable Transformers" compares models.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5 and appendix C. Weights are symmetric int8. Activations are
asymmetric uint8 with static ranges, over batches of calibration inputs in their order. `sites` finds the tensors, and
`estimators` estimates the ranges.

The paper simulates quantization; this graph runs in integers in ONNX Runtime. The differences:

* A range holds 0, because ONNX Runtime's arithmetic needs an exact 0; the paper's grid does not.
* Probabilities have the scale 1/255 and the zero point 0 and are not observed.
* What the towers fold is quantized folded: the type embedding of a token and the bias of a patch are in the position
  table, and the scale of attention is in the weights of q.
* The bias of a convolution is int32 at the product of both scales, so the scale of its weight is large enough for that.
* A mixture behind its gate is quantized once more, for the product that reads it.
* ``weight_bits`` and ``activation_bits`` under 8 are simulated: the smaller grid, stored in 8 bits.

This quantizer does not treat outliers and is not made for speed (see `fast`); `search` is for bundles that serve.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.graph import Draft, node_of, output_axis
from calmclip.export.qdq import BACK, least_weight_scale, quantize_bias, scale_and_zero
from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges
from calmclip.export.quantizers.estimators import Grid, Running, WeightRange, weight_scale
from calmclip.export.quantizers.ranges import collect, widest
from calmclip.export.quantizers.sites import MOVES, Kind, Sites, find_sites
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array


class Params(FrozenModel):
    weights: WeightRange = Field(
        default="minmax", description="range of a weight: largest magnitude, or least squared error"
    )
    percentile: float = Field(
        default=100.0, gt=50.0, le=100.0, description="of a batch's numbers; 100: minimum and maximum"
    )
    batch: int = Field(default=32, ge=1, description="calibration inputs in a batch of the running minima and maxima")
    weight_bits: Literal[4, 6, 8] = 8
    activation_bits: Literal[6, 8] = 8
    per_channel: bool = Field(
        default=False, description="a scale per output of a product; no table of the paper has this"
    )
    head: bool = Field(default=False, description="quantize the products of the head too")
    floats: tuple[Kind, ...] = Field(
        default=(), description="kinds of tensors that stay in float, to measure what 8 bits cost in each"
    )
    keep: tuple[str, ...] = ()  # names of nodes that stay in float

    def sites(self, model: onnx.ModelProto) -> Sites:
        return find_sites(model, self.keep, self.head).without(self.floats)


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    names = list(params.sites(model).observed)
    running = Running(params.batch, params.percentile)
    return collect(model, running.batches(feeds), names, running.add).lent(running.ranges, widest)


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = Draft(model)
    _Writer(draft, params.sites(model), ranges, params).write()
    return draft.finish()


class _Writer:
    """Writes a QuantizeLinear / DequantizeLinear pair after every site, for all its readers. A product that reads a
    site moved gets a second pair, so that the runtime finds both factors in 8 bits."""

    def __init__(self, draft: Draft, sites: Sites, ranges: Ranges, params: Params) -> None:
        self.draft, self.sites, self.ranges, self.params = draft, sites, ranges, params
        self.quantized = {*sites.observed, *sites.probabilities}
        self.top = 2**params.activation_bits - 1
        self.ends = self.quantized & draft.outputs
        self.nodes: list[onnx.NodeProto] = []
        self.written: set[str] = set()

    def write(self) -> None:
        for value in self.draft.model.graph.input:
            if value.name in self.quantized:
                self.pair(value.name, value.name)
        for original in self.draft.nodes:
            node = deepcopy(original)
            for place, name in enumerate(original.input):
                node.input[place] = self.read(node, place, name)
            for place, name in enumerate(original.output):
                node.output[place] = self.before(name)
            after = self.product(node, original) if node.name in self.sites.weights else self.lookup(node)
            self.nodes += [node, *after]
            for name in original.output:
                if name in self.quantized:
                    self.pair(name, name)
        self.draft.nodes = self.nodes

    def read(self, node: onnx.NodeProto, place: int, name: str) -> str:
        """-> the tensor that ``node`` reads instead of ``name``."""
        site = self.sites.moved.get((node.name, place))
        if site and name not in self.written:
            self.pair(name, site)
        return self.after(name) if site or name in self.quantized else name

    def before(self, name: str) -> str:
        """The name of a tensor before its pair: an output of the graph keeps its name for the dequantized tensor."""
        return f"{name}_float" if name in self.ends else name

    def after(self, name: str) -> str:
        return name if name in self.ends else f"{name}{BACK}"

    def pair(self, name: str, site: str) -> None:
        """Write the pair of ``name``, at the scale of ``site``."""
        self.written.add(name)
        scale, zero = self.scale_and_zero(site)
        source = self.before(name)
        if self.top < 255 and name == site:  # uint8 would hold more numbers than the smaller grid
            bounds = {end: np.float32(i - int(zero)) * scale for end, i in (("least", 0), ("most", self.top))}
            limits = [self.draft.add(f"{site}_{end}", bound) for end, bound in bounds.items()]
            self.nodes.append(node_of("Clip", [source, *limits], f"{name}_cut"))
            source = f"{name}_cut"
        grid = [self.draft.add(f"{site}_uint8_step", scale), self.draft.add(f"{site}_uint8_zero", zero)]
        self.nodes.append(node_of("QuantizeLinear", [source, *grid], f"{name}_uint8"))
        self.nodes.append(node_of("DequantizeLinear", [f"{name}_uint8", *grid], self.after(name)))

    def scale_and_zero(self, site: str) -> tuple[np.float32, np.uint8 | np.int8]:
        low, high = (0.0, 1.0) if site in self.sites.probabilities else self.ranges[site]
        return scale_and_zero(float(low), float(high), top=self.top)

    def product(self, node: onnx.NodeProto, original: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Give ``node`` its 8-bit weight; -> the node that adds its bias, which an integer matrix product cannot. The
        bias of a convolution is int32 at the product of both scales, as the runtime needs it: in effect float."""
        name, parts, axis = node.input[1], self.sites.weights[node.name], output_axis(node)
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Gemm":
            if axis == 0:
                name, axis = self.draft.add(f"{name}_columns", self.draft.array(name).T), 1
            node.op_type = "MatMul"
            del node.attribute[:], node.input[2:]
        if self.params.per_channel:
            parts = (1,) * sum(parts)
        site, least = self.sites.moved.get((node.name, 0), original.input[0]), None
        if node.op_type == "Conv" and bias and site in self.quantized:
            input_scale, _ = self.scale_and_zero(site)
            least = least_weight_scale(input_scale, self.draft.array(bias))
        stem, scale = self.constant(name, parts, axis, least)
        node.input[1] = self.dequantized(stem, axis if scale.ndim else None)
        if least is not None:
            scales = np.asarray(input_scale * scale)
            integers = quantize_bias(self.draft.array(bias), scales)
            stem = self.grid(self.draft.add(f"{node.output[0]}_bias_int32", integers), scales, np.int32)
            node.input[2] = self.dequantized(stem, 0 if scales.ndim else None)
        elif bias:
            out, node.output[0] = node.output[0], f"{node.output[0]}_product"
            return [node_of("Add", [node.output[0], bias], out)]
        return []

    def lookup(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """If ``node`` reads a table, let it read the 8-bit table; -> the node that dequantizes the rows it picks."""
        for place, name in enumerate(node.input):
            if (node.name, place) not in self.sites.tables:
                continue
            stem, _ = self.constant(name)
            if node.op_type not in MOVES:
                node.input[place] = self.dequantized(stem, None)
                continue
            out, node.output[0] = node.output[0], f"{node.output[0]}_rows"
            node.input[place] = stem
            return [node_of("DequantizeLinear", [node.output[0], f"{stem}_step", f"{stem}_zero"], out)]
        return []

    def dequantized(self, stem: str, axis: int | None) -> str:
        """-> the constant ``stem`` in float again."""
        name = f"{stem}{BACK}"
        if name not in self.written:
            self.written.add(name)
            attributes = {} if axis is None else {"axis": axis}
            inputs = [stem, f"{stem}_step", f"{stem}_zero"]
            self.nodes.append(node_of("DequantizeLinear", inputs, name, **attributes))
        return name

    def constant(
        self, name: str, parts: Sequence[int] = (), axis: int = 0, least: Array | None = None
    ) -> tuple[str, Array]:
        """Add the constant ``name`` on its grid, its scale and its zero point; -> its new name and its scale: a number,
        or one number per output if it holds several tensors, of ``parts`` outputs along ``axis``. No scale is under the
        ``least`` of its outputs."""
        values = self.draft.array(name)
        grid = Grid.of(values, self.params.weight_bits)
        cuts = np.cumsum(parts)[:-1]
        pieces = np.split(values, cuts, axis) if len(parts) > 1 else [values]
        scales = [weight_scale(piece, grid, self.params.weights) for piece in pieces]
        if least is not None:
            bounds = np.split(least, cuts) if len(parts) > 1 else [least]
            scales = [np.maximum(scale, np.float32(of.max())) for scale, of in zip(scales, bounds, strict=True)]
        scale = np.repeat(scales, parts) if len(parts) > 1 else np.asarray(scales[0])
        integers = np.concatenate([grid.nearest(piece, s) for piece, s in zip(pieces, scales, strict=True)], axis)
        stem = self.draft.add(f"{name}_{grid.dtype.__name__}", integers.astype(grid.dtype))
        return self.grid(stem, scale, grid.dtype), scale

    def grid(self, stem: str, scale: Array, dtype: type[np.integer]) -> str:
        """Add scale and zero point of the constant ``stem``; -> ``stem``."""
        self.draft.add(f"{stem}_step", scale)
        self.draft.add(f"{stem}_zero", np.zeros_like(scale, dtype))
        return stem


QUANTIZERS.register("paper")(
    Quantizer(Params, quantize, observe, weights="int8 per tensor", activations="uint8 per tensor")
)
