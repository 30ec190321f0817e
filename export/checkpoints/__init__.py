"""A checkpoint as research code left it: tensors by name, and the configs beside them. No code in it is executed.

Layouts read a `Checkpoint`; `read` makes it from a directory or from one file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.locate import weight_files
from calmclip.models.bundle.manifest import MAX_PATH, FrozenModel
from calmclip.models.errors import UnknownCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

MODEL_CONFIG = "model-config.json"  # the ranking adapter's, as its authors call it
CONFIGS = (
    "open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json", MODEL_CONFIG,
)  # fmt: skip


class Weights(FrozenModel):
    """Facts that a checkpoint leaves out. Changes of a net are adapters."""

    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] | None = None
    experts: Literal["dense", "routed"] | None = Field(
        default=None, description="of a mixture: every expert answers every token, or only those that go to it"
    )
    pool: Literal["last", "first", "mean", "weightedmean"] | None = Field(
        default=None, description="of a language model without modules.json: the tokens that make the vector"
    )
    attention: Literal["causal", "bidirectional"] | None = Field(
        default=None, description="of a language model: what a token sees, if config.json does not say it"
    )
    text_model: str | None = Field(
        default=None, max_length=MAX_PATH, description="the model whose vectors of texts an adaptor reads, by name"
    )


@dataclass(frozen=True)
class Checkpoint:
    """``tensors``: in the file's dtypes, without the prefixes of training (``module.``). ``facts``: from the recipe."""

    path: Path
    tensors: "Mapping[str, Tensor]"
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    facts: Weights = field(default_factory=Weights)

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config(self) -> dict[str, Any]:
        """config.json, {} if there is none."""
        return self.configs.get("config.json", {})

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)


def read(checkpoint: str | Path, facts: Weights | None = None) -> Checkpoint:
    """Raises `UnknownCheckpoint` with the file, and the key if there is one."""
    from calmclip.export.checkpoints.weights import load_tensors  # needs torch

    path = Path(checkpoint)
    if not path.exists():
        raise UnknownCheckpoint(f"{path} does not exist; expected a checkpoint's directory or file")
    files, configs = weight_files(path), {}
    if path.is_dir():
        configs = {name: read_json(path / name) for name in CONFIGS if (path / name).is_file()}
    return Checkpoint(path, load_tensors(files), configs, facts or Weights())
