"""Subgroups: how well findings are told apart in each group of pictures, whether a shortcut helps, and whether the
vectors tell the group.

Source: the protocol of the chest X-ray study of CLIP (TheoSourget/clip_cxr_fairness), for any findings and groups: the
probability of a finding is a softmax over a positive and a negative prompt; AUROC; adjusted AUPRC = 1 - ln(AUPRC) /
ln(prevalence); intervals by a bootstrap over pictures. recipes/chest_xray.json holds the study's own params.

Data: groups.csv (see `grouped`), and the pictures under images/.

A gap is the AUROC of a group minus that of the other pictures whose group is known, averaged over the labels that both
can measure. The worst of many gaps is low by chance alone, so its interval is wider and holds for all groups of the
column at once. A label needs ``minimum`` pictures with and without it; otherwise the table names what it leaves out.

The shortcut test scores the positives with the mark, and those without it, each against all healthy pictures: those
without any of the labels. A positive difference says that the mark helps.

A probe reads the group from the vectors: chance is an AUROC of 0.5. A plot of principal components that shows no
clusters does not show that the vectors hide the group. The probe on two components stands beside the probe on all
columns for that reason. Neither says that the bundle uses the group.

Cost of the intervals: resamples x labels x pictures x columns x groups of a column, about 20 ns for each product.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples, Statistic, grouped, predictability
from calmclip.models.evals.areas import Subset
from calmclip.models.evals.bootstrap import Resampling, intervals
from calmclip.models.evals.plan import Key, Plan, Term, difference, mean
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array
from calmclip.models.runner import Runner
from calmclip.models.tasks.classify import chosen, scored
from calmclip.models.tasks.features import labels as label_vectors

PICTURES = "pictures"
MEAN = "mean AUROC"
GAP = "gap of AUROC"
OTHERS = ("a photo of something else.",)


class Params(grouped.Columns):
    positive: tuple[str, ...] = Field(default=("a photo of a {label}.",), min_length=1)
    negative: tuple[str, ...] | None = Field(
        default=None,
        description="default: 'a photo of something else.' beside columns of findings; of one column label, as for an "
        "empty list, the softmax is over its classes",
    )
    minimum: int = Field(default=10, ge=1, description="of pictures with a label, and without it, in a group")
    by_label: bool = Field(default=False, description="each label in each group too, not only their mean")
    probe: int = Field(default=2000, ge=0, description="of pictures at most for the probe of groups; 0: no probe")

    @field_validator("positive")
    @classmethod
    def _named(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [prompt for prompt in prompts if "{label}" not in prompt]:
            raise ValueError(f"{wrong[0]!r} has no {{label}}; expected such as 'Chest {{label}}'")
        return prompts


def read(data: Path, params: Params, limit: int | None = None) -> grouped.DataSet:
    """Raises `BadRequest`, also if no label has enough pictures; `ExtraMissing` for a probe without scikit-learn."""
    dataset = grouped.read(data, params, limit)
    _measurable(dataset.truth, params.minimum, dataset.labels)
    if params.probe:
        predictability.require()
    return dataset


def predict(runner: Runner, data: grouped.DataSet, params: Params) -> Samples:
    """Samples: ``margins`` float32 [N, L], the logit of each label's probability. Margins rank as probabilities do, and
    do not round to 1. ``truth``, ``members``, ``shortcut`` as in the data set; ``vectors`` float32 [N, D]."""
    pictures = progress(data.pictures, f"subgroups {runner.bundle.name}", "picture", len(data.pictures))
    vectors = runner.embed(images=pictures)
    arrays = {
        "margins": _margins(runner, vectors, data, params),
        "truth": data.truth,
        "members": data.members,
        "vectors": vectors,
    }
    words = {"labels": tuple(data.labels), "columns": tuple(data.groups)}
    words |= {f"groups of {name}": tuple(groups) for name, groups in data.groups.items()}
    if data.shortcut is not None and params.shortcut:
        arrays["shortcut"], words["shortcut"] = data.shortcut, params.shortcut
    counts = {
        PICTURES: len(data.pictures),
        "labels": len(data.labels),
        "groups": sum(len(groups) for groups in data.groups.values()),
    }
    return Samples(counts, arrays, words)


def _margins(runner: Runner, vectors: Array, data: grouped.DataSet, params: Params) -> Array:
    """vectors float32 [N, D] -> float32 [N, L]."""
    negative = params.negative
    if negative is None:
        negative = () if data.exclusive else OTHERS
    sentences = {
        f"{number} {label}": tuple(prompt.replace("{label}", label) for prompt in prompts)
        for number, prompts in enumerate(filter(None, (params.positive, negative)))
        for label in data.labels
    }
    classifier = chosen(runner.bundle, None, tuple(sentences), (), sentences)
    text = runner.run(label_vectors(runner.bundle, classifier))
    temperature = classifier.temperature_for(runner.bundle.family)
    logits = scored(classifier, vectors, text).astype(np.float64) / temperature
    count = len(data.labels)
    if negative:
        return (logits[:, :count] - logits[:, count:]).astype(np.float32)
    return np.stack([_against_others(logits, place) for place in range(count)], axis=1).astype(np.float32)


def _against_others(logits: Array, place: int) -> Array:
    """The logit of a softmax: float [N] of the label at ``place`` minus the log of the sum of the others' powers."""
    others = np.delete(logits, place, axis=1)
    top = others.max(axis=1)
    margin: Array = logits[:, place] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))
    return margin


def _measurable(truth: Array, minimum: int, labels: Sequence[str]) -> None:
    if not any(_rarer(truth[:, place]) >= minimum for place in range(len(labels))):
        rarer = ", ".join(f"{label} {_rarer(truth[:, place])}" for place, label in enumerate(labels))
        raise BadRequest(
            f"no label has {minimum} pictures with it and {minimum} without it (the rarer of the two: {rarer}); "
            f"expected more pictures, or a lower minimum"
        )


def _rarer(truth: Array) -> int:
    return int(min((truth == 1).sum(), (truth == 0).sum()))


@dataclass(frozen=True)
class _Group:
    """``members``: bool [N]; ``rest``: the pictures of the column's other groups, empty for all pictures."""

    name: str
    members: Array
    rest: Array


def _groups(samples: Samples) -> dict[str, list[_Group]]:
    """Column -> its groups that have pictures. The column "" has one group of all pictures."""
    every = np.ones(samples.count, bool)
    columns = {"": [_Group("", every, ~every)]}
    for place, column in enumerate(samples.words["columns"]):
        index = samples.arrays["members"][:, place]
        columns[column] = [
            _Group(f"{column} = {name}", index == number, (index >= 0) & (index != number))
            for number, name in enumerate(samples.words[f"groups of {column}"])
            if (index == number).any()
        ]
    return columns


def score(samples: Samples, params: Params) -> Statistic:
    """The subsets of groups first, then those without a precision. Raises `BadRequest`, `ExtraMissing`."""
    return _planned(samples, params).statistic(samples.count)


def _planned(samples: Samples, params: Params) -> Plan:
    truth, labels = samples.arrays["truth"], samples.words["labels"]
    _measurable(truth, params.minimum, labels)
    plan = Plan(samples.arrays["margins"], truth)
    columns = _groups(samples)
    # label -> subset, of each group: those with enough pictures
    inside = {
        group.name: {
            label: plan.subset(label, group.members)
            for label in range(len(labels))
            if _rarer(truth[group.members, label]) >= params.minimum
        }
        for groups in columns.values()
        for group in groups
    }
    plan.precise = len(plan.subsets)
    for column, groups in columns.items():
        gaps: dict[str, list[Key]] = {}  # of the mean over labels (""), and of each label
        for group in groups:
            for what, key in _of_group(plan, group, inside[group.name], labels, params):
                gaps.setdefault(what, []).append(key)
        if column:
            _of_column(plan, column, samples, gaps, params)
    _of_shortcut(plan, samples, params.minimum)
    return plan


def _of_group(
    plan: Plan, group: _Group, inside: Mapping[int, int], labels: Sequence[str], params: Params
) -> Iterator[tuple[str, Key]]:
    """The figures of a group -> its gaps: "" or the label, and the figure's key."""
    name, every = group.name, not group.rest.any()
    if name:
        plan.fact(PICTURES, name, int(group.members.sum()))
    rest = {
        label: plan.subset(label, group.rest)
        for label in inside
        if _rarer(plan.truth[group.rest, label]) >= params.minimum
    }
    if inside:
        plan.sum(MEAN, name, mean("auroc", [*inside.values()]))
        plan.sum("mean AUPRC", name, mean("precision", [*inside.values()]))
        plan.sum("mean adjusted AUPRC", name, mean("adjusted", [*inside.values()]))
    if rest:
        yield "", plan.sum(GAP, name, difference([inside[label] for label in rest], [*rest.values()]))
    for label, text in enumerate(labels):
        if label not in inside:
            plan.fact(f"left out, too few: {text}", name, _rarer(plan.truth[group.members, label]))
        elif every or params.by_label:
            plan.fact(f"with {text}", name, int((plan.truth[group.members, label] == 1).sum()))
            plan.sum(f"AUROC {text}", name, mean("auroc", [inside[label]]))
            plan.sum(f"AUPRC {text}", name, mean("precision", [inside[label]]))
            plan.sum(f"adjusted AUPRC {text}", name, mean("adjusted", [inside[label]]))
            if label in rest:
                yield text, plan.sum(f"{GAP} {text}", name, difference([inside[label]], [rest[label]]))


def _of_column(plan: Plan, column: str, samples: Samples, gaps: Mapping[str, Sequence[Key]], params: Params) -> None:
    """The worst gaps of a column, and the probe of its groups."""
    for label, keys in gaps.items():
        if len(keys) > 1:
            plan.least(" ".join(filter(None, (f"worst {GAP}", label))), column, keys)
    place = [*samples.words["columns"]].index(column)
    if absent := int((samples.arrays["members"][:, place] < 0).sum()):
        plan.fact("left out, no group", column, absent)
    if params.probe:
        _of_probe(plan, column, samples, place, params)


def _of_probe(plan: Plan, column: str, samples: Samples, place: int, params: Params) -> None:
    names, index = samples.words[f"groups of {column}"], samples.arrays["members"][:, place].astype(np.int64)
    drawn = predictability.chosen(np.zeros(samples.count, np.int64), params.probe, params.seed)
    sizes = np.bincount(index[drawn][index[drawn] >= 0], minlength=len(names))
    kept = np.flatnonzero(sizes >= max(params.minimum, predictability.FOLDS))
    for number, size in enumerate(sizes.tolist()):
        if size and number not in kept:
            plan.fact(f"left out of the probe, too few: {names[number]}", column, size)
    if len(kept) < 2:
        return
    places = drawn[np.isin(index[drawn], kept)]
    group = np.searchsorted(kept, index[places])
    vectors = samples.arrays["vectors"][places]
    plane, share = predictability.components(vectors)
    whole = predictability.probed(vectors, places, group, params.seed)
    flat = predictability.probed(plane, places, group, params.seed)
    many = f"{predictability.COMPONENTS} principal components"
    plan.sum("probe AUROC", column, _told(plan, whole))
    plan.sum(f"probe AUROC, {many}", column, _told(plan, flat))
    plan.fact(f"variance in {many}", column, 100 * share, "%")
    plan.function("probe balanced accuracy", column, _balanced(whole), "%")
    plan.fact("balanced accuracy by chance", column, 100 / len(kept), "%")


def _told(plan: Plan, answers: predictability.Answers) -> list[Term]:
    """The mean over groups of the AUROC of a group against all others; of two groups both are the same."""
    count = answers.logits.shape[1]
    subsets = [
        plan.add(Subset(answers.places, answers.logits[:, number], answers.group == number))
        for number in range(count if count > 2 else 1)
    ]
    return mean("auroc", subsets)


def _balanced(answers: predictability.Answers) -> Callable[[Array], float]:
    """The mean over groups of the percentage that the probe gets right."""
    right = answers.right

    def of(copies: Array) -> float:
        weights = copies[answers.places]
        with np.errstate(invalid="ignore"):
            shares = np.bincount(answers.group, weights * right) / np.bincount(answers.group, weights)
        return float(100 * shares.mean())

    return of


def _of_shortcut(plan: Plan, samples: Samples, minimum: int) -> None:
    if "shortcut" not in samples.words:
        return
    finding, column = samples.words["shortcut"]
    label, marks = [*samples.words["labels"]].index(finding), samples.arrays["shortcut"]
    heading = f"shortcut {column} for {finding}"
    healthy, positive = (plan.truth == 0).all(axis=1), plan.truth[:, label] == 1
    parts = {f"with {column}": positive & (marks == 1), f"without {column}": positive & (marks == 0)}
    sizes = {**{name: int(part.sum()) for name, part in parts.items()}, "healthy": int(healthy.sum())}
    for name, size in sizes.items():
        plan.fact(name if size >= minimum else f"left out, too few: {name}", heading, size)
    if min(sizes.values()) < minimum:
        return
    subsets = [plan.subset(label, part | healthy) for part in parts.values()]
    for name, subset in zip(parts, subsets, strict=True):
        plan.sum(f"AUROC {name}", heading, mean("auroc", [subset]))
    plan.sum("AUROC difference", heading, difference(subsets[:1], subsets[1:]))


def together(samples: Samples, others: Samples, params: Params) -> Statistic:
    """The percentage of pictures and labels for which both are on the same side of a probability of one half, of all
    pictures and of each group."""
    same = ((samples.arrays["margins"] > 0) == (others.arrays["margins"] > 0)).mean(axis=1)
    groups = [group for groups in _groups(samples).values() for group in groups]

    def of(rows: Array) -> Sequence[Figure]:
        copies = np.bincount(rows, minlength=len(same))
        return [Figure("agreement", _weighted(same, copies * group.members), "%", group.name) for group in groups]

    return of


def _weighted(values: Array, copies: Array) -> float:
    total = copies.sum()
    return float(100 * (values * copies).sum() / total) if total else np.nan


def plots(sides: Mapping[str, Samples], params: Params) -> Sequence[Plot]:
    """The mean AUROC of all pictures and of each group. Without scipy there are points alone."""
    how = Resampling()
    lines, names = [], []
    for number, (name, samples) in enumerate(sides.items()):
        plan = _planned(samples, params.model_copy(update={"probe": 0, "by_label": False}))
        plan.keep(MEAN)
        statistic = plan.statistic(samples.count)
        names = [figure.group or "all" for figure in plan.figures]
        values = _values(statistic, np.arange(samples.count))
        try:
            low, high = intervals(partial(_values, statistic), samples.count, how)
        except ModuleNotFoundError:
            low = high = np.empty(0)
        x = np.arange(len(names)) + 0.15 * (number - (len(sides) - 1) / 2)
        lines.append(Line(name, x, values, "points", low, high))
    says = (
        "AUROC of each group, the mean over its labels, with 95 % intervals of "
        f"{how.resamples} resamples. Intervals of single groups overlap more than those of their gaps in the table."
    )
    return [Plot("AUROC by group", "", "mean AUROC", lines, says, names=names)]


def _values(statistic: Statistic, rows: Array) -> Array:
    return np.array([figure.value for figure in statistic(rows)])


EVALS.register("subgroups")(
    Eval(
        "classify", grouped.DATA, Params, read, predict, score, together, plots,
        frozenset({"minimum", "by_label", "probe"}), limit=1000, full={"by_label": True},
    )
)  # fmt: skip
