"""Image towers that timm builds, and the names of its ViTs.

A backbone that is not ours is built by `timm.create_model` from its name, without weights, its branches and batch norms
folded once the weights are in. Source: timm (doi 10.5281/zenodo.4414861); branches: Vasu et al. 2023
(arXiv 2206.04040), section 3.1.
"""

from typing import Any

from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import Rule
from calmclip.export.towers.image import Trunk
from calmclip.models.errors import UnknownCheckpoint


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A timm ViT's blocks, numbered behind ``theirs``."""
    names = {
        "norm1.{p}": "norm1.{p}",
        "attn.qkv.{p}": "attn.qkv.{p}",
        "attn.proj.{p}": "attn.out.{p}",
        "norm2.{p}": "norm2.{p}",
        "mlp.fc1.{p}": "mlp.up.{p}",
        "mlp.fc2.{p}": "mlp.down.{p}",
    }
    return tuple(Rule(f"{theirs}.{{i}}.{one}", f"{ours}.blocks.{{i}}.{other}") for one, other in names.items())


def known(name: Any, where: str) -> str:
    """``name``, if timm has a model so called: nothing else is a name to it, no hub's and no folder's."""
    timm = require_package("timm", "an image tower of timm's")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UnknownCheckpoint(f"{where} is {name!r}, which timm {timm.__version__} has no model for")
    return name


class TimmTrunk(Trunk):
    """`Trunk` whose branches (RepVGG's, MobileOne's, FastViT's) become one convolution each."""

    def fold(self) -> None:
        models = require_package("timm.models", "an image tower of timm's")
        models.reparameterize_model(self.trunk, inplace=True)
        self.trunk.requires_grad_(False)  # what it made anew
        super().fold()
