"""What adapters read of a second checkpoint: it needs the same names and shapes as the net; the ids of texts; learnt
token embeddings."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from calmclip.export import layouts
from calmclip.export.checkpoints import Weights, read
from calmclip.export.layouts import LAYOUTS, Layout
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.preprocess.text import TextPreparer

State = Mapping[str, Tensor]


def check_same(base: State, other: State, file: str, name_of: Callable[[str], str] = str) -> None:
    """Raises `UnknownCheckpoint` with a tensor that ``other``, of ``file``, lacks, adds to ``base``, or has in another
    shape. ``name_of``: our name -> the name in the error."""
    for name, tensor in base.items():
        if name not in other:
            raise UnknownCheckpoint(f"{file} lacks {name_of(name)}, which the base has")
        if other[name].shape != tensor.shape:
            raise UnknownCheckpoint(
                f"{file}: {name_of(name)} has the shape {list(other[name].shape)}; the base's is {list(tensor.shape)}"
            )
    if extra := [name for name in other if name not in base]:
        raise UnknownCheckpoint(f"{file} holds {name_of(extra[0])}, which the base does not have")


def read_clip(path: Path, facts: Weights) -> dict[str, Tensor]:
    """The tensors of another CLIP of any layout, by our names. Raises `UnknownCheckpoint`."""
    checkpoint = read(path, facts)
    if (fitting := layouts.find(checkpoint)) is None:
        raise UnknownCheckpoint(f"{path}: its tensors are of no layout in the table")
    return layouts.translate(fitting[1], checkpoint)


def layout_of(net: Net, adapter: str) -> tuple[Layout, Callable[[str], str]]:
    """The layout of ``net``, which must be one of the family, and a function: our name -> its name of a tensor. Raises
    `BadRequest`."""
    if net.layout is None or not any(LAYOUTS.get(name) is net.layout for name in LAYOUTS.names()):
        raise BadRequest(
            f"{adapter} does not apply to {net.source.model}: expected a net of the kind clip, not {net.name}"
        )
    return net.layout, partial(layouts.checkpoint_name, net.layout)


def token_ids(net: Net, texts: Sequence[str]) -> list[Sequence[int]]:
    """The ids of each text, between those of its start and its end."""
    spec = net.towers["text"].preprocess
    assert isinstance(spec, TextPreprocess)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / spec.tokenizer).write_bytes(net.files[spec.tokenizer])
        preparer = TextPreparer(spec, Path(directory))
        return [preparer.tokens(text, index) for index, text in enumerate(texts)]


def rows_of(tensor: Tensor, name: str, width: int) -> Tensor:
    """Learnt token embeddings [1, …, n, W] -> float32 [n, W]. Raises `UnknownCheckpoint` for another shape, or NaN."""
    if tensor.ndim < 2 or not 0 < tensor.numel() == width * tensor.shape[-2] or not tensor.isfinite().all():
        raise UnknownCheckpoint(f"{name} has the shape {list(tensor.shape)}; expected [any, {width}], finite")
    return tensor.reshape(-1, width).float()
