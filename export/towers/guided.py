"""Attention that other features than q and k steer: patches whose features are alike exchange their values.

Source: Trident, Shi et al. 2025 (arXiv 2411.09219), section 3.2 and its code, where the features are those of DINO.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from calmclip.export.towers.modules import unit
from calmclip.export.towers.transformer import MASKED

BETA, GAMMA = 1.2, 3.0


def guided(values: Tensor, features: Tensor) -> Tensor:
    """softmax(gamma (S - beta mean(S))) times ``values`` [B, N, W], where S = F F^T of unit ``features`` [B, N, C].

    What is negative in the softmax counts as -inf; if that is all of a picture, its patches count alike. The mean is
    that of one picture.
    """
    alike = features @ features.transpose(-1, -2)
    alike = (alike - BETA * alike.mean(dim=(1, 2), keepdim=True)) * GAMMA
    return torch.where(alike < 0, MASKED, alike).softmax(dim=-1) @ values


def centred(patches: Tensor) -> Tensor:
    """[B, N, W] -> unit vectors: how a patch differs from the mean of its picture. What all patches share says nothing
    of two of them."""
    return unit(patches - patches.mean(dim=1, keepdim=True))


def resized(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Patches [B, h w, W] on a grid ``old`` -> on a grid ``new``, bilinear with half-pixel centres."""
    if old == new:
        return rows
    plane = torch.unflatten(rows, 1, old).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=new, mode="bilinear", align_corners=False)
    return plane.flatten(2).transpose(1, 2)
