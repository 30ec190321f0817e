"""Batch norms and layer scales into the layers before them, and convolutions into such as runtimes are quick at.

At inference a batch norm is affine, y = (x - mean) / sqrt(var + eps) * weight + bias, and a layer scale y = x * gamma.
A graph without them holds plain convolutions, which is what quantizers know. Worked out in float64.
Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.1; Touvron et al. 2021 (arXiv 2103.17239), section 2.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Linear)  # first axis of the weights: outputs
_NOTHING = (nn.Identity, nn.Dropout)  # at inference
_SCALES = ("LayerScale", "LayerScale2d")  # of timm and of those who write like it; what multiplies is their ``gamma``
_MOST = 4  # convolutions that one is taken apart to

Affine: TypeAlias = Callable[[], tuple[Tensor, Tensor]]


def fold(module: nn.Module) -> None:
    """Changes ``module``: a batch norm or a layer scale that alone reads a convolution or a linear layer goes into it.

    What stands in its place is its activation, where it has one (timm's BatchNormAct2d), else nothing. Which layer it
    reads, a symbolic trace tells, not the order of names. What reads something else stays.
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
        if again or not _Tracer.whole(parts[name]):
            continue
        source = node.args[0]
        while _alone(source) and isinstance(parts[str(source.target)], _NOTHING):
            source = source.args[0]
        if not _alone(source):
            continue
        layer = parts[str(source.target)]
        affine = _affine(parts[name], layer) if type(layer) in _BEFORE else None
        if affine and len(calls[str(source.target)]) == 1:
            _fold(layer, *affine())
            parent, _, own = name.rpartition(".")
            after = _after(parts[name])
            parts[name] = nn.Sequential(*after) if after else nn.Identity()
            setattr(parts[parent], own, parts[name])


def _alone(node: Any) -> bool:
    """Whether it is a module's answer that is read once."""
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1


class _Tracer(fx.Tracer):
    """Norms and scales are whole, whatever library's they are."""

    @staticmethod
    def whole(part: nn.Module) -> bool:
        return isinstance(part, _BatchNorm) or type(part).__name__ in _SCALES

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.whole(m) or super().is_leaf_module(m, module_qualified_name)


def _affine(part: nn.Module, layer: Any) -> Affine | None:
    """What works out gain and shift of each of the layer's channels, in float64; None where they are not known."""
    if not isinstance(part, _BatchNorm):
        gamma, weight = getattr(part, "gamma", None), layer.weight
        if not isinstance(gamma, Tensor) or gamma.shape != (len(weight), *[1] * (weight.ndim - 2)):
            return None
        gain = gamma.detach().double().flatten()
        return lambda: (gain, torch.zeros_like(gain))
    if part.running_mean is None or part.running_var is None:
        return None
    mean, var, norm = part.running_mean, part.running_var, part

    def normed() -> tuple[Tensor, Tensor]:
        gain = (var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.detach().double()
        shift = -mean.double() * gain
        return gain, shift if norm.bias is None else shift + norm.bias.detach().double()

    return normed


def _fold(layer: Any, gain: Tensor, shift: Tensor) -> None:
    with torch.no_grad():
        dtype = layer.weight.dtype
        bias = shift if layer.bias is None else layer.bias.double() * gain + shift
        layer.weight = _fixed(layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.ndim - 1)), dtype)
        layer.bias = _fixed(bias, dtype)


def _fixed(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype), requires_grad=False)


def _after(norm: nn.Module) -> list[nn.Module]:
    """What timm's norms do beside norming; dropping is for training."""
    return [one for one in norm.children() if not isinstance(one, nn.Identity | nn.Dropout)]


def take_apart(module: nn.Module) -> None:
    """Changes ``module``: a depthwise convolution that makes several channels of each becomes so many that make one.

    ONNX Runtime works through the former group by group: in INT8 five to ten times as long (FastViT's, 7 x 7, 80
    channels to 160).
    """
    for parent in list(module.modules()):
        for name, conv in list(parent.named_children()):
            if (
                type(conv) is nn.Conv2d
                and 1 < conv.out_channels // conv.groups <= _MOST
                and 1 < conv.groups == conv.in_channels
            ):
                setattr(parent, name, Several(conv))


class Several(nn.Module):
    """The depthwise convolution ``conv``, [B, C, H, W] -> [B, n C, h, w], as n: channel c makes n c to n c + n - 1."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        count = conv.out_channels // conv.groups
        self.parts = nn.ModuleList(_part(conv, slice(at, None, count)) for at in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts], dim=2).flatten(1, 2)


def _part(conv: nn.Conv2d, rows: slice) -> nn.Conv2d:
    kernel: Any = conv.kernel_size
    place: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    with torch.device("meta"):
        part = nn.Conv2d(conv.groups, conv.groups, kernel, groups=conv.groups, padding_mode=conv.padding_mode, **place)
    part.weight = _fixed(conv.weight.detach()[rows].clone(), conv.weight.dtype)
    part.bias = None if conv.bias is None else _fixed(conv.bias.detach()[rows].clone(), conv.bias.dtype)
    return part
