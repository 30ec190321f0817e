"""Batch norms into the layers before them: at inference y = (x - mean) / sqrt(var + eps) * weight + bias is affine.

A graph without them holds plain convolutions, which is what quantizers know.
Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.1; worked out in float64.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Linear)  # first axis of the weights: outputs


def fold_batch_norms(module: nn.Module) -> None:
    """Changes ``module``: a batch norm that alone reads a convolution or a linear layer goes into it.

    What stands in its place is its activation, where it has one (timm's BatchNormAct2d), else nothing. Which layer a
    norm reads, a symbolic trace tells, not the order of names. Norms that read something else stay.
    Raises `torch.fx.proxy.TraceError` for a module whose course hangs on its input's values.
    """
    module.eval()
    graph = _Tracer().trace(module)
    parts = dict(module.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, (node, *again) in calls.items():
        norm, before = parts[name], node.args[0]
        if again or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer = parts[str(before.target)]
        if type(layer) in _BEFORE and len(calls[str(before.target)]) == 1:
            _fold(layer, norm)
            parent, _, own = name.rpartition(".")
            setattr(parts[parent], own, nn.Sequential(*_after(norm)) if _after(norm) else nn.Identity())


class _Tracer(fx.Tracer):
    """Norms are whole, whatever library's they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _fold(layer: Any, norm: _BatchNorm) -> None:
    with torch.no_grad():
        mean, var = norm.running_mean.double(), norm.running_var.double()  # type: ignore[union-attr]
        gain = (var + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.double()
        bias = -mean if layer.bias is None else layer.bias.double() - mean
        bias = bias * gain + (0 if norm.bias is None else norm.bias.double())
        dtype = layer.weight.dtype
        layer.weight = _fixed(layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.ndim - 1)), dtype)
        layer.bias = _fixed(bias, dtype)


def _fixed(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype), requires_grad=False)


def _after(norm: nn.Module) -> list[nn.Module]:
    """What timm's norms do beside norming; dropping is for training."""
    return [one for one in norm.children() if not isinstance(one, nn.Identity | nn.Dropout)]
