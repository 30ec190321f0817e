"""FAMILY layouts: how a research code names the tensors of a CLIP -> our names, and what the shapes do not say.

A layout is data: the names that identify it, a table of names, and a function for the settings. Names are templates:
``{i}`` and ``{e}`` stand for a number, ``{p}`` for weight or bias, ``{b}`` for a tensor of a batch norm, ``{rest}`` for
any text. The table works in both directions, so an error gives a missing tensor the name that the checkpoint uses.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.locate import one_line
from calmclip.export.towers import count, part
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess, VectorPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.preprocess.text import check_unknown_token
from calmclip.models.registry import Registry

_HOLES = {"i": r"\d+", "e": r"\d+", "p": "weight|bias", "b": "weight|bias|running_mean|running_var", "rest": ".+"}
DROP = ""  # the target of a tensor that is known and not needed
_AXES = {  # end of one of our names -> number of axes; shapes are read from these tensors
    "patch.weight": 4, "positions": 2, "cls": 1, "tokens.weight": 2, "qkv.weight": 2, "up.weight": 2, "gate.weight": 2,
    "projection.weight": 2,
}  # fmt: skip


class Misfit(Exception):
    """Raised by `Layout.after_read`. ``sentence`` has a {} for each of ``names``, which are our names of tensors."""

    def __init__(self, sentence: str, *names: str) -> None:
        super().__init__(sentence)
        self.sentence, self.names = sentence, names


@dataclass(frozen=True)
class Rule:
    """``theirs`` -> ``ours``, or `DROP`.

    ``convert`` is applied to the tensor when it is read, ``invert`` when it is written. ``piece``: the index of this
    tensor among those that are concatenated along the first axis.
    """

    theirs: str
    ours: str
    convert: Callable[[Tensor], Tensor] | None = None
    piece: int | None = None
    invert: Callable[[Tensor], Tensor] | None = None


def rename(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """A rule for each of ``names``, under the prefixes ``theirs`` and ``ours``."""
    return tuple(Rule(f"{theirs}.{name}", f"{ours}.{our_name}") for name, our_name in names.items())


def concatenate(theirs: str, ours: str, parts: Iterable[str]) -> tuple[Rule, ...]:
    """Rules that make one tensor of several. ``theirs`` has a * for each of ``parts``, in their order."""
    return tuple(Rule(theirs.replace("*", name), ours, piece=piece) for piece, name in enumerate(parts))


@dataclass(frozen=True)
class Settings:
    """The parts of a bundle beside the tensors.

    ``image``, ``text``: the tensors of a tower, without its prefix -> an empty module with those names. ``tokenizer``:
    none if the text tower reads vectors. ``regions``:
    the module of ``image`` -> one that holds it and answers class_embeds, boxes, objectness and image_embeds.
    """

    image: Callable[[Mapping[str, Tensor]], nn.Module]
    text: Callable[[Mapping[str, Tensor]], nn.Module]
    pixels: ImagePreprocess
    tokens: TextPreprocess | VectorPreprocess
    tokenizer: bytes = b""
    license: str = "not stated in the checkpoint"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    regions: Callable[[Any], nn.Module] | None = None


@dataclass(frozen=True)
class Layout:
    """A checkpoint has this layout if all of these hold: some tensor matches each template of ``keys``; no tensor
    matches a template of ``without``; the config ``file`` lies beside the tensors and ``no_file`` does not; the
    ``model_type`` of config.json is in the list; ``condition`` holds, for layouts that no name of a tensor identifies.

    ``settings(checkpoint, tensors by our names)`` is None only for layouts outside the family. ``required``: our names
    that are always there. ``facts``: the fields of `Weights` that the recipe may set. ``after_read`` does what a table
    of names cannot express, and may raise `Misfit`; ``before_write`` is its inverse. ``note``: for the operator of the
    bundle. ``refusal``: why a checkpoint of this kind is not supported.
    """

    title: str
    keys: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Checkpoint, Mapping[str, Tensor]], Settings] | None = None
    without: tuple[str, ...] = ()
    file: str | None = None
    no_file: str | None = None
    model_type: tuple[str, ...] = ()
    condition: Callable[[Checkpoint], bool] = lambda checkpoint: True
    required: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    after_read: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    before_write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    note: str = ""
    refusal: Callable[[Checkpoint], str | None] = lambda checkpoint: None

    def fits(self, checkpoint: Checkpoint) -> bool:
        if self.file and self.file not in checkpoint.configs:
            return False
        if self.no_file in checkpoint.configs:
            return False
        if self.model_type and checkpoint.config.get("model_type") not in self.model_type:
            return False
        if not self.condition(checkpoint):
            return False
        return not _missing(self.keys, checkpoint) and len(_missing(self.without, checkpoint)) == len(self.without)


LAYOUTS: Registry[Layout] = Registry("layouts", "calmclip.export.layouts")


def find(checkpoint: Checkpoint) -> tuple[str, Layout] | None:
    """The layout that fits, or None. Two layouts that fit are a defect of the table: `UnknownCheckpoint`."""
    fitting = [(name, LAYOUTS.get(name)) for name in LAYOUTS.names() if LAYOUTS.get(name).fits(checkpoint)]
    if len(fitting) > 1:
        raise UnknownCheckpoint(f"{checkpoint.path} fits several layouts: {', '.join(name for name, _ in fitting)}")
    return fitting[0] if fitting else None


def why_none_fits(checkpoint: Checkpoint) -> str | None:
    """A clause, if a layout refuses the checkpoint or knows nearly all names of its tensors; else None."""
    layouts = [LAYOUTS.get(name) for name in LAYOUTS.names()]
    for layout in layouts:
        if reason := layout.refusal(checkpoint):
            return reason
    # a layout that knows no tensor of an image tower fits the text tower of another
    close = [
        (layout, count, _missing(layout.keys, checkpoint))
        for layout in layouts
        if len(_missing(layout.without, checkpoint)) == len(layout.without)
        and (count := count_known(layout, checkpoint.names)) >= 0.8 * len(checkpoint.names)
        and any(_apply(layout.rules, name)[1].startswith("image.") for name in checkpoint.names)
    ]
    if not close:
        return None
    model_type = checkpoint.config.get("model_type")
    for layout, count, missing in close:
        if count == len(checkpoint.names) and not missing and layout.model_type and model_type not in layout.model_type:
            return (
                f"its tensors are those of {layout.title}, but its config.json says model_type {model_type!r}; "
                f"expected {' or '.join(layout.model_type)}"
            )
    # a layout that lacks a tensor explains more than a layout that lacks none and still does not fit
    layout, _, missing = max(close, key=lambda entry: (bool(entry[2]), entry[1], -len(entry[2])))
    return f"its tensors are nearly those of {layout.title}" + f", but {', '.join(missing)} is missing" * bool(missing)


def _missing(templates: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    """The ``templates`` that no tensor of the checkpoint matches."""
    return [template for template in templates if not any(map(_pattern(template).fullmatch, checkpoint.names))]


def count_known(layout: Layout, names: Iterable[str]) -> int:
    """How many of a checkpoint's names the layout's table has."""
    return sum(_apply(layout.rules, name)[0] is not None for name in names)


def translate(layout: Layout, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors by our names, float32. Raises `UnknownCheckpoint` that names the tensors which are unknown or missing."""
    state: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    sources: dict[tuple[str, int | None], str] = {}
    unexpected = []
    for name, tensor in checkpoint.tensors.items():
        rule, ours = _apply(layout.rules, name)
        if rule is None:
            unexpected.append(name)
        elif rule.ours != DROP:
            if (other := sources.setdefault((ours, rule.piece), name)) != name:
                raise UnknownCheckpoint(
                    f"{checkpoint.path}: {other} and {name} are two names of one tensor of {layout.title}; expected one"
                )
            value = tensor.float() if tensor.is_floating_point() else tensor
            try:
                value = rule.convert(value) if rule.convert else value
            except (IndexError, RuntimeError):
                raise UnknownCheckpoint(
                    f"{checkpoint.path}: {name} has the shape {list(tensor.shape)}, which this tensor cannot have"
                ) from None
            if problem := _problem(value, ours):
                raise UnknownCheckpoint(f"{checkpoint.path}: {name} {problem}")
            if rule.piece is None:
                state[ours] = value
            else:
                pieces.setdefault(ours, {})[rule.piece] = value
    if unexpected:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: {len(unexpected)} tensors are not of the layout {layout.title!r}, {_some(unexpected)}"
        )
    missing = []
    for ours, parts in pieces.items():
        numbers = [rule.piece for rule in layout.rules if rule.piece is not None and _match(rule.ours, ours)]
        if absent := [number for number in numbers if number not in parts]:
            missing += [checkpoint_name(layout, ours, number) for number in absent]
        elif len({(tensor.ndim, tensor.shape[1:]) for tensor in parts.values()}) > 1:
            names = [f"{checkpoint_name(layout, ours, n)} {list(tensor.shape)}" for n, tensor in sorted(parts.items())]
            raise UnknownCheckpoint(f"{checkpoint.path}: the shapes of {', '.join(names)} do not go together")
        else:
            state[ours] = torch.cat([parts[number] for number in sorted(parts)])
    missing += [checkpoint_name(layout, ours) for ours in layout.required if ours not in state and ours not in pieces]
    if missing:
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {len(missing)} tensors, {_some(missing)}")
    try:
        return layout.after_read(state)
    except KeyError as error:
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {checkpoint_name(layout, error.args[0])}") from None
    except Misfit as error:
        names = [f"{checkpoint_name(layout, name)} {list(state[name].shape)}" for name in error.names]
        raise UnknownCheckpoint(f"{checkpoint.path}: {error.sentence.format(*names)}") from None


def to_checkpoint(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `translate`: unfolded tensors by our names -> tensors by the checkpoint's names. The first rule
    that fits names a tensor. Raises `KeyError` with a name that the table does not have."""
    tensors = {}
    for ours, tensor in layout.before_write(state).items():
        rules = [(rule, match) for rule in layout.rules if rule.ours and (match := _match(rule.ours, ours))]
        if not rules:
            raise KeyError(ours)
        # a table may also know the tensor in one piece
        rules = rules[:1] if rules[0][0].piece is None else [pair for pair in rules if pair[0].piece is not None]
        for (rule, match), rows in zip(rules, piece_rows(state, ours, len(rules)), strict=True):
            piece = tensor if len(rules) == 1 else tensor[rows]  # the only piece may be a scalar
            value = rule.invert(piece) if rule.invert else piece
            tensors[rule.theirs.format(**match.groupdict())] = value.contiguous()
    return tensors


def piece_rows(state: Mapping[str, Tensor], ours: str, number: int) -> list[slice]:
    """The rows of ``number`` pieces in our tensor. Pieces are of one size, but k and v may have fewer heads than q."""
    if number == 1:
        return [slice(None)]
    total = len(state[ours])
    attention, mark, _ = ours.partition(".qkv.")
    first = state[f"{attention}.out.weight"].shape[1] if mark else total // number
    starts = [0, *(first + piece * (total - first) // (number - 1) for piece in range(number))]
    return [slice(start, end) for start, end in pairwise(starts)]


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint is ``rows`` of our tensor ``ours``, after ``convert``."""

    ours: str
    rows: slice
    convert: Callable[[Tensor], Tensor] | None


def places(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Place]:
    """Every name that the table has for a tensor of ``state``, or for a piece of it."""
    names = {}
    for ours in state:
        rules = [(rule, match) for rule in layout.rules if rule.ours and (match := _match(rule.ours, ours))]
        number = sum(rule.piece is not None for rule, _ in rules)
        for rule, match in rules:
            rows = slice(None) if rule.piece is None else piece_rows(state, ours, number)[rule.piece]
            names[rule.theirs.format(**match.groupdict())] = Place(ours, rows, rule.convert)
    return names


def translate_image(layout: Layout, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The image tower alone, with names under ``image.``. The checkpoint may hold more, or lack the prefix ``visual.``.

    The layout that knows most of its names reads it; ``layout`` wins a tie. Raises as `translate`.
    """
    best, most = (layout, checkpoint), 0
    for candidate in (layout, *(LAYOUTS.get(name) for name in LAYOUTS.names())):
        for prefix in ("", "visual."):
            named = replace(checkpoint, tensors={prefix + name: t for name, t in checkpoint.tensors.items()})
            count = sum(_apply(candidate.rules, name)[1].startswith("image.") for name in named.names)
            if count > most:
                best, most = (candidate, named), count
    if not most:
        raise UnknownCheckpoint(f"{checkpoint.path} holds no image tower of a layout in the table")
    candidate, named = best
    rules = tuple(rule if rule.ours.startswith("image.") else replace(rule, ours=DROP) for rule in candidate.rules)
    return translate(replace(candidate, rules=rules, required=()), named)


def _problem(value: Tensor, ours: str) -> str | None:
    """Why a tensor cannot be the weight that we call ``ours``, as a clause; else None."""
    library = ".trunk." in ours  # of a module that a library builds; `fill` compares the shapes with it
    shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
    for end, axes in _AXES.items():
        if not library and (ours == end or ours.endswith(f".{end}")) and value.ndim != axes:
            return f"has the shape {shape}; expected {axes} axes"
    if not library and ours.endswith("patch.weight") and (value.shape[1] != 3 or value.shape[2] != value.shape[3]):
        return f"has the shape {shape}; expected [width, 3, patch, patch]"
    if ours.startswith("logit_") and value.numel() != 1:
        return f"has the shape {shape}; expected one number"
    if not (value.is_floating_point() or library or ours.endswith("num_batches_tracked")):  # batch norms count steps
        return f"is of {dtype}; expected floating-point numbers"
    if not value.numel():
        return f"is empty, its shape is {shape}"
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return "holds infinities or NaN; the file is damaged, or its training diverged"
    return None


def settings(layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """`Layout.settings`, checked.

    Raises `UnknownCheckpoint` for config values of an unexpected kind, and as `check_vocabulary`; `BadRequest` for a
    fact of the recipe that the layout does not take.
    """
    for name, value in checkpoint.facts.model_dump(exclude_none=True).items():
        if name not in layout.facts:
            raise BadRequest(f"{name} {value!r} does not apply to {checkpoint.path}, {layout.title}; leave it out")
    assert layout.settings is not None
    try:
        result = layout.settings(checkpoint, state)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        files = ", ".join(checkpoint.configs) or "tensors"
        raise UnknownCheckpoint(
            f"{checkpoint.path}: its {files} cannot be interpreted: {one_line(repr(error))}"
        ) from None
    if isinstance(result.tokens, TextPreprocess):
        check_vocabulary(layout, checkpoint, state, result.tokenizer, result.tokens.context)
    return result


def check_vocabulary(
    layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor], tokenizer: bytes, context: int
) -> None:
    """Raises `UnknownCheckpoint` if the tokenizer has more tokens, or ``context`` more positions, than the weights have
    rows; and for a tokenizer without its unknown token."""
    words = Tokenizer.from_str(tokenizer.decode())
    try:
        check_unknown_token(words)
    except ValueError as error:
        raise UnknownCheckpoint(f"{checkpoint.path}: tokenizer: {error}") from None
    sizes = {
        "tokenizer has": (words.get_vocab_size(), "text.tokens.weight"),
        "context is": (context, "text.positions"),
    }
    for subject, (number, table) in sizes.items():
        if table in state and number > (rows := len(state[table])):  # RoPE has no table of positions
            raise UnknownCheckpoint(
                f"{checkpoint.path}: its {subject} {number} tokens, but {checkpoint_name(layout, table)} has {rows} "
                "rows; tokenizer and config must be those of the weights"
            )


def fill(
    layout: Layout,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    prefix: str,
    make: Callable[[Mapping[str, Tensor]], nn.Module],
    *,
    fold: bool = True,
) -> nn.Module:
    """The tower with the tensors of ``state`` under ``prefix``, in eval mode. ``make``: tensors -> the empty tower.

    ``fold=False``: the modules stay as they were trained. Raises `UnknownCheckpoint` with the checkpoint's name of a
    tensor that is missing, unexpected or of another shape.
    """
    tensors = part(state, prefix)
    try:
        module = make(tensors)
    except KeyError as error:  # a tensor that gives the tower its shapes
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {checkpoint_name(layout, error.args[0])}") from None
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:  # torch's own words for impossible shapes
        raise UnknownCheckpoint(f"{checkpoint.path}: no {prefix}tower has its shapes: {one_line(error)}") from None
    expected = module.state_dict()
    names = {name: checkpoint_name(layout, prefix + name) for name in {*expected, *tensors}}
    if missing := sorted(names[name] for name in expected.keys() - tensors.keys()):
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {len(missing)} tensors, {_some(missing)}")
    if extra := sorted(names[name] for name in tensors.keys() - expected.keys()):
        raise UnknownCheckpoint(f"{checkpoint.path}: {len(extra)} tensors are not used, {_some(extra)}")
    for name, empty in expected.items():
        shape, tensor = list(empty.shape), tensors[name]
        if list(tensor.shape) != shape:
            raise UnknownCheckpoint(
                f"{checkpoint.path}: {names[name]} has the shape {list(tensor.shape)}; expected {shape}"
            )
        if empty.is_floating_point() and not tensor.is_floating_point():
            raise UnknownCheckpoint(
                f"{checkpoint.path}: {names[name]} is of {str(tensor.dtype).removeprefix('torch.')}; "
                "expected floating-point numbers, as they were before any quantization"
            )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)
    if fold:
        cast(Any, module).fold()
    return module.eval()


def embed_dim(layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> int:
    """The length of a vector, from the projections. Raises `UnknownCheckpoint` if two differ."""
    adaptor = f"text.layers.{count(state, 'text.layers.') - 1}.weight"  # the last layer of `towers.adaptor`
    ends = ("image.projection.weight", "text.projection.weight", "text.projection.down.weight", adaptor)
    dims = {name: len(state[name]) for name in ends if name in state}
    if len({*dims.values()}) > 1:
        both = " and ".join(f"{checkpoint_name(layout, name)} for {dim}" for name, dim in dims.items())
        raise UnknownCheckpoint(f"{checkpoint.path}: the shapes of its projections differ: {both} numbers in a vector")
    return next(iter(dims.values()))


def _apply(rules: tuple[Rule, ...], name: str) -> tuple[Rule | None, str]:
    """The first rule that reads ``name``, and our name."""
    for rule in rules:
        if match := _match(rule.theirs, name):
            return rule, rule.ours.format(**match.groupdict())
    return None, ""


def checkpoint_name(layout: Layout, ours: str, piece: int | None = None) -> str:
    """The checkpoint's name of a tensor of ours; our name if the table has no rule for it."""
    for rule in layout.rules:
        if rule.ours and (match := _match(rule.ours, ours)) and (piece is None or rule.piece == piece):
            return rule.theirs.format(**{**dict.fromkeys(_HOLES, "*"), **match.groupdict()})
    return ours


def our_name(layout: Layout, name: str) -> str:
    """Our name of a tensor of the checkpoint; `DROP` if it is not needed or not known."""
    return _apply(layout.rules, name)[1]


def _match(template: str, name: str) -> re.Match[str] | None:
    return _pattern(template).fullmatch(name)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for hole, expression in _HOLES.items():
        before, mark, after = text.partition(re.escape(f"{{{hole}}}"))
        if mark:
            text = f"{before}(?P<{hole}>{expression}){after.replace(mark, f'(?P={hole})')}"
    return re.compile(text)


def _some(names: list[str], most: int = 3) -> str:
    return f"for example {', '.join(names[:most])}"
