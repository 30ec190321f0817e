"""What nets of one tower have in common, out of Hugging Face directories: recognised, read, described.

Attention's softmax and the scale of its gates come from config.json (`AttentionSpec.of`), which gate there is from the
names of tensors (`calmclip.export.layouts._attention`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calmclip.export import layouts
from calmclip.export.checkpoints import Checkpoint, Weights, read
from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.weights import NoWeights, weight_files, weights_sha256
from calmclip.export.layouts import Layout, _hugging_face
from calmclip.export.towers import count
from calmclip.models.bundle.manifest import Source
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.ops.spec import SOFTMAX


@dataclass(frozen=True)
class Opened:
    """A checkpoint, the layout that fits it, and its tensors by our names."""

    checkpoint: Checkpoint
    layout: Layout
    state: Mapping[str, Tensor]
    fold: bool = True

    def config(self, usual: Mapping[str, Any], layers: str) -> dict[str, Any]:
        """config.json over ``usual``, what its class leaves out; null is the default.

        Raises `UnknownCheckpoint` where it counts other blocks than there are under ``layers``, or its heads do not
        share the width.
        """
        found = {**usual, **{name: value for name, value in self.checkpoint.config.items() if value is not None}}
        where, heads = self.checkpoint.directory / "config.json", found["num_attention_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise UnknownCheckpoint(f"{where}: num_attention_heads is {heads!r}; expected a number")
        if (said := found["num_hidden_layers"]) != (there := count(self.state, layers)):
            raise UnknownCheckpoint(f"{where}: num_hidden_layers is {said}; the weights hold {there}")
        width = len(self.state[f"{layers}0.norm1.weight"])
        if width % heads:
            raise UnknownCheckpoint(f"{where}: {heads} heads do not share {width} numbers evenly")
        return found

    def fill(self, prefix: str, make: Any) -> nn.Module:
        return layouts.fill(self.layout, self.checkpoint, self.state, prefix, make, fold=self.fold)

    def suit(self, tokenizer: bytes, context: int) -> None:
        layouts.suit(self.layout, self.checkpoint, self.state, tokenizer, context)

    def source(self, net: str, notes: str = "") -> Source:
        path = self.checkpoint.path
        return Source(
            net=net,
            model=path.resolve().name,
            weights=weights_sha256(path),
            license=_hugging_face.license_of(path),
            notes="; ".join(filter(None, (self.layout.title, notes))),
        )


def recognise(kind: str, *tables: Layout) -> Callable[[str], bool]:
    """A directory with weights whose config.json says ``model_type``, and half of whose tensors a table knows: of
    another's weights beside such a config who knows them can tell more."""

    def recognised(checkpoint: str) -> bool:
        try:
            weight_files(Path(checkpoint))
            if read_json(Path(checkpoint) / "config.json").get("model_type") != kind:
                return False
        except (NoWeights, OSError, UnknownCheckpoint):
            return False
        names = read(checkpoint).names
        return any(2 * layouts.known(table, names) >= len(names) for table in tables)

    return recognised


def opened(tables: Sequence[Layout], checkpoint: str, weights: Weights, fold: bool) -> Opened:
    """Raises `UnknownCheckpoint` where none of ``tables`` fits, one of them saying why where it knows, and as
    `layouts.translate`; `BadRequest` where the recipe says something of weights."""
    if weights != Weights():
        raise BadRequest(f"{tables[0].title} states its own activation; leave out the recipe's [weights]")
    found = read(checkpoint, weights)
    for layout in tables:
        if why := layout.refuses(found):
            raise UnknownCheckpoint(f"{found.path}: {why}")
        if layout.fits(found):
            return Opened(found, layout, layouts.translate(layout, found), fold)
    wanted = ", or ".join(" with ".join(layout.keys) for layout in tables)
    raise UnknownCheckpoint(f"{found.path}: its tensors are not those of {tables[0].title}; expected {wanted}")


def promises(module: nn.Module) -> dict[str, int]:
    """One Softmax for each module that attends."""
    return {SOFTMAX.name: sum(getattr(inner, "attends", 0) for inner in module.modules())}


RAW: tuple[str, ...] = ("raw",)
