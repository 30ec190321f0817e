"""Text towers in which some blocks mix tokens by a convolution along the text instead of attention.

Source: MobileCLIP, Vasu et al. 2024 (arXiv 2311.17049), section 4.1 (Text-RepMixer). Its branches are folded as in Vasu
et al. 2023 (arXiv 2303.14189), section 3.1. A convolution reads the padding, so the context's length is fixed.
"""

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, part
from calmclip.export.towers.modules import Module, constant
from calmclip.export.towers.text import TextTransformer
from calmclip.export.towers.transformer import Pick, linear


class MixedText(TextTransformer):
    """A `TextTransformer` in which each block with ``mix.*`` among its tensors is a `Mixer`."""

    def __init__(self, state: State, style: Style) -> None:
        super().__init__(state, style, mixer=Mixer)


class Mixer(Module):
    """x + s (mixer(x) - minus(x)), then x + t down(act(up(conv(x)))): x [B, T, W], each channel convolved alone.

    ``minus`` and ``skip`` are batch norms of x, and mixer(x) = norm(conv(x)) + skip(x). `fold` turns all of them into
    one convolution, and folds ``t`` into ``down``.
    """

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.mix: _Branches | nn.Conv1d = _Branches(part(state, "mix."), width)
        self.conv, self.norm = _convolution(state["conv.weight"].shape[-1], width), nn.BatchNorm1d(width)
        self.up, self.act = linear(state, "up", width), nn.GELU()
        self.down = linear(state, "down", self.up.out_features, width)
        self.scale = nn.Parameter(torch.empty(width))

    def fold(self) -> None:
        assert isinstance(self.mix, _Branches)
        self.mix = _filled(*self.mix.folded())
        self.conv = _filled(*_normed(self.conv.weight.double(), self.norm))
        self.down.weight = constant((self.down.weight.double() * self.scale[:, None].double()).float())
        self.down.bias = constant((self.down.bias.double() * self.scale.double()).float())
        del self.norm, self.scale

    def forward(self, x: Tensor, mask: Tensor | None = None, pick: Pick | None = None) -> Tensor:
        """Called like a `Block` or, with ``pick``, like a `LastBlock`. The mask is not used."""
        x = self.mix(x.transpose(1, 2))
        y, x = self.conv(x).transpose(1, 2), x.transpose(1, 2)
        if pick is not None:
            y, x = pick(y), pick(x)
        return x + self.down(self.act(self.up(y)))


class _Branches(Module):
    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.conv, self.norm = _convolution(state["conv.weight"].shape[-1], width), nn.BatchNorm1d(width)
        self.skip, self.minus = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.empty(width))

    def folded(self) -> tuple[Tensor, Tensor]:
        """-> kernel [W, 1, K], bias [W], float64."""
        identity = torch.zeros_like(self.conv.weight, dtype=torch.float64)
        identity[:, :, identity.shape[-1] // 2] = 1
        kernel, bias = _normed(self.conv.weight.double(), self.norm)
        for norm, sign in ((self.skip, 1), (self.minus, -1)):
            branch = _normed(identity, norm)
            kernel, bias = kernel + sign * branch[0], bias + sign * branch[1]
        scale = self.scale.double()
        return identity + scale[:, None, None] * kernel, scale * bias


def _convolution(size: int, width: int) -> nn.Conv1d:
    return nn.Conv1d(width, width, size, padding=size // 2, groups=width, bias=False)


def _filled(kernel: Tensor, bias: Tensor) -> nn.Conv1d:
    conv = _convolution(kernel.shape[-1], len(kernel))
    conv.weight, conv.bias = constant(kernel.float()), constant(bias.float())
    return conv


def _normed(kernel: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """norm(kernel * x) as kernel and bias, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return kernel * gain[:, None, None], norm.bias.double() - norm.running_mean.double() * gain
