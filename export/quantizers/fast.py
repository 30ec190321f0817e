"""What runs fastest, one input at a time: everything in 8 bits as by `paper`, and the head, a scale for each output.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 2; one scale an output channel: Krishnamoorthi 2018
(arXiv 1806.08342), section 3.

`python -m tests.bench.quantizers`, two cores of an AMD EPYC with VNNI, one thread, machine busy (a tenth is noise),
ONNX Runtime 1.32; time in `static`'s: BERT of 16 tokens .89, of 128 tokens .89, ViT of 50 tokens .99. `static` with the
products of attention in INT8 too .92, .98, .89; `dynamic` .90, .98, 1.20; one scale a tensor (`paper`) .89, .91, .99,
no faster than one for each output. The gain is in attention and in residual sums and norms, which read 8 bits.

It knows no help against outliers: what it loses, the report says. `search` is for bundles that are to be near to float.
"""

import onnx

from export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, paper
from models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    keep: tuple[str, ...] = ()  # names of nodes that stay in float


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return paper.observe(model, feeds, _settings(params))


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    return paper.quantize(model, ranges, _settings(params))


def _settings(params: Params) -> paper.Params:
    return paper.Params(per_channel=True, head=True, keep=params.keep)


QUANTIZERS.register("fast")(Quantizer(Params, quantize, observe))
