"""The two towers of the built-in model: frozen encoders, and the small heads that `calmclip.export.align` trains.

z = 6 unit((f - mean) / std)        f [1280]: the mean of the backbone's last map
p = softmax(classifier(f))          the backbone's own 1000 ImageNet classes
c = unit(p @ class_table)           ConSE: the mean text vector of the picture's classes (Norouzi et al. 2013,
                                    arXiv 1312.5650); class_table [1000, 384]: MiniLM(name) - centre
image = unit(A [z; c] + a)          A [384, 1664]
text  = unit(B (unit(MiniLM) - centre))     B [384, 384]
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini import parameters
from calmclip.export.nets.mini.backbone import Backbone
from calmclip.export.nets.mini.facts import FEATURE_LENGTH
from calmclip.export.nets.mini.minilm import MiniLM


@dataclass(frozen=True)
class Heads:
    """The tensors that `align` learns and measures: float32 here, float16 in `heads.safetensors`."""

    image_weight: Tensor  # A [384, 1664]
    image_bias: Tensor  # a [384]
    text_weight: Tensor  # B [384, 384]
    text_centre: Tensor  # [384]
    feature_mean: Tensor  # [1280]
    feature_std: Tensor  # [1280]
    class_table: Tensor  # [1000, 384]

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        tensors = {field.name: getattr(self, field.name).half().contiguous() for field in fields(self)}
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        path.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> "Heads":
        """Raises `WeightsMissing` for a file that is absent or holds other tensors."""
        tensors = parameters.read(path, parameters.HEAD_SHAPES, "calmclip align")
        return cls(**{name: torch.from_numpy(array) for name, array in tensors.items()})


class ImageHead(nn.Module):
    """Backbone features of pictures or regions, float32 [..., 1280] -> unit vectors [..., 384]."""

    def __init__(self, heads: Heads, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier
        self.project = linear(heads.image_weight, heads.image_bias)
        self.mean = nn.Buffer(heads.feature_mean)
        self.gain = nn.Buffer(1 / heads.feature_std)
        self.class_table = nn.Buffer(heads.class_table)

    def inputs(self, features: Tensor) -> Tensor:
        """[..., 1664]: z and c side by side."""
        z = FEATURE_LENGTH * unit((features - self.mean) * self.gain)
        c = unit(F.softmax(self.classifier(features), dim=-1) @ self.class_table)
        return torch.cat([z, c], dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.flatten(0, -2)  # so that pictures and regions have the same Gemm
        vectors: Tensor = torch.unflatten(unit(self.project(self.inputs(rows))), 0, features.shape[:-1])
        return vectors


class ImageTower(nn.Module):
    """pixels float32 [B, 3, 260, 260], (x - 127) / 128 -> unit vectors [B, 384]."""

    def __init__(self, backbone: Backbone, heads: Heads) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ImageHead(heads, backbone.classifier)

    def forward(self, pixels: Tensor) -> Tensor:
        vectors: Tensor = self.head(self.backbone(pixels)[1].mean((2, 3)))
        return vectors


class DenseTower(nn.Module):
    """pixels float32 [B, 3, 416, 416], (x - 127) / 128 -> patches [B, 13, 13, 384]: the image head's unit vector of
    each cell of the backbone's last map; map16 [B, 26, 26, 120], the backbone's map at stride 16, whose cells tell what
    belongs together."""

    def __init__(self, image: ImageTower) -> None:
        super().__init__()
        self.backbone, self.head = image.backbone, image.head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        map16, map32 = self.backbone(pixels)
        return self.head(map32.permute(0, 2, 3, 1)), map16.permute(0, 2, 3, 1)


class TextTower(nn.Module):
    """ids, mask int64 [B, T] (no mask: every id is a token) -> unit vectors float32 [B, 384]."""

    def __init__(self, encoder: MiniLM, weight: Tensor, centre: Tensor) -> None:
        """``weight`` [384, 384]: B; ``centre`` [384]."""
        super().__init__()
        self.encoder = encoder
        self.project = linear(weight, -(weight.double() @ centre.double()).float())

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return unit(self.project(unit(self.encoder(ids, mask))))


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their length. Equal to F.normalize, with two ops less."""
    vectors: Tensor = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)
    return vectors


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The frozen affine map x -> weight @ x + bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)
