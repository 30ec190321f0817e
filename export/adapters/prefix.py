"""Learnt rows in every text, in the place of token embeddings: soft prompts. Callers send the text alone.

    place          the tower reads            from
    after_start    start, rows, text, end     CoOp (arXiv 2109.01134), VladVA, SoftPromptComp
    before         rows, start, text, end     prompt tuning of the library peft (arXiv 2104.08691)

The rows count as tokens: a text has as many fewer, and a mean takes them unless they are left out. A tower that pools
its first token pools the first row if rows stand before it, as with peft.

Source: Zhou et al. 2022 (arXiv 2109.01134), section 3.2; Lester et al. 2021 (arXiv 2104.08691), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.adapters._tensors import rows_of, token_ids
from calmclip.export.checkpoints import hub, peft, read
from calmclip.export.nets import Net, text_inputs
from calmclip.export.towers.prefix import Prefixed
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import FrozenModel, TextPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint

TENSORS = ("ctx", "prompt_embeddings")  # last part of the name of the rows: in CoOp, in peft
LEAST = 3  # tokens that a text needs: start, a word, end

Place = Literal["after_start", "before"]


class Params(FrozenModel):
    checkpoint: Path = Field(description="learnt rows for every text: .safetensors, .pt, .npy, or a directory of peft")
    place: Place | None = Field(
        default=None, description="of --prefix: after_start (default), or before (default for peft)"
    )
    left_out: bool = Field(default=False, description="a mean of tokens leaves the rows of --prefix out")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net whose texts do not become vectors token by token, and for rows that leave no room
    for a text; `UnknownCheckpoint` with the tensor that does not fit."""
    text = net.towers.get("text")
    if net.folded or text is None or "text_embeds" not in text.outputs:
        raise _unfit(net)
    module, tokens, table = text.module, text.preprocess, getattr(text.module, "tokens", None)
    if not (isinstance(tokens, TextPreprocess) and isinstance(table, nn.Embedding)):
        raise _unfit(net)
    if params.left_out and tokens.pooled is None:
        raise BadRequest("prefix: left_out needs a tower whose mean is over chosen tokens; leave --prefix-left-out out")
    rows, place, file = read_rows(params.checkpoint, table.weight.shape[1])
    place = params.place or place
    left = tokens.context - len(rows)
    if left < LEAST:
        raise BadRequest(f"prefix: {len(rows)} rows leave {left} of {tokens.context} tokens; a text needs {LEAST}")
    if isinstance(module, TextTransformer) and module.style.pool == "eot" and module.style.end is None:
        # the rows have the highest ids
        module.style = replace(module.style, end=max(token_ids(net, ["a"])[0]))
    shorter = tokens.model_copy(update={"context": left})
    rows = rows / getattr(module, "embed_scale", 1.0)  # Gemma's, which multiplies what the table holds
    prefixed = Prefixed(module, rows, behind_first=place == "after_start", pooled=not params.left_out)
    tower = replace(text, module=prefixed, preprocess=shorter, inputs=text_inputs(shorter))
    net = replace(net, towers={**net.towers, "text": tower})
    where = {"after_start": "behind the first token", "before": "before the text"}[place]
    return with_note(net, f"{len(rows)} learnt rows of {hub.name(params.checkpoint)} {where}", prefix=file)


def _unfit(net: Net) -> BadRequest:
    return BadRequest(f"prefix does not apply to {net.source.model}: expected a text tower of vectors")


def read_rows(path: Path, width: int) -> tuple[Tensor, Place, Path]:
    """-> float32 [n, width], their usual place, and the file that holds them. Raises `UnknownCheckpoint`."""
    if peft.is_tuned(path):
        tuned = peft.read(path, "PROMPT_TUNING", "P_TUNING")
        return _rows(tuned.tensors, tuned.files[-1], width), "before", tuned.files[-1]
    tensors = {"array": _array(path)} if path.suffix == ".npy" else read(path).tensors
    return _rows(tensors, path, width), "after_start", path


def _rows(tensors: Mapping[str, Tensor], path: Path, width: int) -> Tensor:
    names = [name for name in tensors if name.rpartition(".")[2] in TENSORS] or [*tensors]
    if len(names) > 1:
        raise UnknownCheckpoint(
            f"{path} holds {len(tensors)} tensors; expected learnt rows alone, or with the name {' or '.join(TENSORS)}"
        )
    return rows_of(tensors[names[0]], f"{path}: {names[0]}", width)


def _array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array.astype(np.float32, casting="same_kind"))
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise UnknownCheckpoint(f"{path} is no array of numbers that numpy saved: {error}") from None


ADAPTERS.register("prefix")(
    Adapter(Params, adapt, {"--prefix": "checkpoint", "--prefix-place": "place", "--prefix-left-out": "left_out"})
)
