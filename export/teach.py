"""Teach the built-in detector the user's own photographs: the region head, and the box quality if there are boxes.

A fifth of the photographs is held out and measured before and after. Two losses train the head. The first distils, as
in `calmclip.export.regions`: from the crops of the user's photographs, and, on photographs that ship, from the head as
it was. The second pulls the vector of a region, as the `regions` graph forms it, towards the text of its name:

    naming = cross-entropy of softmax(SCALE cos(vector, texts)) to the region's name
    absent = -log(1 - the chances of all the data's names)      regions beside all boxes

The texts are the data's names, the phrases of background and the 1080 names that the head was trained with. A text that
resembles the region's name is no counterexample and is left out.

Source: Gu et al. 2021 (arXiv 2104.13921), ViLD, sections 3.2 and 3.3: both losses on the vectors of proposals. Li &
Hoiem 2016 (arXiv 1606.09282): the old network's answers keep what it knows.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export import box_quality, parity, regions, rewrites, samples
from calmclip.export.box_quality import Cells
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED
from calmclip.export.nets.mini import load as load_net
from calmclip.export.nets.mini.detection import SCALE as DETECT_SCALE
from calmclip.export.nets.mini.detection import detect_graph
from calmclip.export.nets.mini.facts import BACKGROUND, REGION_PIXELS, TEMPLATES, WIDTH
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.parameters import text_vectors
from calmclip.export.nets.mini.quality import Quality
from calmclip.export.nets.mini.regions import HALF, LARGE, SMALL, Detector, RegionHead, Regions, average, extent
from calmclip.export.nets.mini.sentences import embed
from calmclip.export.nets.mini.towers import Heads, unit
from calmclip.export.nets.mini.weights import tokenizer_json
from calmclip.export.photographs import Photographs
from calmclip.export.regions import Seen
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.evals.average_precision import MOST, Boxes, Matches, covered, overlaps
from calmclip.models.evals.detection import FLOOR
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import find as find_library
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.preprocess.placement import place
from calmclip.models.suppression import DEFAULT, Suppression

FIFTH = 5  # one of so many photographs is held out
LEAST = 10  # photographs
NEAR, FAR = 0.5, 0.3  # IoU of a region with a box from which on it has the box's name; below which it has none
BESIDE = 10  # regions of a picture that have no name, at most
RELATED = 0.4  # cosine of two texts above which one is no counterexample of the other
STEPS, BATCH, RATE, DROPOUT = 200, 256, 5e-4, 0.1
NAMING, ABSENT = 1.0, 0.5  # weights of the losses beside the distillation's
RESAMPLES = 1000
NO_NAME = -1
_RULES = repr((regions.LEAST, regions.MOST, regions.AROUND, box_quality.NEAR, NEAR, FAR, BESIDE))  # what `look` keeps

Measure = Callable[[Array], float]  # int64 [N], how often each picture counts -> the figure, in percent


@dataclass(frozen=True)
class Named:
    """N regions. ``known`` [N, 384]: NanoDet's part of the vector; ``side`` [N, 1]: `regions.extent`; ``names`` int64
    [N]: an index, or `NO_NAME`. ``vectors`` [N, 384] and ``features`` [N, 896] as in `Seen`."""

    vectors: Tensor
    features: Tensor
    known: Tensor
    side: Tensor
    names: Tensor

    def __getitem__(self, rows: Tensor) -> "Named":
        return Named(*(getattr(self, name)[rows] for name in Named.__annotations__))


@dataclass(frozen=True)
class Cache:
    """A folder with a file for each answer of a network about a picture, or None. A file's name depends on the
    network's weights, on the picture's bytes and on the rest of the key."""

    folder: Path | None

    def get(self, make: Callable[[], Arrays], *key: str | bytes) -> Arrays:
        if self.folder is None:
            return make()
        parts = [part.encode() if isinstance(part, str) else part for part in key]
        digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        file = self.folder / f"{digest[:24]}.npz"
        if file.is_file():
            with np.load(file) as arrays:
                return dict(arrays)
        arrays = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its option
        part.replace(file)
        return arrays


@dataclass
class Student:
    """The detector that is taught, its teacher, and its texts."""

    cache: Cache
    module: Regions = field(init=False)
    texts: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        modules = load(SHIPPED, DETECTOR, MASKS)
        self.module = modules.regions
        self.texts = {name: tensor.numpy() for name, tensor in modules.text.state_dict().items()}
        self.tokenizer = tokenizer_json()
        self.preparer = ImagePreparer(REGION_PIXELS)

    @cached_property
    def teacher(self) -> parity.Run:
        graph = load_net("mini").towers["image"].graph
        assert graph is not None  # it ships
        return parity.onnx_run(graph)

    @cached_property
    def background(self) -> Array:
        return embed(self.texts, self.tokenizer, BACKGROUND)

    @cached_property
    def detect(self) -> parity.Run:
        """The detect graph with soft-NMS."""
        built = detect_graph(self.background)
        model = rewrites.apply(built.model, [*rewrites.swaps(), *built.attach]).model
        return parity.onnx_run(model, threads=1, library=find_library())

    def named(self, names: Sequence[str]) -> Array:
        """Unit text vectors float32 [n, 384]."""
        if not names:
            return np.empty((0, WIDTH), np.float32)
        return text_vectors(self.texts, self.tokenizer, names, TEMPLATES)


def split(data: Photographs, seed: int) -> tuple[list[int], list[int]]:
    """-> the places of the photographs that train and of those held out, a fifth of them; each name gives both about
    alike. A picture with boxes counts for the rarest of their names."""
    count = len(data.pictures)
    if count < LEAST:
        raise BadRequest(f"there are {count} photographs; expected at least {LEAST}: a fifth is held out to measure")
    groups = data.labels or [NO_NAME] * count
    if data.truth:
        frequency = np.bincount(np.concatenate([row.classes for row in data.truth]), minlength=len(data.names))
        groups = [min(row.classes.tolist(), key=lambda name: frequency[name], default=NO_NAME) for row in data.truth]
    order = np.random.default_rng(seed).permutation(count)
    ordered = order[np.argsort(np.array(groups)[order], kind="stable")].tolist()
    held = ordered[FIFTH // 2 :: FIFTH]
    return sorted({*ordered} - {*held}), sorted(held)


def look(student: Student, data: Photographs, title: str) -> list[Arrays]:
    """What the frozen networks see in each picture: arrays by the names in `Seen`, `Named` (with "named_") and `Cells`,
    float16. A picture takes 0.2 s on an idle core, and again only if it or its boxes change."""
    weights = _digest({k: v for k, v in student.module.state_dict().items() if not k.startswith("head.")})
    seen = []
    for place_of, path in enumerate(tqdm(data.pictures, title, unit="")):
        content = path.read_bytes()
        truth = data.truth[place_of] if data.truth else None
        label = data.labels[place_of] if data.labels else NO_NAME
        about = repr([truth.boxes.tolist(), truth.classes.tolist(), truth.crowd.tolist()] if truth else label)
        with _naming(path):
            make = partial(_look, student, content, truth, label)
            seen.append(student.cache.get(make, "look", _RULES, weights, content, about))
    return seen


@torch.inference_mode()
def _look(student: Student, content: bytes, truth: Boxes | None, label: int) -> Arrays:
    module, picture = student.module, decode(content)
    array, frame = student.preparer.prepare(picture)
    pixels = torch.from_numpy(array)
    chances, boxes, objectness, features = module.propose(pixels)
    map32 = module.backbone(F.avg_pool2d(pixels, HALF))[1]
    vectors, original = module.image(average(map32, boxes, HALF * 32))[0], frame.to_original(boxes[0].numpy())
    best = min(regions.MOST, int((objectness[0] >= regions.LEAST).sum()))
    crops = regions.crop_vectors(student.teacher, picture, original[:best]) if best else vectors[:0]
    side = extent(boxes)[0]
    if truth is not None:
        names = names_of(original, objectness[0].numpy(), truth)
    else:  # the picture's own name belongs to its main region
        names = np.full(len(original), NO_NAME - 1)
        names[int((objectness[0] * side[:, 0]).argmax())] = label if label != NO_NAME else NO_NAME - 1
    rows = torch.from_numpy(np.flatnonzero(names >= NO_NAME))
    wanted = truth.boxes[~truth.crowd] if truth is not None else original[:0]
    empty = Cells(torch.zeros(0, module.quality.mean.numel()), torch.zeros(0))
    near = box_quality.cells_near(module, pixels, frame.to_input(wanted)) if len(wanted) else empty
    known = torch.matmul(chances[0].square(), module.names)
    tensors = {
        "vectors": vectors[:best], "features": features[0, :best], "crops": crops,
        "named_vectors": vectors[rows], "named_features": features[0, rows], "named_known": known[rows],
        "named_side": side[rows], "shapes": near.shapes, "overlaps": near.overlaps,
    }  # fmt: skip
    halves = {name: tensor.half().numpy() for name, tensor in tensors.items()}
    return {**halves, "named_names": names[rows.numpy()]}


def names_of(boxes: Array, objectness: Array, truth: Boxes) -> Array:
    """Regions [P, 4] of a picture with boxes -> int64 [P]: the name of the box that a region fits, `NO_NAME` for the
    best regions beside all boxes, and less for the others."""
    names = np.full(len(boxes), NO_NAME - 1)
    shared = overlaps(boxes, truth.boxes, truth.crowd)
    true = np.where(truth.crowd, 0.0, shared)
    beside = np.flatnonzero((shared < FAR).all(axis=1) & (objectness > 0))
    names[beside[np.argsort(-objectness[beside], kind="stable")[:BESIDE]]] = NO_NAME
    if len(truth.classes):
        fits = true.max(axis=1) >= NEAR
        names[fits] = truth.classes[true.argmax(axis=1)][fits]
    return names


def combined(named: Named, head: RegionHead, dropout: float = 0.0) -> Tensor:
    """The vectors of regions as the `regions` graph outputs them, [N, 384]."""
    described = unit(named.side * named.vectors + (1 - named.side) * head(named.vectors, named.features, dropout))
    return unit(named.known + (SMALL + LARGE * named.side) * described)


def naming_loss(vectors: Tensor, names: Tensor, texts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """-> naming and absent of the module's docstring, means over their regions; 0 without such regions.

    vectors [n, D] and ``texts`` [M, D], unit rows; the first ``count`` texts are the data's names; names int64 [n].
    """
    logits = regions.SCALE * vectors @ texts.T
    named = names >= 0
    related = texts[:count] @ texts.T > RELATED
    related[:, :count] = False  # names of the data are told apart, however near
    zero = vectors.new_zeros(())
    naming = absent = zero
    if named.any():
        masked = logits[named].masked_fill(related[names[named]], -torch.inf)
        naming = F.cross_entropy(masked, names[named])
    if not named.all():
        rows = logits[~named]
        absent = (rows.logsumexp(-1) - rows[:, count:].logsumexp(-1)).mean()
    return naming, absent


def train_head(
    seen: Seen, named: Named, texts: Tensor, count: int, start: RegionHead, *, steps: int = STEPS, seed: int = 0
) -> RegionHead:
    """-> a head that continues from ``start``. ``texts`` [M, 384]: the data's ``count`` names, background, the names
    that the head knows."""
    torch.manual_seed(seed)
    head = RegionHead()
    head.load_state_dict(start.state_dict())
    known = texts[count + len(BACKGROUND) :]
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    head.train()
    bar = tqdm(range(steps), "region head", unit="", leave=False)
    for _ in bar:
        rows = torch.randint(0, len(seen.crops), (BATCH,))
        error = regions.loss(head(seen.vectors[rows], seen.features[rows], DROPOUT), seen.crops[rows], known)
        if len(named.names):
            part = named[torch.randint(0, len(named.names), (BATCH,))]
            naming, absent = naming_loss(combined(part, head, DROPOUT), part.names, texts, count)
            error = error + NAMING * naming + ABSENT * absent
        optimizer.zero_grad()
        torch.autograd.backward(error)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{error.item():.3f}")
    return head.eval().requires_grad_(False)


def answers(student: Student, pictures: Sequence[Path], title: str) -> list[Arrays]:
    """The outputs of the `regions` graph for each picture, float16, and ``size``, its width and height."""
    weights, rows = _digest(student.module.state_dict()), []
    for path in tqdm(pictures, title, unit=""):
        content = path.read_bytes()
        with _naming(path):
            rows.append(student.cache.get(partial(_answer, student, content), "answer", weights, content))
    return rows


@torch.inference_mode()
def _answer(student: Student, content: bytes) -> Arrays:
    picture = decode(content)
    array, _ = student.preparer.prepare(picture)
    vectors, boxes, objectness, _ = student.module(torch.from_numpy(array))
    outputs = {"class_embeds": vectors, "boxes": boxes, "objectness": objectness}
    return {**{name: tensor.half().numpy() for name, tensor in outputs.items()}, "size": np.array(picture.size)}


def measures(
    student: Student, data: Photographs, rows: Sequence[Arrays], looks: Sequence[Arrays]
) -> dict[str, Measure]:
    """The figures of the detector's answers; the first decides. ``looks``: what `look` gave for the same pictures."""
    if not data.names:
        return {"likeness to crops": _likeness(student.module.head, looks)}
    texts = student.named(data.names)
    if not data.truth:
        return _naming_pictures(student, data, rows, texts)
    proposed = [(boxes[objectness > 0], objectness > 0) for boxes, objectness in map(_regions, rows)]
    original = [boxes for boxes, _ in proposed]
    everything = [_detected(student, row, texts, np.arange(len(data.names))) for row in rows]
    present = [
        _detected(student, row, texts, np.unique(truth.classes)) for row, truth in zip(rows, data.truth, strict=True)
    ]
    hits, total = covered(data.truth, original)
    vectors = [row["class_embeds"][0][alive] for row, (_, alive) in zip(rows, proposed, strict=True)]
    right, fitting = _named_boxes(data.truth, original, vectors, texts)
    pairs = {"AP50": everything, "AP50, names present": present}
    precisions = {name: Matches(data.truth, detected, (0.5,)) for name, detected in pairs.items()}
    return {
        **{name: _precision(matches) for name, matches in precisions.items()},
        "boxes proposed": _ratio(hits, total),
        "regions named right": _ratio(right, fitting),
    }


@torch.inference_mode()
def _likeness(head: RegionHead, looks: Sequence[Arrays]) -> Measure:
    """100 times the mean cosine of the head's vectors with the teacher's."""
    total = [
        float((head(*(_joined([row], name) for name in ("vectors", "features"))) * _joined([row], "crops")).sum())
        for row in looks
    ]
    return _ratio(np.array(total), np.array([len(row["crops"]) for row in looks]))


def _regions(row: Arrays) -> tuple[Array, Array]:
    """-> boxes float32 [P, 4] in pixels of the picture, objectness [P]; 0 for a region in the padding."""
    _, frame = place(REGION_PIXELS, *row["size"].tolist())
    boxes = frame.to_original(row["boxes"][0].astype(np.float32))
    inside = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return boxes, np.where(inside, row["objectness"][0], 0).astype(np.float32)


def _detected(student: Student, row: Arrays, texts: Array, classes: Array) -> Boxes:
    if not len(classes):
        return Boxes.detected(np.empty((0, 4)), classes, np.empty(0))
    _, frame = place(REGION_PIXELS, *row["size"].tolist())
    feeds = {name: row[name].astype(np.float32) for name in ("class_embeds", "boxes")}
    feeds |= {"objectness": _regions(row)[1][None], "text_embeds": texts[classes]}
    kept = student.detect(feeds | Suppression(min_score=FLOOR, max_output=MOST).tensors())
    return Boxes.detected(frame.to_original(kept["kept_boxes"]), classes[kept["classes"]], kept["scores"])


def _named_boxes(
    truth: Sequence[Boxes], boxes: Sequence[Array], vectors: Sequence[Array], texts: Array
) -> tuple[Array, Array]:
    """-> int64 [N] each: true boxes whose best region is nearest to the box's name, and true boxes with a region."""
    right, fitting = np.zeros(len(truth), np.int64), np.zeros(len(truth), np.int64)
    for place_of, (row, regions_of, embeds) in enumerate(zip(truth, boxes, vectors, strict=True)):
        classes = row.classes[~row.crowd]
        if not (len(classes) and len(regions_of)):
            continue
        shared = overlaps(regions_of, row.boxes[~row.crowd], row.crowd[~row.crowd])
        fits = shared.max(axis=0, initial=0.0) >= NEAR
        names = (embeds[shared.argmax(axis=0)].astype(np.float32) @ texts.T).argmax(axis=1)
        right[place_of], fitting[place_of] = ((names == classes) & fits).sum(), fits.sum()
    return right, fitting


def _naming_pictures(student: Student, data: Photographs, rows: Sequence[Arrays], texts: Array) -> dict[str, Measure]:
    """The picture's name is that of the best pair of a region and a name, as the detect graph scores them: with the
    data's names alone, and with the names that the head was trained with beside them."""
    known = _other_names(student, texts)
    all_texts = {"pictures named right": texts, "among 1080 more names": np.concatenate((texts, known))}
    result = {}
    for title, labels in all_texts.items():
        best = [_scores(student, row, labels).max(axis=0).argmax() for row in rows]
        right = np.array(best) == np.array(data.labels)
        result[title] = _ratio(right.astype(np.int64), np.ones(len(right), np.int64))
    return result if len(data.names) > 1 else {title: result[title] for title in reversed(result)}


def _other_names(student: Student, texts: Array) -> Array:
    """The names that the head was trained with, without those that resemble the data's."""
    known = regions.names(Heads.load(SHIPPED), student.module.names).numpy()
    rows: Array = known[(known @ texts.T).max(axis=1) <= RELATED]
    return rows


def _precision(matches: Matches) -> Measure:
    return lambda weights: 100 * float(matches.average_precision(weights)[0])


def _ratio(right: Array, total: Array) -> Measure:
    def measure(weights: Array) -> float:
        count = float(weights @ total)
        return 100 * float(weights @ right) / count if count else float("nan")

    return measure


def compared(before: Mapping[str, Measure], after: Mapping[str, Measure], count: int, seed: int) -> dict[str, Any]:
    """-> for each figure: before, after, and the bounds that hold 95 % of the differences over paired resamples of the
    pictures (percentile bootstrap, Efron & Tibshirani 1993, chapter 13)."""
    random, every = np.random.default_rng(seed), np.ones(count, np.int64)
    draws = [np.bincount(random.integers(0, count, count), minlength=count) for _ in range(RESAMPLES)]
    result = {}
    for name, measure in before.items():
        differences = [after[name](weights) - measure(weights) for weights in draws]
        low, high = (np.nan, np.nan) if np.isnan(differences).all() else np.nanpercentile(differences, [2.5, 97.5])
        result[name] = {
            "before": _figure(measure(every)),
            "after": _figure(after[name](every)),
            "difference_95": [_figure(low), _figure(high)],
        }
    return result


def _figure(number: float) -> float | None:
    return None if np.isnan(number) else round(float(number), 2)


def kept_names(student: Student, before: Sequence[Arrays], after: Sequence[Arrays]) -> float:
    """Percent: of the regions of other photographs that COCO's 80 names detect, by the default threshold, those whose
    place is proposed again, and whose best name there is the same."""
    texts, same, total = student.module.names.numpy(), 0, 0
    for old, new in zip(before, after, strict=True):
        scores, again = _scores(student, old, texts), _scores(student, new, texts)
        boxes, there = _regions(old)[0], _regions(new)[0]
        near = overlaps(boxes, there, np.zeros(len(there), bool)) >= NEAR
        for row in np.flatnonzero(scores.max(axis=1) >= DEFAULT.min_score):
            at_place = np.where(near[row][:, None], again, 0.0).max(axis=0)
            same += at_place.any() and at_place.argmax() == scores[row].argmax()
            total += 1
    return round(100 * same / total, 1) if total else 100.0


def _scores(student: Student, row: Arrays, texts: Array) -> Array:
    """The scores of regions and texts as the detect graph computes them before suppression, float [P, n]."""
    logits = DETECT_SCALE * row["class_embeds"][0].astype(np.float32) @ np.concatenate((texts, student.background)).T
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Array = chances[:, : len(texts)] / chances.sum(axis=1, keepdims=True) * _regions(row)[1][:, None]
    return scores


def teach(data: Photographs, out: Path, cache: Path, *, seed: int = 0, keep: bool = False) -> dict[str, Any]:
    """Train, measure, and write detector.safetensors and report.json into ``out``; -> the report.

    Nothing is written if the first figure does not rise, unless ``keep``: the report's ``detector`` is None then.
    A run that was stopped goes on from ``cache``.
    """
    start = time.monotonic()
    student = Student(Cache(cache))
    trains, held = split(data, seed)
    if data.truth and not any((~data.truth[place_of].crowd).any() for place_of in held):
        raise BadRequest(f"none of the {len(held)} photographs held out has a box; expected boxes in more photographs")
    looks = look(student, data, "photographs")
    test, shown = data.only(held), [looks[place_of] for place_of in held]
    old, old_kept = answers(student, test.pictures, "before"), answers(student, samples.pictures(), "before, shipped")
    before = measures(student, test, old, shown)
    head, quality, about = taught(student, data, [looks[place_of] for place_of in trains], seed)
    student.module.head.load_state_dict(head.state_dict())
    student.module.quality.load_state_dict(quality.state_dict())
    after = measures(student, test, answers(student, test.pictures, "after"), shown)
    figures = compared(before, after, len(held), seed)
    kept = kept_names(student, old_kept, answers(student, samples.pictures(), "after, shipped"))
    first = next(iter(figures.values()))
    improved, detector = (first["after"] or 0.0) > (first["before"] or 0.0), out / DETECTOR.name
    report = {
        "data": {"layout": data.layout, "photographs": len(data.pictures), "names": list(data.names)},
        "trained": f"{about}; seed {seed}",
        "held_out": {"photographs": len(held), "figures": figures},
        "kept_names": kept,
        "improved": improved,
        "detector": str(detector) if improved or keep else None,
        "seconds": round(time.monotonic() - start, 1),
    }
    if report["detector"]:
        out.mkdir(parents=True, exist_ok=True)
        parts = Detector(student.module.boxes, student.module.quality, student.module.head)
        parts.save(detector, {"trained_on": str(report["trained"])})
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def taught(student: Student, data: Photographs, rows: Sequence[Arrays], seed: int) -> tuple[RegionHead, Quality, str]:
    """-> a head and a box quality that continue from the student's, and what trained them, in words."""
    shipped = look(student, Photographs("plain", tuple(samples.calibration_pictures())), "photographs that ship")
    seen, old = (Seen(*(_joined(part, name) for name in Seen.__annotations__)) for part in (rows, shipped))
    old = replace(old, crops=student.module.head(old.vectors, old.features).detach())
    seen = Seen(*(torch.cat((getattr(seen, name), getattr(old, name))) for name in Seen.__annotations__))
    named = Named(*(_joined(rows, f"named_{name}") for name in Named.__annotations__))
    cells = Cells(_joined(rows, "shapes"), _joined(rows, "overlaps"))
    names = torch.from_numpy(np.concatenate((student.named(data.names), student.background)))
    texts = torch.cat((names, regions.names(Heads.load(SHIPPED), student.module.names)))
    with parity.one_thread():  # small products; and their sums do not depend on the machine's cores
        head = train_head(seen, named, texts, len(data.names), student.module.head, seed=seed)
    quality, about = student.module.quality, f"{len(seen.crops)} regions, {int((named.names >= 0).sum())} of them named"
    if len(cells.overlaps):
        quality = box_quality.train(cells, start=quality, steps=STEPS, seed=seed)
        about += f"; {len(cells.overlaps)} cells near boxes"
    return head, quality, f"{len(rows)} photographs ({data.layout}): {about}"


def _joined(rows: Sequence[Arrays], name: str) -> Tensor:
    array = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float32))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error about a picture names its file."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
