"""Text towers some of whose blocks mix tokens by a convolution along the text, not by attention.

Source: MobileCLIP, Vasu et al. 2024 (arXiv 2311.17049), section 4.1 (Text-RepMixer); its branches are folded as Vasu et
al. 2023 (arXiv 2303.14189), section 3.1, do. A convolution sees the padding, so the context's length is fixed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from calmclip.export.towers import Part, State, Style, count, part
from calmclip.export.towers.text import Pick, TextTransformer
from calmclip.export.towers.transformer import Block, LastBlock, linear


class MixedText(TextTransformer):
    """`TextTransformer`; blocks with ``mix.*`` among their tensors are a `Mixer`."""

    def __init__(self, state: State, style: Style) -> None:
        plain = not any(".mix." in name for name in state)
        super().__init__(state if plain else _without_blocks(state), style)
        if not plain:
            width, every = self.tokens.embedding_dim, part(state, "blocks.")
            number = count(every, "")
            for index in range(number):
                own = part(every, f"{index}.")
                attends = LastBlock if index == number - 1 else Block
                self.blocks.append(Mixer(own, style, width) if "mix.scale" in own else attends(own, style, width))


def _without_blocks(state: State) -> State:
    found = Part(state, "")
    for name in state:
        if name.startswith("blocks."):
            del found[name]
    return found


class Mixer(nn.Module):
    """x + s (mixer(x) - minus(x)), then x + t down(act(up(conv(x)))): x [B, T, W], each channel convolved for itself.

    ``minus`` and ``skip`` are batch norms of x itself, mixer(x) = norm(conv(x)) + skip(x). `fold` makes of all that one
    convolution, and puts ``t`` into ``down``.
    """

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.mix = _Branches(part(state, "mix."), width)
        self.conv, self.norm = _along(state["conv.weight"].shape[-1], width), nn.BatchNorm1d(width)
        self.up, self.act = linear(state, "up", width), nn.GELU()
        self.down = linear(state, "down", self.up.out_features, width)
        self.scale = nn.Parameter(torch.empty(width))

    def fold(self) -> None:
        with torch.no_grad():
            kernel, bias = self.mix.folded()
            self.mix = _convolution(kernel, bias)
            self.conv = _convolution(*_normed(self.conv.weight.double(), self.norm))
            self.down.weight = _fixed(self.down.weight.double() * self.scale[:, None].double())
            self.down.bias = _fixed(self.down.bias.double() * self.scale.double())
        del self.norm, self.scale

    def forward(self, x: Tensor, own: Any = None, mask: Tensor | None = None) -> Tensor:
        """As a `Block`, whose mask changes nothing here, or as a `LastBlock`: then ``own`` takes the token."""
        x = self.mix(x.transpose(1, 2))
        y, x = self.conv(x).transpose(1, 2), x.transpose(1, 2)
        if isinstance(own, Pick):
            y, x = own(y), own(x)
        return x + self.down(self.act(self.up(y)))


class _Branches(nn.Module):
    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.conv, self.norm = _along(state["conv.weight"].shape[-1], width), nn.BatchNorm1d(width)
        self.skip, self.minus = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.empty(width))

    def folded(self) -> tuple[Tensor, Tensor]:
        """-> kernel [W, 1, K], bias [W], float64."""
        one = torch.zeros_like(self.conv.weight, dtype=torch.float64)
        one[:, :, one.shape[-1] // 2] = 1
        kernel, bias = _normed(self.conv.weight.double(), self.norm)
        for norm, sign in ((self.skip, 1), (self.minus, -1)):
            more = _normed(one, norm)
            kernel, bias = kernel + sign * more[0], bias + sign * more[1]
        scale = self.scale.double()
        return one + scale[:, None, None] * kernel, scale * bias


def _along(size: int, width: int) -> nn.Conv1d:
    return nn.Conv1d(width, width, size, padding=size // 2, groups=width, bias=False)


def _normed(kernel: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """norm(kernel * x) as kernel and bias, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return kernel * gain[:, None, None], norm.bias.double() - norm.running_mean.double() * gain


def _convolution(kernel: Tensor, bias: Tensor) -> nn.Conv1d:
    made = _along(kernel.shape[-1], len(kernel))
    made.weight, made.bias = _fixed(kernel), _fixed(bias)
    return made


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)
