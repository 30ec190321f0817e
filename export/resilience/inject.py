"""Flip bits of bundles in memory, many times, and compare their answers with those of the same bundles without faults.

Source: ProAct (code `hamidmousavi0/reliable-relu-toolbox`): rates per bit, 100 repetitions. A repetition draws the
places of its faults, opens sessions over the flipped numbers, as after a fault of the memory that stores them, and
answers every picture.

    agreement   share of the pictures whose best label is that of the clean bundle
    cosine      mean over the vectors of the flipped graphs (pictures, labels), with those of the clean bundle
    accuracy    share of the pictures whose best label is the true one

A vector with NaN or infinity, or without length, is no answer: it disagrees, and its cosine is 0. The same holds for
all vectors if ONNX Runtime or an operator refuses the graph: that trial is *refused*. Intervals: percentiles 2.5 and
97.5 of the mean over 1,000 resamples of the repetitions.

Two bundles that store the same tensors, as with and without bounds, get the same faults: the seed, the rate and the
repetition determine them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from calmclip.export.resilience.faults import KINDS, MOST, Count, Faults, Kind, Store, draw, number
from calmclip.models.batched import BATCH_BYTES
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.evals.progress import progress
from calmclip.models.evals.zero_shot import DataSet
from calmclip.models.flow import Array, Arrays
from calmclip.models.runner import Runner
from calmclip.models.runtime.session import Session
from calmclip.models.tasks.classify import chosen, scored
from calmclip.models.tasks.features import labels, output_of, prepared

RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
ALL = "all"  # the part of a trial's faults: all, or those of one kind
_RESAMPLES = 1000
_ROUNDS = 5  # of the time without faults


class Settings(FrozenModel):
    """``graphs``: those whose bits flip. ``kinds``: of their numbers. ``apart``: every trial again with the faults of
    one kind alone."""

    graphs: tuple[str, ...] = ("image",)
    kinds: tuple[Kind, ...] = KINDS
    rates: tuple[float, ...] = Field(default=RATES, min_length=1)
    repeats: int = Field(default=20, ge=1)
    count: Count = "exact"
    apart: bool = False
    seed: int = Field(default=0, ge=0)

    @field_validator("rates")
    @classmethod
    def _in_order(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [rate for rate in rates if not 0 <= rate <= MOST]:
            raise ValueError(f"{wrong[0]:g} is not within 0 to {MOST:g} flipped bits per bit")
        return tuple(sorted({*rates}))

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if kind in kinds)


@dataclass(frozen=True)
class Trial:
    """One repetition; see the top of this module. ``seconds``: of its sessions and answers."""

    faults: int
    agreement: float
    cosine: float
    accuracy: float
    refused: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _Answer:
    """``vectors`` float32 [V, D] of the flipped graphs; ``logits`` float32 [N, C]."""

    vectors: Array
    logits: Array


class Subject:
    """One bundle under faults. Pictures are decoded once. Raises `TaskNotServed` for a bundle that cannot classify."""

    def __init__(self, runner: Runner, data: DataSet, graphs: Sequence[str], kinds: Sequence[Kind] = KINDS) -> None:
        runner.bundle.require("classify")
        if strange := [role for role in graphs if role not in ("image", "text")]:
            raise BadRequest(
                f"the graph {strange[0]!r} takes no part in zero-shot labels; expected image, text or both"
            )
        self.runner, self.bundle = runner, runner.bundle
        self.graphs = tuple(role for role in ("image", "text") if role in graphs)
        self.store = Store(self.bundle, self.graphs, kinds)
        self.truth = np.asarray(data.truth)
        self._classifier = chosen(self.bundle, None, data.labels)
        pictures = (Path(picture) if isinstance(picture, str) else picture for picture in data.pictures)
        rows = [runner.run(prepared(self.bundle, picture))[0] for picture in pictures]
        self._feeds = [*_batches(rows, self.bundle.graph("image").batch)]
        self._texts = runner.run(labels(self.bundle, self._classifier))
        self._pictures = self._embedded(runner.session("image"))
        self.clean = self._answer({})

    @property
    def name(self) -> str:
        return self.bundle.name

    @cached_property
    def signature(self) -> tuple[tuple[str, str, int], ...]:
        """Equal for bundles whose faults are at the same places."""
        return tuple((tensor.name, str(tensor.data.dtype), tensor.data.size) for tensor in self.store.tensors)

    def trial(self, faults: Faults) -> Trial:
        started = time.perf_counter()
        refused = ""
        answer: _Answer | None = self.clean
        if len(faults):
            changed = self.store.changed(faults)
            try:
                answer = self._answer(self._sessions(changed))
            except Exception as error:  # a clean graph has run: this one is refused for its numbers
                refused, answer = f"{type(error).__name__}: {error}", None
        return self._compared(answer, len(faults), refused, time.perf_counter() - started)

    def part(self, faults: Faults, kind: str) -> Faults:
        """The faults of one kind, or all."""
        if kind == ALL:
            return faults
        return faults.of([index for index, tensor in enumerate(self.store.tensors) if tensor.kind == kind])

    def milliseconds(self) -> float:
        """Of graph `image` without faults, for each picture."""
        started = time.perf_counter()
        self._embedded(self.runner.session("image"))
        return 1000 * (time.perf_counter() - started) / len(self.truth)

    def _sessions(self, changed: Mapping[str, Arrays]) -> dict[str, Session]:
        """One for each graph that has a fault."""
        graphs = {role: self.bundle.graph(role) for role in changed}
        return {
            role: Session(
                self.bundle.directory / graph.file, graph, self.runner.options, self.store.memory(role, changed[role])
            )
            for role, graph in graphs.items()
        }

    def _answer(self, sessions: Mapping[str, Session]) -> _Answer:
        pictures, texts = self._pictures, self._texts
        if "image" in sessions:
            pictures = self._embedded(sessions["image"])
        if "text" in sessions:
            texts = Runner(self.bundle, self.runner.options, sessions=sessions).run(
                labels(self.bundle, self._classifier)
            )
        with np.errstate(all="ignore"):
            logits = scored(self._classifier, pictures, texts)
        flipped = {"image": pictures, "text": texts}
        return _Answer(np.concatenate([flipped[role] for role in self.graphs]), logits)

    def _embedded(self, session: Session) -> Array:
        output = output_of(self.bundle, "image")
        return np.concatenate([session.run(feeds)[output] for feeds in self._feeds])

    def _compared(self, answer: _Answer | None, faults: int, refused: str, seconds: float) -> Trial:
        if answer is None:
            return Trial(faults, 0.0, 0.0, 0.0, refused, seconds)
        best, alive = answer.logits.argmax(axis=1), np.isfinite(answer.logits).all(axis=1)
        if "image" in self.graphs:
            alive &= _has_length(answer.vectors[: len(self.truth)])
        agreement = float((alive & (best == self.clean.logits.argmax(axis=1))).mean())
        accuracy = float((alive & (best == self.truth)).mean())
        cosine = float(cosines(answer.vectors, self.clean.vectors).mean())
        return Trial(faults, agreement, cosine, accuracy, refused, seconds)


def cosines(flipped: Array, clean: Array) -> Array:
    """float [N, D] each -> float64 [N], of the rows; 0 for a row of ``flipped`` with NaN or infinity or without
    length."""
    answers = _has_length(flipped)
    ours, theirs = np.where(answers[:, None], flipped, 0).astype(np.float64), clean.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    rows: Array = np.where(answers, (ours * theirs).sum(axis=1) / np.where(answers, lengths, 1), 0.0)
    return rows


def _has_length(rows: Array) -> Array:
    good: Array = np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
    return good


def _batches(rows: Sequence[Arrays], mergeable: bool) -> Iterator[Arrays]:
    """The feeds of pictures, as many at once as `Runner.map` runs."""
    size = max(1, BATCH_BYTES // sum(array.nbytes for array in rows[0].values())) if mergeable else 1
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield {name: np.concatenate([row[name] for row in part]) for name in rows[0]} if mergeable else part[0]


@dataclass(frozen=True)
class Mean:
    """``lower``, ``upper``: the interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Point:
    """``faults`` and ``seconds`` are means of a trial, ``refused`` is a share of the trials."""

    rate: float
    faults: float
    agreement: Mean
    cosine: Mean
    accuracy: Mean
    refused: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """``part``: `ALL`, or the kind whose faults alone were kept. ``half``: the rate at which the agreement falls below
    one half, on a line between two logarithms of rates; None if it does not."""

    bundle: str
    part: str
    points: tuple[Point, ...]
    half: float | None


@dataclass(frozen=True)
class Gain:
    """The agreement of ``bundle`` less that of ``other``, whose faults are at the same places, at each rate.
    ``at_half``: the agreement of ``bundle`` at the rate where ``other``'s is one half."""

    bundle: str
    other: str
    agreement: tuple[Mean, ...]
    at_half: float | None


@dataclass(frozen=True)
class Result:
    """``milliseconds``: bundle -> graph `image`, without faults, for each picture; the median of rounds in turn."""

    curves: tuple[Curve, ...]
    gains: tuple[Gain, ...]
    milliseconds: dict[str, float]
    reasons: tuple[str, ...]


def run(subjects: Sequence[Subject], settings: Settings) -> Result:
    """All trials of all subjects, in turn. Raises `BadRequest` for two bundles of one name."""
    if len({subject.name for subject in subjects}) < len(subjects):
        raise BadRequest(f"the bundles are called {', '.join(s.name for s in subjects)}; expected different names")
    stored = {subject.name: {tensor.kind for tensor in subject.store.tensors} for subject in subjects}
    apart = settings.kinds if settings.apart else ()
    parts = {name: [ALL, *(kind for kind in apart if kind in of)] for name, of in stored.items()}
    trials: dict[tuple[str, str, float], list[Trial]] = {}
    order = [*product(settings.rates, range(settings.repeats))]
    for rate, repetition in progress(order, "flipped bits", "repetition", len(order)):
        for subject in subjects:
            rng = _rng(settings.seed, repetition, rate)
            faults = draw(subject.store.tensors, number(subject.store.bits, rate, settings.count, rng), rng)
            for part in parts[subject.name]:
                trials.setdefault((subject.name, part, rate), []).append(subject.trial(subject.part(faults, part)))
    curves = tuple(
        _curve(subject.name, part, {rate: trials[subject.name, part, rate] for rate in settings.rates})
        for subject in subjects
        for part in parts[subject.name]
    )
    times = [[subject.milliseconds() for subject in subjects] for _ in range(_ROUNDS)]
    reasons = dict.fromkeys(
        trial.refused.splitlines()[0] for group in trials.values() for trial in group if trial.refused
    )
    return Result(
        curves, tuple(_gains(subjects, trials, curves, settings.rates)),
        {subject.name: float(ms) for subject, ms in zip(subjects, np.median(times, axis=0), strict=True)},
        (*reasons,),
    )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one flipped bit does. ``bit``: 0 is the lowest; ``stored``: how many such bits the graphs store. ``hurt``:
    the share of trials in which at least one picture has another answer."""

    bundle: str
    kind: str
    dtype: str
    bit: int
    stored: int
    agreement: Mean
    cosine: Mean
    hurt: float
    refused: float


def bits(subject: Subject, settings: Settings) -> list[Cell]:
    """One fault a trial: for each kind, type and bit, at places drawn from all such bits."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, tensor in enumerate(subject.store.tensors):
        groups.setdefault((tensor.kind, str(tensor.data.dtype)), []).append(index)
    places = [(*key, bit) for key, of in groups.items() for bit in range(subject.store.tensors[of[0]].width)]
    cells = []
    for step, (kind, dtype, bit) in enumerate(progress(places, f"bits of {subject.name}", "bit", len(places))):
        only = {index: (bit,) for index in groups[kind, dtype]}
        trials = [
            subject.trial(draw(subject.store.tensors, 1, _rng(settings.seed, repetition, step), only))
            for repetition in range(settings.repeats)
        ]
        stored = sum(subject.store.tensors[index].data.size for index in only)
        agreement, cosine = (_mean([getattr(trial, name) for trial in trials]) for name in ("agreement", "cosine"))
        hurt = float(np.mean([trial.agreement < 1 for trial in trials]))
        refused = float(np.mean([bool(trial.refused) for trial in trials]))
        cells.append(Cell(subject.name, kind, dtype, bit, stored, agreement, cosine, hurt, refused))
    return cells


def _rng(seed: int, repetition: int, rate: float) -> np.random.Generator:
    """The rate counts by its bits, so a rate's trials do not depend on which other rates are measured."""
    return np.random.default_rng([seed, repetition, int(np.float64(rate).view(np.uint64))])


def _curve(bundle: str, part: str, trials: Mapping[float, Sequence[Trial]]) -> Curve:
    points = []
    for rate, group in trials.items():
        means = {name: _mean([getattr(trial, name) for trial in group]) for name in ("agreement", "cosine", "accuracy")}
        faults, seconds = (float(np.mean([getattr(trial, name) for trial in group])) for name in ("faults", "seconds"))
        refused = float(np.mean([bool(trial.refused) for trial in group]))
        points.append(Point(rate, faults, **means, refused=refused, seconds=seconds))
    agreements = [point.agreement.value for point in points]
    return Curve(bundle, part, tuple(points), _crossing([*trials], agreements))


def _gains(
    subjects: Sequence[Subject],
    trials: Mapping[tuple[str, str, float], Sequence[Trial]],
    curves: Sequence[Curve],
    rates: Sequence[float],
) -> Iterator[Gain]:
    """Of each subject and the first one before it with the same places; if one of the two has bounds, its gain."""
    whole = {curve.bundle: curve for curve in curves if curve.part == ALL}
    for place, subject in enumerate(subjects):
        if (first := next((s for s in subjects[:place] if s.signature == subject.signature), None)) is None:
            continue
        bundle, other = (first, subject) if first.store.bounded and not subject.store.bounded else (subject, first)
        gains = [
            _mean([a.agreement - b.agreement for a, b in zip(*pair, strict=True)])
            for pair in ([trials[side.name, ALL, rate] for side in (bundle, other)] for rate in rates)
        ]
        half = whole[other.name].half
        ours = {point.rate: point.agreement.value for point in whole[bundle.name].points if point.rate > 0}
        at_half = None if half is None else float(np.interp(np.log10(half), np.log10([*ours]), [*ours.values()]))
        yield Gain(bundle.name, other.name, tuple(gains), at_half)


def _crossing(rates: Sequence[float], agreements: Sequence[float]) -> float | None:
    """The first rate at which the agreement falls below one half; see `Curve`."""
    for (low, above), (high, below) in pairwise(zip(rates, agreements, strict=True)):
        if above >= 0.5 > below and low > 0:
            share = (above - 0.5) / (above - below)
            return float(10 ** (np.log10(low) + share * (np.log10(high) - np.log10(low))))
    return None


def _mean(values: Sequence[float]) -> Mean:
    rows = np.asarray(values, np.float64)
    drawn = np.random.default_rng(0).integers(0, len(rows), (_RESAMPLES, len(rows)))
    lower, upper = np.percentile(rows[drawn].mean(axis=1), [2.5, 97.5])
    return Mean(float(rows.mean()), float(lower), float(upper))
