"""Recall@1/5/10, text -> image and image -> text, over captioned pictures.

Source: Karpathy & Fei-Fei 2015 (arXiv 1412.2306), section 4.2: a query counts when one of its own is among
the first K. Every caption is a query for its picture; every picture is a query for any of its captions.
Data: captions.json {"file": [captions]}, or captions.jsonl lines {"image", "captions"}; pictures under images/.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calmclip.export.captions import read_captions
from calmclip.export.evals import EVALS, Eval
from calmclip.export.evals._data import first
from calmclip.models.flow import Array
from calmclip.models.runner import Runner

DATA = 'captions.json ({"file": [captions]}) or captions.jsonl ({"image", "captions"} a line), and images/'
_CHUNK = 64  # texts in one call


def measure(runner: Runner, data: Path, limit: int | None) -> Mapping[str, float]:
    captions = dict(first(list(captions_of(data).items()), limit))
    names = list(captions)
    texts = [caption for name in names for caption in captions[name]]
    owner = np.repeat(np.arange(len(names)), [len(captions[name]) for name in names])
    what = runner.bundle.name
    pictures = tqdm(names, desc=f"pictures {what}", unit="picture", disable=None)
    images = np.concatenate([runner.embed(images=[data / "images" / name]) for name in pictures])
    chunks = tqdm(range(0, len(texts), _CHUNK), desc=f"captions {what}", disable=None)
    vectors = np.concatenate([runner.embed(texts=texts[i : i + _CHUNK]) for i in chunks])
    numbers = recalls(images, vectors, owner)
    return {**numbers, "mean": float(np.mean(list(numbers.values()))), "pictures": len(names), "captions": len(texts)}


def captions_of(data: Path) -> dict[str, list[str]]:
    """Of whichever file there is. Raises as `read_captions`."""
    lines = data / "captions.jsonl"
    return read_captions(lines if lines.is_file() else data / "captions.json")


def recalls(images: Array, texts: Array, owner: Array) -> dict[str, float]:
    """images [N, D], texts [M, D] unit rows; ``owner`` int [M]: whose caption each text is. Percent."""
    similar = texts.astype(np.float64) @ images.astype(np.float64).T  # [M, N]
    own = similar[np.arange(len(texts)), owner]
    text_rank = (similar > own[:, None]).sum(axis=1)  # pictures before the right one
    right = owner[:, None] == np.arange(len(images))  # [M, N]
    best = np.where(right, similar, -np.inf).max(axis=0)
    image_rank = ((similar > best) & ~right).sum(axis=0)  # captions before the best right one
    found = {}
    for direction, rank in (("text_to_image", text_rank), ("image_to_text", image_rank)):
        for k in (1, 5, 10):
            found[f"{direction}_r{k}"] = 100 * float((rank < k).mean())
    return found


EVALS.register("retrieval")(Eval(measure, captions_of, "embed", DATA))
