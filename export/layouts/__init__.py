"""FAMILY layouts: how a research code names the tensors of a CLIP -> our names, and what shapes do not say.

A layout is data: which names are decisive, a table of names, and a function for the settings. Names are templates:
``{i}``, ``{e}`` stand for a number, ``{p}`` for weight or bias, ``{b}`` for what a batch norm has, ``{rest}`` for
anything; so a table reads both ways, and what is missing is reported by the name it has in the checkpoint.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.weights import one_line
from calmclip.export.towers import part
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.registry import Registry

_HOLES = {"i": r"\d+", "e": r"\d+", "p": "weight|bias", "b": "weight|bias|running_mean|running_var", "rest": ".+"}
DROP = ""  # as a target: known, and not needed
_AXES = {  # our names, by their ends, of what shapes are read from -> how many axes they must have
    "patch.weight": 4, "positions": 2, "cls": 1, "tokens.weight": 2, "qkv.weight": 2, "up.weight": 2, "gate.weight": 2,
    "projection.weight": 2,
}  # fmt: skip


class Misfit(Exception):
    """Of `Layout.finish`: a sentence with {} for each of the tensors ``names`` (ours); piece n of one: (name, n)."""

    def __init__(self, sentence: str, *names: str) -> None:
        super().__init__(sentence)
        self.sentence, self.names = sentence, names


@dataclass(frozen=True)
class Rule:
    """``theirs`` -> ``ours``, or `DROP`. ``how`` is done to the tensor; ``piece``: of several that are stacked, in
    order, along the first axis."""

    theirs: str
    ours: str
    how: Callable[[Tensor], Tensor] | None = None
    piece: int | None = None
    undo: Callable[[Tensor], Tensor] | None = None  # what ``how`` did, where checkpoints of the layout are written


@dataclass(frozen=True)
class Settings:
    """What a bundle is made of, beside the tensors.

    ``image``, ``text``: the tensors of a tower, without its prefix -> an empty module with those names.
    """

    image: Callable[[Mapping[str, Tensor]], nn.Module]
    text: Callable[[Mapping[str, Tensor]], nn.Module]
    pixels: ImagePreprocess
    tokens: TextPreprocess
    tokenizer: bytes
    license: str = "not stated in the checkpoint"
    templates: tuple[str, ...] = ("a photo of a {}.",)


@dataclass(frozen=True)
class Layout:
    """What decides: ``keys``, templates, each of which some tensor has, and ``without``, which none has; ``file``, a
    config that must lie beside the tensors, ``no_file``, that must not; ``model_type``: what config.json may say;
    ``also``: what the configs say, where no name of a tensor tells.

    ``settings(checkpoint, tensors by our names)``, of those in the family; ``needs``: our names that are always there;
    ``asks``: which facts of `Weights` it leaves to the recipe.
    """

    title: str
    keys: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Checkpoint, Mapping[str, Tensor]], Settings] | None = None
    without: tuple[str, ...] = ()
    file: str | None = None
    no_file: str | None = None
    model_type: tuple[str, ...] = ()
    also: Callable[[Checkpoint], bool] = lambda checkpoint: True
    needs: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # what a table of names cannot say; `Misfit`
    begin: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict  # the other way round, of what is written
    note: str = ""  # what who serves it should know
    refuses: Callable[[Checkpoint], str | None] = lambda checkpoint: None  # one of this kind that does not fit: why

    def fits(self, checkpoint: Checkpoint) -> bool:
        if self.file and self.file not in checkpoint.configs:
            return False
        if self.no_file in checkpoint.configs:
            return False
        if self.model_type and checkpoint.config.get("model_type") not in self.model_type:
            return False
        if not self.also(checkpoint):
            return False
        found = [any(_pattern(key).fullmatch(name) for name in checkpoint.names) for key in self.keys]
        barred = [any(_pattern(key).fullmatch(name) for name in checkpoint.names) for key in self.without]
        return all(found) and not any(barred)


LAYOUTS: Registry[Layout] = Registry("layouts", "calmclip.export.layouts")


def find(checkpoint: Checkpoint) -> tuple[str, Layout] | None:
    """The one layout that fits; None where none does. Two that fit are a defect of the table."""
    fitting = [(name, LAYOUTS.get(name)) for name in LAYOUTS.names() if LAYOUTS.get(name).fits(checkpoint)]
    if len(fitting) > 1:
        raise UnknownCheckpoint(f"{checkpoint.path} fits several layouts: {', '.join(name for name, _ in fitting)}")
    return fitting[0] if fitting else None


def nearest(checkpoint: Checkpoint) -> str | None:
    """Why no layout fits, where one says so or knows nearly all names of the tensors; None where none does."""
    for name in LAYOUTS.names():
        if why := LAYOUTS.get(name).refuses(checkpoint):
            return why
    names = LAYOUTS.names()
    counts = {name: known(LAYOUTS.get(name), checkpoint.names) for name in names}
    lacks = {name: [key for key in LAYOUTS.get(name).keys if not any(_match(key, one) for one in checkpoint.names)]
             for name in LAYOUTS.names()}  # fmt: skip
    close = [name for name in counts if counts[name] >= 0.8 * len(checkpoint.names) and _sees(name, checkpoint)]
    if not close:
        return None
    said = checkpoint.config.get("model_type")
    for layout in (LAYOUTS.get(name) for name in close if counts[name] == len(checkpoint.names) and not lacks[name]):
        if layout.model_type and said not in layout.model_type:
            return (
                f"its tensors are those of {layout.title}, but its config.json says model_type {said!r}; "
                f"expected {' or '.join(layout.model_type)}"
            )
    # one that lacks a tensor says more than one that lacks none and still does not fit
    best = max(close, key=lambda name: (bool(lacks[name]), counts[name], -len(lacks[name])))
    layout, absent = LAYOUTS.get(best), lacks[best]
    return f"its tensors are nearly those of {layout.title}" + (f", but {', '.join(absent)} is missing" * bool(absent))


def _sees(name: str, checkpoint: Checkpoint) -> bool:
    """Does the layout ``name`` find a part of an image tower? Where none is, it is another's text tower."""
    return any(_apply(LAYOUTS.get(name).rules, key)[1].startswith("image.") for key in checkpoint.names)


def known(layout: Layout, names: Iterable[str]) -> int:
    """How many of a checkpoint's names its table has."""
    return sum(_apply(layout.rules, name)[0] is not None for name in names)


def translate(layout: Layout, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors by our names, float32. Raises `UnknownCheckpoint` naming what the table does not know or wants."""
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    read: dict[tuple[str, int | None], str] = {}
    unexpected = []
    for name, tensor in checkpoint.tensors.items():
        rule, ours = _apply(layout.rules, name)
        if rule is None:
            unexpected.append(name)
        elif rule.ours != DROP:
            if (other := read.setdefault((ours, rule.piece), name)) != name:
                raise UnknownCheckpoint(
                    f"{checkpoint.path}: {other} and {name} are two names of one tensor of {layout.title}; expected one"
                )
            value = tensor.float() if tensor.is_floating_point() else tensor
            try:
                value = rule.how(value) if rule.how else value
            except (IndexError, RuntimeError):
                raise UnknownCheckpoint(
                    f"{checkpoint.path}: {name} has the shape {list(tensor.shape)}, which is none it may have"
                ) from None
            if problem := _problem(value, ours):
                raise UnknownCheckpoint(f"{checkpoint.path}: {name} {problem}")
            if rule.piece is None:
                found[ours] = value
            else:
                pieces.setdefault(ours, {})[rule.piece] = value
    if unexpected:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: {len(unexpected)} tensors are not of the layout {layout.title!r}, "
            f"{_some(unexpected)} among them"
        )
    missing = []
    for ours, parts in pieces.items():
        numbers = [rule.piece for rule in layout.rules if rule.piece is not None and _match(rule.ours, ours)]
        if absent := [n for n in numbers if n not in parts]:
            missing += [theirs(layout, ours, n) for n in absent]
        elif len({(tensor.ndim, tensor.shape[1:]) for tensor in parts.values()}) > 1:
            names = [f"{theirs(layout, ours, n)} {list(tensor.shape)}" for n, tensor in sorted(parts.items())]
            raise UnknownCheckpoint(f"{checkpoint.path}: the shapes of {', '.join(names)} do not go together")
        else:
            found[ours] = torch.cat([parts[n] for n in sorted(parts)])
    missing += [theirs(layout, ours) for ours in layout.needs if ours not in found and ours not in pieces]
    if missing:
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {len(missing)} tensors, {_some(missing)} among them")
    try:
        return layout.finish(found)
    except KeyError as error:
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {theirs(layout, error.args[0])}") from None
    except Misfit as error:
        names = [f"{theirs(layout, name)} {list(found[name].shape)}" for name in error.names]
        raise UnknownCheckpoint(f"{checkpoint.path}: {error.sentence.format(*names)}") from None


def written(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round: tensors by our names, before they are folded, -> by the checkpoint's; the first rule that
    fits names it. Raises `KeyError` naming one that the table does not know."""
    found = {}
    for ours, tensor in layout.begin(state).items():
        rules = [(rule, match) for rule in layout.rules if rule.ours and (match := _match(rule.ours, ours))]
        if not rules:
            raise KeyError(ours)
        if rules[0][0].piece is None:
            rules = rules[:1]
        pieces = tensor.chunk(len(rules)) if len(rules) > 1 else (tensor,)
        for (rule, match), piece in zip(rules, pieces, strict=True):
            value = rule.undo(piece) if rule.undo else piece
            found[rule.theirs.format(**match.groupdict())] = value.contiguous()
    return found


def translate_image(layout: Layout, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The image tower alone (names under ``image.``) of a checkpoint that may hold more, or have lost its prefix.

    By the layout that knows most of its names, ``layout`` before others. Raises as `translate`.
    """
    best, most = (layout, checkpoint), 0
    for one in (layout, *(LAYOUTS.get(name) for name in LAYOUTS.names())):
        for prefix in ("", "visual."):
            named = replace(checkpoint, tensors={prefix + name: t for name, t in checkpoint.tensors.items()})
            known = sum(_apply(one.rules, name)[1].startswith("image.") for name in named.names)
            if known > most:
                best, most = (one, named), known
            if known:
                break
    if not most:
        raise UnknownCheckpoint(f"{checkpoint.path} holds no image tower of a layout in the table")
    one, named = best
    rules = tuple(rule if rule.ours.startswith("image.") else replace(rule, ours=DROP) for rule in one.rules)
    return translate(replace(one, rules=rules, needs=()), named)


def _problem(value: Tensor, ours: str) -> str | None:
    """Why a tensor can be no weight of ours; None where it can."""
    inside = ".trunk." in ours  # of a module that a library builds, and `fill` compares with it
    for end, axes in _AXES.items():
        if not inside and (ours == end or ours.endswith(f".{end}")) and value.ndim != axes:
            return f"has the shape {list(value.shape)}; expected {axes} axes"
    if not inside and ours.endswith("patch.weight") and (value.shape[1] != 3 or value.shape[2] != value.shape[3]):
        return f"has the shape {list(value.shape)}; expected [width, 3, patch, patch]"
    if ours.startswith("logit_") and value.numel() != 1:
        return f"has the shape {list(value.shape)}; expected one number"
    if not (value.is_floating_point() or inside or ours.endswith("num_batches_tracked")):  # batch norms count steps
        return f"is of {str(value.dtype).removeprefix('torch.')}; expected floating-point numbers"
    if not value.numel():
        return f"is empty, its shape is {list(value.shape)}"
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return "holds numbers that are infinite or not numbers; the file is damaged, or its training went astray"
    return None


def settings(layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """`Layout.settings`; configs whose values are of other kinds than expected are `UnknownCheckpoint` too, and a
    tokenizer or a context with more tokens than the weights have rows for. Raises `BadRequest` for a fact that the
    layout does not ask for."""
    for name in ("activation", "experts"):
        if name not in layout.asks and (said := getattr(checkpoint.given, name)):
            raise BadRequest(f"{name} {said!r} does not apply to {checkpoint.path}, {layout.title}; leave it out")
    assert layout.settings is not None
    try:
        made = layout.settings(checkpoint, state)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        files = ", ".join(checkpoint.configs) or "tensors"
        raise UnknownCheckpoint(
            f"{checkpoint.path}: its {files} cannot be made sense of: {one_line(repr(error))}"
        ) from None
    suit(layout, checkpoint, state, made.tokenizer, made.tokens.context)
    return made


def suit(layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor], tokenizer: bytes, context: int) -> None:
    """Raises `UnknownCheckpoint` for a tokenizer with more tokens, or a ``context`` with more places, than the weights
    have rows for."""
    words, rows = Tokenizer.from_str(tokenizer.decode()).get_vocab_size(), len(state["text.tokens.weight"])
    if words > rows:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: its tokenizer has {words} tokens, but {theirs(layout, 'text.tokens.weight')} {rows} "
            "rows: it is another model's"
        )
    if context > (rows := len(state["text.positions"])):
        raise UnknownCheckpoint(
            f"{checkpoint.path}: its context is {context} tokens, but "
            f"{theirs(layout, 'text.positions')} has {rows} rows"
        )


def fill(
    layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor], prefix: str, make: Any, *, fold: bool = True
) -> nn.Module:
    """The tower whose tensors are those of ``state`` under ``prefix``, ready to run: ``make(tensors)`` with them in;
    without ``fold``, as it was trained.

    Raises `UnknownCheckpoint` naming, as the checkpoint does, what is missing, unexpected or of another shape.
    """
    tensors = part(state, prefix)
    try:
        module = make(tensors)
    except KeyError as error:  # a tensor that shapes are read from
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {theirs(layout, error.args[0])}") from None
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:  # torch's own words for impossible shapes
        raise UnknownCheckpoint(f"{checkpoint.path}: no {prefix}tower has its shapes: {one_line(error)}") from None
    empty = module.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    named = {name: theirs(layout, prefix + name) for name in {*wanted, *tensors}}
    if missing := sorted(named[name] for name in wanted.keys() - tensors.keys()):
        raise UnknownCheckpoint(f"{checkpoint.path} lacks {len(missing)} tensors, {_some(missing)} among them")
    if extra := sorted(named[name] for name in tensors.keys() - wanted.keys()):
        raise UnknownCheckpoint(f"{checkpoint.path}: {len(extra)} tensors belong nowhere, {_some(extra)} among them")
    for name, shape in wanted.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise UnknownCheckpoint(
                f"{checkpoint.path}: {named[name]} has the shape {list(found)}; expected {list(shape)}"
            )
        if empty[name].is_floating_point() and not tensors[name].is_floating_point():
            raise UnknownCheckpoint(
                f"{checkpoint.path}: {named[name]} is of {str(tensors[name].dtype).removeprefix('torch.')}; "
                "expected floating-point numbers, as they were before any quantization"
            )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)
    if fold:
        module.fold()
    return module.eval()


def dim(layout: Layout, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> int:
    """Numbers in a vector, by the projections. Raises `UnknownCheckpoint` where two differ."""
    ends = ("image.projection.weight", "text.projection.weight", "text.projection.down.weight")
    names = [name for name in ends if name in state]
    if len(found := {len(state[name]) for name in names}) > 1:
        both = " and ".join(f"{theirs(layout, name)} for {len(state[name])}" for name in names)
        raise UnknownCheckpoint(f"{checkpoint.path}: the shapes of its projections differ: {both} numbers in a vector")
    return found.pop()


def _apply(rules: tuple[Rule, ...], name: str) -> tuple[Rule | None, str]:
    for rule in rules:
        if match := _pattern(rule.theirs).fullmatch(name):
            return rule, rule.ours.format(**match.groupdict())
    return None, ""


def theirs(layout: Layout, ours: str, piece: int | None = None) -> str:
    """The checkpoint's name of a tensor of ours; ours where the table has none."""
    for rule in layout.rules:
        if rule.ours and (match := _match(rule.ours, ours)) and (piece is None or rule.piece == piece):
            return rule.theirs.format(**{**dict.fromkeys(_HOLES, "*"), **match.groupdict()})
    return ours


def _match(template: str, name: str) -> re.Match[str] | None:
    return _pattern(template).fullmatch(name)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text, seen = re.escape(template), set()
    for hole, what in _HOLES.items():
        mark = re.escape(f"{{{hole}}}")
        if mark in text:
            first, _, rest = text.partition(mark)
            text = f"{first}(?P<{hole}>{what}){rest.replace(mark, f'(?P={hole})')}"
            seen.add(hole)
    return re.compile(text)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most])
