"""What a recipe wants of the weights, done to translated tensors, and kept for the manifest."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from calmclip.export import layouts
from calmclip.export.checkpoints import Weights, edits, hub, read
from calmclip.export.checkpoints.weights import weights_sha256
from calmclip.export.layouts import Layout
from calmclip.models.errors import UnknownCheckpoint


@dataclass
class Done:
    """``files``: EDIT/FILE -> sha256. ``notes``: in words."""

    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, edit: str, path: Path, note: str) -> None:
        self.files |= {f"{edit}/{name}": digest for name, digest in weights_sha256(path).items()}
        self.notes.append(note)


def edited(layout: Layout, state: dict[str, Tensor], weights: Weights) -> tuple[dict[str, Tensor], Done]:
    """Raises `UnknownCheckpoint` naming the file and the tensor that does not fit, `BadRequest` for the impossible."""
    done, said = Done(), partial(layouts.theirs, layout)
    if path := weights.over:
        state = edits.over(state, layouts.translate_image(layout, read(path, weights)), str(path), said)
        done.add("over", path, f"image tower of {hub.name(path)}")
    if path := weights.mix:
        other = read(path, weights)
        if (found := layouts.find(other)) is None:
            raise UnknownCheckpoint(f"{path}: its tensors are of no layout in the table")
        state = edits.mix(state, layouts.translate(found[1], other), weights.alpha or 0.0, str(path), said)
        done.add("mix", path, f"{weights.alpha or 0.0:g} of {hub.name(path)} mixed in")
    if weights.stretch:
        before = len(state.get("text.positions", ()))
        state = edits.stretch(state, weights.stretch)
        done.notes.append(f"positions stretched from {before} to {weights.stretch}")
    return state, done
