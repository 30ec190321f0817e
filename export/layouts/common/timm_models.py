"""Image towers that timm builds, and the names of its ViTs.

`timm.create_model` builds such a backbone from its name, without weights; branches and batch norms are folded when the
weights are in. Source: timm (doi 10.5281/zenodo.4414861); branches: Vasu et al. 2023 (arXiv 2206.04040), section 3.1.
"""

from typing import Any

from calmclip.export.checkpoints.files import require_package
from calmclip.export.towers.image import Trunk
from calmclip.models.errors import UnknownCheckpoint

BLOCK = {  # of a ViT
    "norm1.{p}": "norm1.{p}",
    "attn.qkv.{p}": "attn.qkv.{p}",
    "attn.proj.{p}": "attn.out.{p}",
    "norm2.{p}": "norm2.{p}",
    "mlp.fc1.{p}": "mlp.up.{p}",
    "mlp.fc2.{p}": "mlp.down.{p}",
}


def model_name(name: Any, where: str) -> str:
    """``name``, if timm has a model of this name. A name of a hub or a folder is refused: `UnknownCheckpoint`."""
    timm = require_package("timm", "an image tower of timm's")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UnknownCheckpoint(f"{where} is {name!r}, which timm {timm.__version__} has no model for")
    return name


class TimmTrunk(Trunk):
    """`Trunk` whose parallel branches (RepVGG, MobileOne, FastViT) each become one convolution.

    Attention is written as two products and a softmax, as the rewrites know it: torch takes its own fused attention
    apart into more nodes, and computes shapes in the graph.
    """

    def fold(self) -> None:
        models = require_package("timm.models", "an image tower of timm's")
        models.reparameterize_model(self.trunk, inplace=True)
        self.trunk.requires_grad_(False)  # the convolutions are new parameters
        for part in self.trunk.modules():
            if hasattr(part, "fused_attn"):
                setattr(part, "fused_attn", False)  # noqa: B010 (torch types a module's attributes as modules)
        super().fold()
