"""Everything in 8 bits, one scale a tensor: the set-up that "Quantizable Transformers" measures models by.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5 and appendix C. Weights symmetric int8, activations
asymmetric uint8 and static, over batches of calibration inputs in their order. Which tensors: `_sites`; how ranges are
estimated: `_estimators`.

Where the paper simulates, this is a graph that ONNX Runtime runs in integers. What that changes:

* A range holds 0, which ONNX Runtime's arithmetic wants exact; the paper's grid does not enforce it.
* Probabilities have the scale 1/255 and the zero point 0, without being observed.
* What the towers fold is folded here too: the type of a token and the bias of a patch lie in the table of positions,
  the scale of attention in the weights of q, so they are quantized with them.
* The bias of a convolution is an int32 times both scales, so its weight's is as wide as that asks for.
* A mixture behind its gate is quantized once more, for the product that reads it.
* ``weight_bits`` and ``activation_bits`` under 8 are simulated: the narrower grid, stored in 8 bits.

There is no help for outliers here, nor for speed (`fast`): `search` is for bundles that are to be served.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq
from calmclip.export.quantizers._estimators import Grid, Running, WeightRange, weight_scale
from calmclip.export.quantizers._sites import MOVES, Sites, sites
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array


class Params(FrozenModel):
    weights: WeightRange = Field("minmax", description="range of a weight: largest magnitude, or least squared error")
    percentile: float = Field(100.0, gt=50.0, le=100.0, description="of a batch's numbers; 100: minimum and maximum")
    batch: int = Field(32, ge=1, description="calibration inputs in a batch of the running minima and maxima")
    weight_bits: Literal[4, 6, 8] = 8
    activation_bits: Literal[6, 8] = 8
    per_channel: bool = Field(False, description="a scale for each output of a product, as no table of the paper has")
    head: bool = Field(False, description="the products of the head in 8 bits too")
    keep: tuple[str, ...] = ()  # names of nodes that stay in float


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    names = list(sites(model, params.keep, params.head).observed)
    running = Running(params.batch, params.percentile)
    _qdq.watch(model, running.batches(feeds), names, running.see)
    return running.ranges


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = _qdq.Draft(model)
    _Writer(draft, sites(model, params.keep, params.head), ranges, params).write()
    return draft.finish()


class _Writer:
    """A pair of QuantizeLinear and DequantizeLinear behind every site, from which all read it; another one where a
    product reads it moved, so that the runtime finds both factors in 8 bits."""

    def __init__(self, draft: _qdq.Draft, found: Sites, ranges: Ranges, params: Params) -> None:
        self.draft, self.found, self.ranges, self.params = draft, found, ranges, params
        self.sites = {*found.observed, *found.chances}
        self.top = 2**params.activation_bits - 1
        self.ends = self.sites & {value.name for value in draft.model.graph.output}
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def write(self) -> None:
        for value in self.draft.model.graph.input:
            if value.name in self.sites:
                self.pair(value.name, value.name)
        for original in self.draft.nodes:
            node = self.draft.own(original)
            for place, name in enumerate(original.input):
                node.input[place] = self.read(node, place, name)
            for place, name in enumerate(original.output):
                node.output[place] = self.before(name)
            after = self.product(node, original) if node.name in self.found.weights else self.lookup(node)
            self.nodes += [node, *after]
            for name in original.output:
                if name in self.sites:
                    self.pair(name, name)
        self.draft.nodes = self.nodes

    def read(self, node: onnx.NodeProto, place: int, name: str) -> str:
        """What ``node`` reads instead of ``name``."""
        site = self.found.moved.get((node.name, place))
        if site and name not in self.made:
            self.pair(name, site)
        return self.after(name) if site or name in self.sites else name

    def before(self, name: str) -> str:
        """What ``name`` is called until it went through 8 bits: an output of the graph is what comes of that."""
        return f"{name}_float" if name in self.ends else name

    def after(self, name: str) -> str:
        return name if name in self.ends else f"{name}{_qdq.BACK}"

    def pair(self, name: str, site: str) -> None:
        """Adds the pair of ``name``, in steps of ``site``."""
        self.made.add(name)
        size, zero = self.step(site)
        source = self.before(name)
        if self.top < 255 and name == site:  # uint8 would hold more than the narrower grid does
            bounds = {end: np.float32(i - int(zero)) * size for end, i in (("least", 0), ("most", self.top))}
            limits = [self.draft.add(f"{site}_{end}", bound) for end, bound in bounds.items()]
            self.nodes.append(_qdq.node_of("Clip", [source, *limits], f"{name}_cut"))
            source = f"{name}_cut"
        how = [self.draft.add(f"{site}_uint8_step", size), self.draft.add(f"{site}_uint8_zero", zero)]
        self.nodes.append(_qdq.node_of("QuantizeLinear", [source, *how], f"{name}_uint8"))
        self.nodes.append(_qdq.node_of("DequantizeLinear", [f"{name}_uint8", *how], self.after(name)))

    def step(self, site: str) -> tuple[np.float32, np.uint8 | np.int8]:
        low, high = (0.0, 1.0) if site in self.found.chances else self.ranges[site]
        return _qdq.step(float(low), float(high), top=self.top)

    def product(self, node: onnx.NodeProto, original: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Gives ``node`` its weight in 8 bits; -> what adds its bias, which is no part of a matrix product in integers.
        A convolution's is int32 at the product of both scales, as the runtime wants it: in effect float."""
        name, parts, axis = node.input[1], self.found.weights[node.name], _qdq.output_axis(node)
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Gemm":
            if axis == 0:
                name, axis = self.draft.add(f"{name}_columns", self.draft.array(name).T), 1
            node.op_type = "MatMul"
            del node.attribute[:], node.input[2:]
        if self.params.per_channel:
            parts = (1,) * sum(parts)
        least = None
        if node.op_type == "Conv" and bias:
            size, _ = self.step(self.found.moved.get((node.name, 0), original.input[0]))
            least = _qdq.narrowest(size, self.draft.array(bias))
        stem, scale = self.integers(name, parts, axis, least)
        node.input[1] = self.back(stem, axis if scale.ndim else None)
        if least is not None:
            steps = np.asarray(size * scale)
            large = np.iinfo(np.int32).max
            whole = np.clip(np.rint(self.draft.array(bias).astype(np.float64) / steps), -large, large)
            stem = self.draft.add(f"{node.output[0]}_bias_int32", whole.astype(np.int32))
            self.draft.add(f"{stem}_step", steps)
            self.draft.add(f"{stem}_zero", np.zeros_like(steps, np.int32))
            node.input[2] = self.back(stem, 0 if steps.ndim else None)
        elif bias:
            out, node.output[0] = node.output[0], f"{node.output[0]}_product"
            return [_qdq.node_of("Add", [node.output[0], bias], out)]
        return []

    def lookup(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Where ``node`` reads a table, it reads it in 8 bits; -> what gives the rows back that it picks."""
        for place, name in enumerate(node.input):
            if (node.name, place) not in self.found.tables:
                continue
            stem, _ = self.integers(name)
            if node.op_type not in MOVES:
                node.input[place] = self.back(stem, None)
                continue
            out, node.output[0] = node.output[0], f"{node.output[0]}_rows"
            node.input[place] = stem
            return [_qdq.node_of("DequantizeLinear", [node.output[0], f"{stem}_step", f"{stem}_zero"], out)]
        return []

    def back(self, stem: str, axis: int | None) -> str:
        """-> the constant ``stem`` in float again."""
        name = f"{stem}{_qdq.BACK}"
        if name not in self.made:
            self.made.add(name)
            along = {} if axis is None else {"axis": axis}
            inputs = [stem, f"{stem}_step", f"{stem}_zero"]
            self.nodes.append(_qdq.node_of("DequantizeLinear", inputs, name, **along))
        return name

    def integers(
        self, name: str, parts: Sequence[int] = (), axis: int = 0, least: Array | None = None
    ) -> tuple[str, Array]:
        """Adds the constant ``name`` on its grid, its step and its zero point; -> its new name and its scale: a
        number, or one for each output where it holds several tensors, of ``parts`` outputs along ``axis``; no scale
        under the ``least`` of its outputs."""
        values = self.draft.array(name)
        grid = Grid.of(values, self.params.weight_bits)
        pieces = np.split(values, np.cumsum(parts)[:-1], axis) if len(parts) > 1 else [values]
        scales = [weight_scale(piece, grid, self.params.weights) for piece in pieces]
        if least is not None:
            outputs = np.split(least, np.cumsum(parts)[:-1]) if len(parts) > 1 else [least]
            scales = [np.maximum(s, np.float32(of.max())) for s, of in zip(scales, outputs, strict=True)]
        scale = np.repeat(scales, parts) if len(parts) > 1 else np.asarray(scales[0])
        whole = np.concatenate([grid.nearest(piece, s) for piece, s in zip(pieces, scales, strict=True)], axis)
        stem = self.draft.add(f"{name}_{grid.dtype.__name__}", whole.astype(grid.dtype))
        self.draft.add(f"{stem}_step", scale)
        self.draft.add(f"{stem}_zero", np.zeros_like(scale, grid.dtype))
        return stem, scale


QUANTIZERS.register("paper")(
    Quantizer(Params, quantize, observe, weights="int8 per tensor", activations="uint8 per tensor")
)
