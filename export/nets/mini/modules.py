"""The torch modules of the built-in model with their weights: what is trained, and the source of `drawn/`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from calmclip.export.nets.mini import backbone, minilm, parameters
from calmclip.export.nets.mini.facts import TEMPLATES
from calmclip.export.nets.mini.masks import MaskHead, Masks
from calmclip.export.nets.mini.regions import Detector, Regions
from calmclip.export.nets.mini.towers import DenseTower, Heads, ImageTower, TextTower
from calmclip.export.nets.mini.weights import backbone_state, minilm_state, tokenizer_json
from calmclip.models.flow import Array


@dataclass(frozen=True)
class Modules:
    image: ImageTower
    text: TextTower
    regions: Regions
    dense: DenseTower
    masks: Masks


def tensors(state: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in state.items()}


def load(heads: Path, detector: Path, masks: Path, directory: Path | None = None) -> Modules:
    """From the packages' files, or those in ``directory``. Raises `WeightsMissing`."""
    trained = Heads.load(heads)
    image = ImageTower(backbone.frozen(tensors(backbone_state(directory))), trained).eval()
    encoder = minilm.from_state(tensors(minilm_state(directory)))
    text = TextTower(encoder, trained.text_weight, trained.text_centre).eval()
    constants = {name: tensor.numpy() for name, tensor in text.state_dict().items()}
    names = torch.from_numpy(parameters.known(constants, tokenizer_json(directory), TEMPLATES))
    parts, head = Detector.load(detector), MaskHead.load(masks)
    regions = Regions(parts.boxes, parts.quality, image.backbone, image.head, parts.head, names, head.features).eval()
    return Modules(image, text, regions, DenseTower(image).eval(), head.masks)
