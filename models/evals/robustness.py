"""How a zero-shot classifier fares beside clean pictures: corruptions, unknown things, other prompts, misleading
textures, and how far its scores can be trusted.

Source: Tu et al. 2024 (arXiv 2403.10499), a holistic study of CLIP, for the choice of figures; the source of each
figure stands below. Its 3-D corruptions and multimodal language models are left out.

Data: labels.json, a list of {"file", "label"}, and the pictures under images/; or a folder of pictures for each class.
Optional, each adds figures: outliers/, a folder of pictures of none of the labels. factors.csv with the columns file,
and one for each factor with its value (empty: none), or the columns file,factor with a row for each factor that a
picture has, as ten of ImageNet-X (Idrissi et al. 2022, arXiv 2211.01866). cue_conflict.json, a list of {"file",
"shape", "texture"}, or cue_conflict.csv with these columns; its pictures under cue_conflict/, else under images/.

Corruptions: fifteen of Hendrycks & Dietterich 2019 (`corruptions`). Their loss is counted from the same pictures
resized to the size of the corruptions, "none". Calibration error and temperature: Guo et al. 2017 (`scaling`).
Outliers: AUROC and false positive rate at 95 % true positives of the best label's score (Hendrycks & Gimpel 2017,
arXiv 1610.02136) and of its logit (Hendrycks et al. 2022, arXiv 1911.11132). Shape bias: decisions for the shape among
those for shape or texture (Geirhos et al. 2019, arXiv 1811.12231). Intervals resample all pictures together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.classifier import Classifier
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples, Statistic, corruptions, robustness_data
from calmclip.models.evals.classification import Scoring, bins_of, judge, reliability
from calmclip.models.evals.progress import progress
from calmclip.models.evals.robustness_data import DataSet
from calmclip.models.evals.scaling import Scaling
from calmclip.models.evals.separation import Separation
from calmclip.models.flow import Array, Arrays, Flow, Work
from calmclip.models.heads import HEADS, Head
from calmclip.models.preprocess.image import Picture as Loaded
from calmclip.models.preprocess.image import load
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.calibrate import losses
from calmclip.models.tasks.classify import logits as logits_of
from calmclip.models.tasks.classify import scored
from calmclip.models.tasks.features import labels as label_rows
from calmclip.models.tasks.features import picture as picture_row

# Radford et al. 2021 (arXiv 2103.00020), section 3.1.4 and the notebook of its code, for the seven
PROMPTS: dict[str, tuple[str, ...]] = {
    "the label alone": ("{}",),
    "a photo": ("a photo of a {}.",),
    "a picture": ("a picture of a {}.",),
    "this is": ("this is a {}.",),
    "there is": ("there is a {} in the scene.",),
    "a bad photo": ("a bad photo of a {}.",),
    "CLIP's seven": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
        "art of the {}.", "a photo of the small {}.",
    ),
}  # fmt: skip
NONE = "none"  # the picture in the size of the corruptions


class Params(FrozenModel):
    """``templates``: each with a {}; if empty, the bundle's own. ``prompts``: other sets of them, by name."""

    templates: tuple[str, ...] = ()
    prompts: dict[str, tuple[str, ...]] = Field(default_factory=lambda: {**PROMPTS})
    corruptions: tuple[str, ...] = corruptions.NAMES
    severities: tuple[int, ...] = (1, 3, 5)
    seed: int = Field(default=0, ge=0, description="of the corruptions")
    bins: int = Field(default=15, ge=1, le=1000, description="of the calibration error, of equal width")

    @field_validator("corruptions", "severities")
    @classmethod
    def _known(cls, chosen: tuple[Any, ...]) -> tuple[Any, ...]:
        known: tuple[Any, ...] = corruptions.SEVERITIES if {*map(type, chosen)} == {int} else corruptions.NAMES
        if unknown := [each for each in chosen if each not in known]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(map(str, known))}")
        if len({*chosen}) < len(chosen):
            raise ValueError(f"{chosen} names one twice")
        return chosen

    @field_validator("prompts")
    @classmethod
    def _with_templates(cls, prompts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if empty := [name for name, templates in prompts.items() if not templates]:
            raise ValueError(f"{empty[0]!r} has no template")
        return prompts

    @property
    def views(self) -> list[tuple[str, int]]:
        """All corruptions and severities, after the picture itself."""
        if not (self.corruptions and self.severities):
            return []
        return [(NONE, 0), *((name, severity) for name in self.corruptions for severity in self.severities)]


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` as `robustness_data.read`, and `ExtraMissing` if corrupted pictures cannot be made."""
    data_set = robustness_data.read(data, limit)
    if params.views:
        corruptions.require()
    return data_set


@dataclass(frozen=True)
class Seen:
    """One picture's logits float32 [C], of each set of prompts [S, C], and of each view [V, C]."""

    logits: Array
    prompts: Array
    views: Array


def looked_at(
    bundle: Bundle, image: Picture, classifiers: Sequence[Classifier], views: Sequence[tuple[str, int]], seed: int
) -> Flow[Seen]:
    """The first classifier scores all views, the others the picture alone. It is decoded once."""
    decoded = yield Work("decode", lambda: load(_path(image), max_pixels=bundle.max_pixels))
    row = yield from picture_row(bundle, decoded)
    texts = []
    for classifier in classifiers:
        texts.append((yield from label_rows(bundle, classifier)))  # cached after the first picture
    first, *others = [scored(classifier, row, text)[0] for classifier, text in zip(classifiers, texts, strict=True)]
    answers = []
    base: Array = (yield Work("corrupt", lambda: corruptions.standard(decoded))) if views else np.empty(0)
    for name, severity in views:
        pixels = base
        if name != NONE:
            pixels = yield Work("corrupt", partial(corruptions.corrupted, base, name, severity, seed))
        answers.append(scored(classifiers[0], (yield from picture_row(bundle, pixels)), texts[0])[0])
    empty = np.empty((0, len(first)), np.float32)
    return Seen(first, np.stack(others) if others else empty, np.stack(answers) if answers else empty)


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    """Both bundles make the corrupted pictures anew, with the same pixels: kept, 1,000 of them would take 150 MB."""
    bundle, views, name = runner.bundle, params.views, runner.bundle.name
    prompts = [bundle.classifier_for(None, data.labels, templates) for templates in params.prompts.values()]
    main = bundle.classifier_for(None, data.labels, params.templates)
    head, temperature = HEADS.get(str(main.head)), bundle.classifier.temperature_for(bundle.family)

    flows = (looked_at(bundle, image, [main, *prompts], views, params.seed) for image in data.pictures)
    bar = progress(runner.map(flows), f"robustness {name}", f"picture in {len(views) + 1} views", len(data.pictures))
    seen = [*_reduced(bar, data.truth, head, temperature)]
    arrays = {key: np.stack([answer[key] for answer in seen]) for key in seen[0]}
    unknown = (logits_of(bundle, image, main) for image in map(_path, data.outliers))
    outliers = [*progress(runner.map(unknown), f"outliers {name}", "picture", len(data.outliers))]
    cues = data.conflicts
    arrays |= _conflicts(runner, cues, params.templates) if cues.pictures else {}
    groups = [(factor, value, rows) for factor, values in data.factors.items() for value, rows in values.items()]
    has = np.zeros((len(data.pictures), len(groups)), bool)
    for place, (_, _, rows) in enumerate(groups):
        has[rows, place] = True
    sizes = {"labelled": len(data.pictures), "outliers": len(outliers), "cue conflicts": len(cues.pictures)}
    counts = {"pictures": sum(sizes.values()), **{unit: size for unit, size in sizes.items() if size}}
    return Samples(
        {**counts, "labels": len(data.labels), "corrupted": max(0, len(views) - 1) * len(data.pictures)},
        {
            **arrays,
            "truth": np.asarray(data.truth, np.int64),
            "temperature": np.array(temperature),
            "outliers": np.stack(outliers) if outliers else np.empty((0, len(data.labels)), np.float32),
            "severity": np.array([severity for _, severity in views], np.int64),
            "factors": has,
        },
        {
            "labels": tuple(data.labels), "head": (str(main.head),), "corruption": [name for name, _ in views],
            "prompts": [*params.prompts], "factors": [factor for factor, _, _ in groups],
            "values": [value for _, value, _ in groups],
        },
    )  # fmt: skip


def _path(image: Picture) -> Loaded:
    return Path(image) if isinstance(image, str) else image


def _reduced(seen: Any, truth: Sequence[int], head: Head[Any], temperature: float) -> Iterator[Arrays]:
    """Of views, whose logits could fill the memory: the best label, its score, and the loss in nats."""
    for answer, label in zip(seen, truth, strict=True):
        scores = head.scores(answer.views.astype(np.float64) / temperature)
        targets = np.zeros(scores.shape)
        targets[:, label] = 1
        yield {
            "logits": answer.logits,
            "prompts": answer.prompts.argmax(axis=1).astype(np.int32),
            "best": answer.views.argmax(axis=1).astype(np.int32),
            "score": scores.max(axis=1, initial=0).astype(np.float32),
            "loss": losses(scores, targets, head.exclusive).astype(np.float32),
        }


def _conflicts(runner: Runner, cues: robustness_data.Conflicts, templates: Sequence[str]) -> Arrays:
    """Decisions among all shapes and textures, as indices of them."""
    labels = cues.labels
    shown = progress(cues.pictures, f"cue conflicts {runner.bundle.name}", "picture", len(cues.pictures))
    decided = runner.logits(shown, labels, templates=templates).argmax(axis=1)
    shape, texture = ([labels.index(name) for name in names] for names in (cues.shape, cues.texture))
    return {"decided": decided, "shape": np.array(shape, np.int64), "texture": np.array(texture, np.int64)}


def _percent(part: Any) -> float:
    return 100 * float(part)


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")


class _Corrupted:
    """Figures of the views; ``weight`` [N]: how often each picture counts."""

    def __init__(self, samples: Samples, params: Params) -> None:
        arrays, names = samples.arrays, samples.words["corruption"]
        self.right = (arrays["best"] == arrays["truth"][:, None]).astype(np.float64)  # [N, V]
        self.severity = arrays["severity"]
        self.columns = {name: np.array([each == name for each in names]) for name in dict.fromkeys(names)}
        changed = self.severity > 0
        self._loss = arrays["loss"][:, changed].mean(axis=1, dtype=np.float64)
        gap = arrays["score"].astype(np.float64) - self.right
        place = bins_of(arrays["score"], params.bins)
        self._gaps = np.zeros((len(gap), params.bins))  # summed over views, so that a resample is one product
        for view in np.flatnonzero(changed):
            self._gaps[np.arange(len(gap)), place[:, view]] += gap[:, view]
        self._views = int(changed.sum())

    def accuracy(self, weight: Array) -> tuple[float, float]:
        """-> of the pictures themselves, and the mean of all corruptions and severities; 0 to 1."""
        each = weight @ self.right / weight.sum()
        return float(each[self.severity == 0].mean()), float(each[self.severity > 0].mean())

    def lost(self, weight: Array) -> float:
        """Percentage points."""
        clean, corrupted = self.accuracy(weight)
        return 100 * (clean - corrupted)

    def figures(self, weight: Array) -> list[Figure]:
        each, total = weight @ self.right / weight.sum(), weight.sum()
        clean, corrupted = self.accuracy(weight)
        error = np.abs(weight @ self._gaps).sum() / total / self._views
        group, severities = "top1 by corruption, mean of severities", "top1 by severity, mean of corruptions"
        return [
            *(
                Figure(name.replace("_", " "), _percent(each[columns].mean()), "%", group)
                for name, columns in self.columns.items()
            ),
            *(
                Figure(str(level), _percent(each[self.severity == level].mean()), "%", severities)
                for level in np.unique(self.severity[self.severity > 0])
            ),
            Figure("top1", _percent(corrupted), "%", "corrupted pictures"),
            Figure("loss", self.lost(weight), "points", "corrupted pictures"),
            Figure("relative loss", 100 * _ratio(clean - corrupted, clean), "%", "corrupted pictures"),
            Figure("calibration error", _percent(error), "%", "corrupted pictures"),
            Figure("negative log-likelihood", float(weight @ self._loss / total), "nats", "corrupted pictures"),
        ]  # fmt: skip


def score(samples: Samples, params: Params) -> Statistic:
    arrays, words = samples.arrays, samples.words
    truth, logits, head = arrays["truth"], arrays["logits"].astype(np.float64), HEADS.get(words["head"][0])
    count, total, outliers = len(truth), samples.count, len(arrays["outliers"])
    clean = judge(samples, Scoring(bins=params.bins))
    temperature = float(arrays["temperature"])
    plain = losses(head.scores(logits / temperature), np.eye(logits.shape[1])[truth], head.exclusive)
    scaling = Scaling(logits, truth, head, params.bins)
    corrupted = _Corrupted(samples, params) if len(arrays["severity"]) else None
    prompted = (arrays["prompts"] == truth[:, None]).astype(np.float64)  # [N, S]
    both = np.concatenate([logits, arrays["outliers"].astype(np.float64)])
    known = np.arange(len(both)) < count
    sureness = {"": head.scores(both / temperature).max(axis=1), " of the logit": both.max(axis=1)} if outliers else {}
    apart = {name: Separation(values, known) for name, values in sureness.items()}
    cues = [arrays["decided"] == arrays[cue] for cue in ("shape", "texture")] if "decided" in arrays else []
    gap, right = clean.score - clean.right, clean.right.astype(np.float64)

    def of(rows: Array) -> Sequence[Figure]:
        times = np.bincount(rows, minlength=total).astype(np.float64)
        weight, of_both, of_cues = times[:count], times[: count + outliers], times[count + outliers :]
        number = weight.sum()
        apart_by = np.abs(np.bincount(clean.bin, weight * gap)).sum()
        scaled, group = scaling.of(weight), "at a temperature fitted on the other half"
        figures = [
            Figure("top1", 100 * _ratio(weight @ right, number), "%", "clean pictures"),
            Figure("top5", 100 * _ratio(weight @ (clean.rank < 5), number), "%", "clean pictures"),
            Figure("calibration error", 100 * _ratio(apart_by, number), "%", "clean pictures"),
            Figure("negative log-likelihood", _ratio(weight @ plain, number), "nats", "clean pictures"),
            Figure("temperature", scaled.temperature, "", group),
            Figure("calibration error", 100 * scaled.error, "%", group),
            Figure("negative log-likelihood", scaled.loss, "nats", group),
        ]
        if corrupted:
            figures += corrupted.figures(weight)
        if prompted.shape[1]:
            by_prompt = 100 * (weight @ prompted) / number
            figures += [Figure(*each, "%", "top1 by prompts") for each in zip(words["prompts"], by_prompt, strict=True)]
            figures.append(Figure("best minus worst", float(np.ptp(by_prompt)), "points", "top1 by prompts"))
        for name, scores in apart.items():
            figures += [
                Figure(f"AUROC{name}", scores.area(of_both), "", "outliers"),
                Figure(f"FPR@95{name}", 100 * scores.false_positives(of_both), "%", "outliers"),
            ]
        if cues:
            shape, texture = (float(of_cues @ cue) for cue in cues)
            decided = 100 * _ratio(shape + texture, of_cues.sum())
            figures += [
                Figure("shape bias", 100 * _ratio(shape, shape + texture), "%", "cue conflicts"),
                Figure("shape or texture", decided, "%", "cue conflicts"),
            ]
        for place, (factor, value) in enumerate(zip(words["factors"], words["values"], strict=True)):
            having = weight * arrays["factors"][:, place]
            figures.append(Figure(value, 100 * _ratio(having @ right, having.sum()), "%", f"top1 by {factor}"))
        return figures

    return of


def together(samples: Samples, others: Samples, params: Params) -> Statistic:
    """The percentage of pictures and of corrupted pictures for which both have the same best label, and how many
    points more the first loses under corruption."""
    sides = (samples, others)
    same = np.equal(*(side.arrays["logits"].argmax(axis=1) for side in sides)).astype(np.float64)
    changed = samples.arrays["severity"] > 0
    both = [_Corrupted(side, params) for side in sides] if changed.any() else []
    agreed = np.equal(*(side.arrays["best"][:, changed] for side in sides)).mean(axis=1) if both else same

    def of(rows: Array) -> Sequence[Figure]:
        weight = np.bincount(rows, minlength=samples.count)[: len(same)].astype(np.float64)
        figures = [Figure("agreement", 100 * float(weight @ same / weight.sum()), "%")]
        if both:
            first, second = (side.lost(weight) for side in both)
            figures += [
                Figure("agreement on corrupted pictures", 100 * float(weight @ agreed / weight.sum()), "%"),
                Figure("loss of the first minus loss of the second", first - second, "points"),
            ]
        return figures

    return of


def plots(sides: Mapping[str, Samples], params: Params) -> Sequence[Plot]:
    by_severity, trusted = [], []
    for name, samples in sides.items():
        arrays, truth = samples.arrays, samples.arrays["truth"]
        if len(levels := np.unique(arrays["severity"])):
            right = (arrays["best"] == truth[:, None]).mean(axis=0)
            by_severity.append(
                Line(name, levels, [_percent(right[arrays["severity"] == level].mean()) for level in levels])
            )
        scaling = Scaling(arrays["logits"], truth, HEADS.get(samples.words["head"][0]), params.bins)
        clean = judge(samples, Scoring(bins=params.bins))
        trusted.append(reliability(name, clean.score, clean.right, params.bins))
        if places := scaling.best(np.ones(len(truth))):
            trusted.append(reliability(f"{name}, scaled", scaling.scores(places), clean.right, params.bins))
    says = "Mean over all corruptions. Severity 0 is the picture itself, in the size of the corruptions."
    accuracy = [Plot("Corruption", "severity", "top1, %", by_severity, says)] if by_severity else []
    says = (
        "How often the best label is right, by how sure its score is, before and after temperature scaling. On the "
        "dashed line scores are as sure as they are right."
    )
    labels = "mean score of the best label", "part that is right"
    return [*accuracy, Plot("Reliability", *labels, trusted, says, diagonal=True)]


EVALS.register("robustness")(
    Eval(
        "classify", robustness_data.DATA, Params, read, predict, score, together, plots, frozenset({"bins"}),
        limit=60, full={"severities": corruptions.SEVERITIES},
    )
)  # fmt: skip
