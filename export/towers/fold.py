"""Folds batch norms and layer scales into the layers before them, and splits convolutions that runtimes run slowly.

At inference a batch norm is affine, y = (x - mean) / sqrt(var + eps) * weight + bias, and a layer scale is
y = x * gamma. The folded graph holds plain convolutions, which quantizers can match. Computed in float64.
Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.1; Touvron et al. 2021 (arXiv 2103.17239), section 2.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from calmclip.export.towers.modules import constant

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)  # first axis of the weights: outputs
_NO_OPS = (nn.Identity, nn.Dropout)  # at inference
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SCALES = ("LayerScale", "LayerScale2d")  # names in timm and in similar libraries; the factor is ``gamma``
_MAX_PARTS = 4  # of a convolution that is split


def fold(module: nn.Module) -> None:
    """Fold each batch norm or layer scale of ``module`` that is the only reader of a convolution or a linear layer.

    The norm is replaced by its activation (timm's BatchNormAct2d) or by an identity. A symbolic trace, not the order of
    names, shows which layer a norm reads. Other norms stay. Changes ``module``.
    Raises `torch.fx.proxy.TraceError` if control flow depends on values of the input.
    """
    module.eval()
    graph = _Tracer().trace(module)
    modules = dict(module.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, (node, *more) in calls.items():
        norm, source = modules[name], node.args[0] if node.args else None
        if more or not _foldable(norm):
            continue
        while _read_once(source) and isinstance(modules[str(source.target)], _NO_OPS):
            source = source.args[0]
        if not _read_once(source) or len(calls[str(source.target)]) > 1:
            continue
        layer = modules[str(source.target)]
        affine = _affine(norm, layer) if type(layer) in _LAYERS else None
        if affine is not None:
            _fold(layer, *affine)
            # timm's norms have an activation; dropout is for training
            others = [child for child in norm.children() if not isinstance(child, _NO_OPS)]
            modules[name] = nn.Sequential(*others) if others else nn.Identity()
            module.set_submodule(name, modules[name])


def _foldable(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__ in _SCALES


def _read_once(node: Any) -> TypeGuard[fx.Node]:
    """Whether the node is the call of a module whose output has one reader."""
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1


class _Tracer(fx.Tracer):
    """Does not trace into norms and scales of any library."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _foldable(m) or super().is_leaf_module(m, module_qualified_name)


def _affine(norm: nn.Module, layer: Any) -> tuple[Tensor, Tensor] | None:
    """Gain and shift per channel of the layer, float64. None if they are unknown or along another axis."""
    if not isinstance(norm, _NORMS):
        gamma, weight = getattr(norm, "gamma", None), layer.weight
        if not isinstance(gamma, Tensor) or gamma.shape != (len(weight), *[1] * (weight.ndim - 2)):
            return None
        gain = gamma.detach().double().flatten()
        return gain, torch.zeros_like(gain)
    if norm.running_mean is None or norm.running_var is None:
        return None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double()


def _fold(layer: Any, gain: Tensor, shift: Tensor) -> None:
    dtype, weight = layer.weight.dtype, layer.weight.double()
    bias = shift if layer.bias is None else layer.bias.double() * gain + shift
    layer.weight = constant((weight * gain.reshape(-1, *[1] * (weight.ndim - 1))).to(dtype))
    layer.bias = constant(bias.to(dtype))


def take_apart(module: nn.Module) -> None:
    """Split each depthwise convolution with n outputs per input channel into n convolutions with one output each.

    ONNX Runtime runs the former group by group; in INT8 that takes five to ten times as long (FastViT's, 7 x 7, 80
    channels to 160). Changes ``module``.
    """
    for parent in list(module.modules()):
        for name, conv in list(parent.named_children()):
            if (
                type(conv) is nn.Conv2d
                and 1 < conv.out_channels // conv.groups <= _MAX_PARTS
                and 1 < conv.groups == conv.in_channels
            ):
                setattr(parent, name, Several(conv))


class Several(nn.Module):
    """``conv`` as n convolutions, [B, C, H, W] -> [B, n C, h, w]. Channel c makes the channels n c to n c + n - 1."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        count = conv.out_channels // conv.groups
        self.parts = nn.ModuleList(_part(conv, slice(start, None, count)) for start in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts], dim=2).flatten(1, 2)


def _part(conv: nn.Conv2d, rows: slice) -> nn.Conv2d:
    kernel: Any = conv.kernel_size
    window: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    with torch.device("meta"):
        part = nn.Conv2d(conv.groups, conv.groups, kernel, groups=conv.groups, padding_mode=conv.padding_mode, **window)
    part.weight = constant(conv.weight[rows].clone())
    part.bias = None if conv.bias is None else constant(conv.bias[rows].clone())
    return part
