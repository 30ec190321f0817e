"""torch's modules with typed calls, and layers of given weights.

torch types the call of a module as Any, but a module of a tower returns one tensor. At run time the types here are
torch's own classes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:

    class Module(nn.Module):
        __call__: Callable[..., Tensor]

    class Linear(nn.Linear, Module): ...

    class LayerNorm(nn.LayerNorm, Module): ...

    class Identity(nn.Identity, Module): ...

else:
    Module, Linear, LayerNorm, Identity = nn.Module, nn.Linear, nn.LayerNorm, nn.Identity


def constant(values: Tensor) -> nn.Parameter:
    """A parameter of a folded module: not trained."""
    return nn.Parameter(values.detach(), requires_grad=False)


def constant_linear(weight: Tensor, bias: Tensor) -> Linear:
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = constant(weight), constant(bias)
    return layer


def rows(layer: nn.Linear, first: int, last: int, scale: float = 1.0) -> Linear:
    """A layer with outputs ``first`` to ``last`` of ``layer``, times ``scale``. It shares no memory with ``layer``."""
    return constant_linear(layer.weight[first:last] * scale, layer.bias[first:last] * scale)


def first(x: Tensor) -> Tensor:
    return x[:, :1]


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
