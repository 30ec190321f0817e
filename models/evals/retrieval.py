"""Retrieval: recall@1/5/10, text -> image and image -> text, over captioned pictures.

Source: Karpathy & Fei-Fei 2015 (arXiv 1412.2306), section 4.2: a query is a hit if one of its matches is among the
first K. Every caption is a query for its picture; every picture is a query for any of its captions. Intervals resample
pictures, with their captions, as queries; the searched set does not change.

Data: captions.json {"file": [captions]}, or captions.jsonl lines {"image", "captions"}; pictures under images/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calmclip.models.datasets import first, read_captions
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Samples, Statistic
from calmclip.models.evals.vectors import vectors
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner

DATA = 'captions.json ({"file": [captions]}) or captions.jsonl ({"image", "captions"} a line), and images/'


@dataclass(frozen=True)
class DataSet:
    """``captions``: at least one per picture."""

    pictures: Sequence[Picture]
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.captions) or not all(self.captions):
            raise BadRequest(
                f"{len(self.pictures)} pictures, {sum(map(bool, self.captions))} with captions; expected all"
            )


def read(data: Path, params: NoParams, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` as `read_captions`."""
    rows = data / "captions.jsonl"
    pairs = first([*read_captions(rows if rows.is_file() else data / "captions.json").items()], limit)
    return DataSet([data / "images" / name for name, _ in pairs], [captions for _, captions in pairs])


def predict(runner: Runner, data: DataSet, params: NoParams) -> Samples:
    texts = [caption for captions in data.captions for caption in captions]
    owner = np.repeat(np.arange(len(data.pictures)), [len(captions) for captions in data.captions])
    images, rows = vectors(runner, data.pictures, texts)
    counts = {"pictures": len(images), "captions": len(texts)}
    return Samples(counts, {"images": images, "texts": rows, "owner": owner.astype(np.int64)})


def ranks(images: Array, texts: Array, owner: Array) -> tuple[Array, Array]:
    """images [N, D], texts [M, D] unit rows; ``owner`` int [M]: the picture of each text -> int [M], int [N]: for each
    text the rank of its picture, for each picture the rank of its best caption, both from 0."""
    similar = texts.astype(np.float64) @ images.astype(np.float64).T  # [M, N]
    target = similar[np.arange(len(texts)), owner]
    right = owner[:, None] == np.arange(len(images))  # [M, N]
    best = np.where(right, similar, -np.inf).max(axis=0)
    return (similar > target[:, None]).sum(axis=1), ((similar > best) & ~right).sum(axis=0)


def score(samples: Samples, params: NoParams) -> Statistic:
    owner = samples.arrays["owner"]
    text_rank, image_rank = ranks(samples.arrays["images"], samples.arrays["texts"], owner)
    captions = np.bincount(owner, minlength=samples.count)
    hits = {k: np.bincount(owner, weights=text_rank < k, minlength=samples.count) for k in (1, 5, 10)}

    def of(rows: Array) -> Sequence[Figure]:
        queries = captions[rows].sum()
        to_image = [Figure(f"text_to_image_r{k}", 100 * float(hits[k][rows].sum() / queries), "%") for k in hits]
        to_text = [Figure(f"image_to_text_r{k}", 100 * float((image_rank[rows] < k).mean()), "%") for k in hits]
        figures = [*to_image, *to_text]
        return [*figures, Figure("mean", float(np.mean([figure.value for figure in figures])), "%")]

    return of


EVALS.register("retrieval")(Eval("embed", DATA, NoParams, read, predict, score))
