"""The prompts that MoCoOp learnt over a base CLIP: its experts are folded to a bank of vectors and a gate.

Source: MoCoOp, Du et al. 2024 (arXiv 2409.12011), as its code saves it with Dassl. Each expert has learnt vectors
before and after the class name, ``ctx_before_{i}`` and ``ctx_after_{i}``; ``gate`` routes a picture's unit vector;
``w`` is added to every text vector before it is made a unit vector. The base gives the token embeddings and the text
tower, which the training does not change. The image tower is the checkpoint's where it has one: its norms may be tuned.

The code counts the words of a template, not its tokens, to decide where the name stands. So a class of the training
takes its other tokens from ``token_suffix_{i}``, as the code does. A name that is not in the training, or a checkpoint
without these rows, gets the definition: start, before, name, after, end.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from calmclip.export import layouts, parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, load_tensors, tensors, with_note
from calmclip.export.adapters._tensors import layout_of, token_ids
from calmclip.export.adapters.over import over
from calmclip.export.checkpoints import Checkpoint, hub, read
from calmclip.export.nets import Net
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import DefaultClassifier, FrozenModel, Plugin
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.labels import check_distinct

LEARNER, IMAGE = "prompt_learner.", "image_encoder."
_FROZEN = (  # of the base, or used in training alone
    "text_encoder.", "logit_scale", "prompt_learner.token_prefix_", "prompt_learner.token_suffix_",
    "prompt_learner.class_text_features", "prompt_learner.grouped_prototypes",
)  # fmt: skip
_NEAR = 1e-2  # relative, of the same embedding in half and in single precision


class Params(FrozenModel):
    checkpoint: Path = Field(description="prompts that MoCoOp tuned over this checkpoint, as Dassl saves them")
    classes: Path = Field(description="the class names of --mocoop, a text file with one per line")


@dataclass(frozen=True)
class Expert:
    """``before`` [n, W] and ``after`` [m, W]; ``suffix`` [C, L, W]: the other tokens of the training's classes, if the
    checkpoint has them."""

    before: Tensor
    after: Tensor
    suffix: Tensor | None


@dataclass(frozen=True)
class Learnt:
    """``gate`` [G, D], ``bias`` [G], ``shift`` [1, D]."""

    experts: tuple[Expert, ...]
    gate: Tensor
    bias: Tensor
    shift: Tensor
    image: Mapping[str, Tensor]  # by the names of the checkpoint, after `IMAGE`


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net whose texts are not pooled at their end, or that has no cosine head, and for class
    names that are absent, empty or given twice; `UnknownCheckpoint` with the tensor that does not fit."""
    layout, name_of = layout_of(net, "mocoop")
    scale, text = _scale(net), net.towers["text"]
    module = text.module
    if not (isinstance(module, TextTransformer) and module.style.pool == "eot" and module.style.causal):
        raise BadRequest(
            f"mocoop does not apply to {net.source.model}: expected a causal text tower, pooled at the end of a text"
        )
    path, names = params.checkpoint, class_names(params.classes)
    learnt = read_learnt(path, dim=text.outputs["text_embeds"].shape[-1], width=module.positions.shape[1])
    if learnt.image:
        base = {name: tensor for name, tensor in tensors(net).items() if name.startswith("image.")}
        named = Checkpoint(path, {f"visual.{name}": tensor for name, tensor in learnt.image.items()})
        image = {**base, **layouts.translate_image(layout, named)}
        load_tensors(net, over(tensors(net), image, str(path), name_of))
    ids = token_ids(net, [name.replace("_", " ") for name in names])  # as in the data sets of Dassl
    with parity.one_thread(), torch.inference_mode():
        bank = torch.stack([_vectors(module, expert, ids, learnt.shift, names, context) for expert in learnt.experts])
    assets = {"bank": bank, "gate": learnt.gate, "bias": learnt.bias}
    files = {f"mixture.{name}.npy": _npy(tensor) for name, tensor in assets.items()}
    head = Plugin(name="mixture", params={"scale": scale}, assets={name: f"mixture.{name}.npy" for name in assets})
    files["labels.json"] = json.dumps(names, ensure_ascii=False, indent=0).encode()
    assert net.classifier is not None
    classifier = DefaultClassifier(labels="labels.json", templates=net.classifier.templates, head=head)
    note = f"{len(learnt.experts)} experts of {hub.name(path)}, folded for {len(names)} classes"
    return replace(with_note(net, note, mocoop=path), classifier=classifier, files={**net.files, **files})


def class_names(file: Path) -> list[str]:
    """Raises `BadRequest`."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"the class names {file} cannot be read: {error}; expected a text file, one name a line"
        ) from None
    if not names:
        raise BadRequest(f"{file} holds no class names; expected one per line")
    check_distinct(names)
    return names


def read_learnt(path: Path, *, dim: int | str, width: int) -> Learnt:
    """``dim``: the length of a vector; ``width``: of a token. Raises `UnknownCheckpoint`."""
    named = {}
    image: dict[str, Tensor] = {}
    for name, tensor in read(path).tensors.items():
        if name.startswith(IMAGE):
            image[name.removeprefix(IMAGE)] = tensor
        else:  # a prompt learner that was saved alone has no prefix
            named[name if name.startswith((LEARNER, *_FROZEN)) else LEARNER + name] = tensor.float()
    state = {name.removeprefix(LEARNER): tensor for name, tensor in named.items() if name.startswith(LEARNER)}
    number = sum(name.startswith("ctx_before_") for name in state)
    wanted = [f"ctx_{place}_{i}" for i in range(number) for place in ("before", "after")]
    wanted += ["gate.weight", "gate.bias"]
    if not number or (absent := [name for name in wanted if name not in state]):
        raise UnknownCheckpoint(
            f"{path} lacks {LEARNER}{absent[0] if number else 'ctx_before_0'} of a MoCoOp checkpoint"
        )
    known = {*wanted, "w"}
    extra = [name for name in named if name.removeprefix(LEARNER) not in known and not name.startswith(_FROZEN)]
    if extra:
        raise UnknownCheckpoint(f"{path} holds {extra[0]}, which is no tensor of MoCoOp")
    shapes: dict[str, list[int | str | None]] = {name: [None, width] for name in wanted if name.startswith("ctx")}
    shapes |= {"gate.weight": [number, dim], "gate.bias": [number], "w": [1, dim]}
    for name, shape in shapes.items():
        if name in state and not _fits(state[name], shape):
            expected = ["any" if size is None else size for size in shape]
            raise UnknownCheckpoint(
                f"{path}: {LEARNER}{name} has the shape {list(state[name].shape)}; expected {expected}, finite"
            )
    experts = []
    for i in range(number):
        suffix = state.get(f"token_suffix_{i}")
        suffix = suffix if suffix is not None and _fits(suffix, [None, None, width]) else None
        experts.append(Expert(state[f"ctx_before_{i}"], state[f"ctx_after_{i}"], suffix))
    return Learnt(
        tuple(experts), state["gate.weight"], state["gate.bias"], state.get("w", torch.zeros(1, int(dim))), image
    )


def _fits(tensor: Tensor, shape: Sequence[int | str | None]) -> bool:
    sizes = len(tensor.shape) == len(shape) and all(s in (None, t) for t, s in zip(tensor.shape, shape, strict=True))
    return sizes and bool(tensor.isfinite().all())


def _vectors(
    tower: TextTransformer,
    expert: Expert,
    ids: Sequence[Sequence[int]],
    shift: Tensor,
    names: Sequence[str],
    context: Context,
) -> Tensor:
    """[C, D], the unit rows of one expert. Raises `BadRequest` for a name that is too long for the tower."""
    table, before, after = tower.tokens.weight, len(expert.before), len(expert.after)
    start, end = table[ids[0][0]], table[ids[0][-1]]
    words = [table[list(row[1:-1])] for row in ids]
    trained = _trained(expert, words, end)
    if expert.suffix is not None and trained is None:
        context.say("the class names are not those of the training; prompts are made of the names alone")
    rows = []
    for place, word in enumerate(words):
        name, rest, last = word, end[None], 1 + before + len(word) + after
        if trained is not None and expert.suffix is not None:
            suffix, last = expert.suffix[place], 1 + before + trained[place]
            name, rest = suffix[: len(word)], suffix[len(word) + after :]
        if last >= len(tower.positions):
            raise BadRequest(
                f"the prompt of the class {names[place]!r} has {last + 1} tokens; this model reads "
                f"{len(tower.positions)}. Use a shorter name"
            )
        prompt = torch.cat([start[None], expert.before, name, expert.after, rest])[: last + 1]
        marks = torch.full((1, last + 1), ids[place][0])
        marks[0, last] = ids[place][-1]  # the tower pools at the token that ends a text
        rows.append(tower.encode(prompt[None], marks))
    return torch.nn.functional.normalize(torch.cat(rows) + shift, dim=-1)


def _trained(expert: Expert, words: Sequence[Tensor], end: Tensor) -> list[int] | None:
    """For each class the place of ``end`` in its row of ``expert.suffix``; None if the classes are not those of the
    training: their number differs, a row does not hold its name, or the rows differ in what follows the name."""
    if expert.suffix is None or len(expert.suffix) != len(words):
        return None
    ends = torch.isclose(expert.suffix, end, rtol=_NEAR, atol=_NEAR * float(end.std())).all(-1).int()
    places = [int(row.argmax()) for row in ends]
    following = {place - len(word) for place, word in zip(places, words, strict=True)}
    held = all(map(_holds, expert.suffix, words))
    return places if held and len(following) == 1 and bool(ends.any(1).all()) else None


def _holds(suffix: Tensor, word: Tensor) -> bool:
    """Whether the tokens ``word`` stand together in ``suffix``, near its start: a template's last tokens may precede
    them."""
    near = _NEAR * float(word.std())
    return any(
        torch.allclose(suffix[shift : shift + len(word)], word, rtol=_NEAR, atol=near)
        for shift in range(min(4, 1 + len(suffix) - len(word)))
    )


def _scale(net: Net) -> float:
    head = net.classifier.head if net.classifier else None
    if head is None or head.name != "cosine":
        kind = head.name if head else "none"
        raise BadRequest(f"mocoop does not apply to {net.source.model}, whose head is {kind}; expected cosine")
    return float(head.params["scale"])


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy().astype(np.float32))
    return buffer.getvalue()


ADAPTERS.register("mocoop")(Adapter(Params, adapt, {"--mocoop": "checkpoint", "--classes": "classes"}))
