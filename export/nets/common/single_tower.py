"""Nets of one tower from Hugging Face directories: how they are recognised, read and described.

Attention's softmax and the scale of its gates come from config.json (`AttentionSpec.of`), the kind of gate from the
names of tensors (`calmclip.export.layouts.common.attention_gates`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calmclip.export import layouts
from calmclip.export.checkpoints import Checkpoint, Weights, hugging_face, read
from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.locate import NoWeights, weight_files, weights_sha256
from calmclip.export.layouts import Layout
from calmclip.export.nets import Net, Tower, attention_promises
from calmclip.export.towers import count
from calmclip.models.bundle.manifest import DefaultClassifier, ImagePreprocess, Source, TextPreprocess
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import BadRequest, UnknownCheckpoint


@dataclass(frozen=True)
class Opened:
    """A checkpoint, the layout that fits it, and its tensors by our names."""

    checkpoint: Checkpoint
    layout: Layout
    state: Mapping[str, Tensor]
    fold: bool = True

    def config(self, usual: Mapping[str, Any], layers: str) -> dict[str, Any]:
        """config.json over ``usual``, the defaults of its class; null means the default.

        Raises `UnknownCheckpoint` if it counts other blocks than the tensors under ``layers``, or if its heads do not
        divide the width.
        """
        config = {**usual, **{name: value for name, value in self.checkpoint.config.items() if value is not None}}
        file, heads = self.checkpoint.directory / "config.json", config["num_attention_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise UnknownCheckpoint(f"{file}: num_attention_heads is {heads!r}; expected a number")
        if (number := config["num_hidden_layers"]) != (blocks := count(self.state, layers)):
            raise UnknownCheckpoint(f"{file}: num_hidden_layers is {number}; the weights hold {blocks}")
        width = len(self.state[f"{layers}0.norm1.weight"])
        if width % heads:
            raise UnknownCheckpoint(f"{file}: {heads} heads do not divide the width {width}")
        return config

    def fill(self, prefix: str, make: Callable[[Mapping[str, Tensor]], nn.Module]) -> nn.Module:
        return layouts.fill(self.layout, self.checkpoint, self.state, prefix, make, fold=self.fold)

    def check_vocabulary(self, tokenizer: bytes, context: int) -> None:
        layouts.check_vocabulary(self.layout, self.checkpoint, self.state, tokenizer, context)

    def net(
        self,
        name: str,
        role: str,
        module: nn.Module,
        inputs: Mapping[str, Spec],
        outputs: Mapping[str, Spec],
        preprocess: ImagePreprocess | TextPreprocess,
        files: Mapping[str, bytes],
        *,
        prefix: str = "text.",
        tasks: tuple[str, ...] = ("raw",),
        classifier: DefaultClassifier | None = None,
    ) -> Net:
        """A net whose only tower is ``module``, with the role ``role``."""
        path, promises = self.checkpoint.path, attention_promises(module)
        return Net(
            name=name,
            source=Source(
                net=name,
                model=path.resolve().name,
                weights=weights_sha256(path),
                license=hugging_face.license_of(path),
                notes=self.layout.title,
            ),
            tasks=tasks,
            towers={
                role: Tower(module, inputs, outputs, preprocess, quantizer="search", prefix=prefix, promises=promises)
            },
            files=files,
            classifier=classifier,
            layout=self.layout,
            folded=self.fold,
        )


def recognise(model_types: Collection[str], *tables: Layout) -> Callable[[str], bool]:
    """A directory with weights whose config.json says one of ``model_types``, and a table knows at least half of its
    tensors.
    Other weights beside such a config are left to the other nets, which can say more of them."""

    def recognised(checkpoint: str) -> bool:
        try:
            weight_files(Path(checkpoint))
            if read_json(Path(checkpoint) / "config.json").get("model_type") not in model_types:
                return False
        except (NoWeights, OSError, UnknownCheckpoint):
            return False
        names = read(checkpoint).names
        return any(2 * layouts.count_known(table, names) >= len(names) for table in tables)

    return recognised


def open_checkpoint(
    tables: Sequence[Layout], path: str, weights: Weights, fold: bool, facts: Collection[str] = ()
) -> Opened:
    """``facts``: the fields of ``weights`` that the net takes.

    Raises `UnknownCheckpoint` if none of ``tables`` fits, with the reason of a table that has one, and as
    `layouts.translate`; `BadRequest` for other facts in the recipe's section on weights.
    """
    if given := weights.model_dump(exclude_none=True).keys() - facts:
        raise BadRequest(f"{tables[0].title} states its own {', '.join(sorted(given))}; leave it out of [weights]")
    checkpoint = read(path, weights)
    for layout in tables:
        if reason := layout.refusal(checkpoint):
            raise UnknownCheckpoint(f"{path}: {reason}")
        if layout.fits(checkpoint):
            return Opened(checkpoint, layout, layouts.translate(layout, checkpoint), fold)
    expected = ", or ".join(" with ".join(layout.keys) for layout in tables)
    raise UnknownCheckpoint(f"{path}: its tensors are not those of {tables[0].title}; expected {expected}")
