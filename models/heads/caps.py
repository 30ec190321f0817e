"""CapS head: as `tip`, with captions of the pictures in the keys, and votes by how alike two pictures are to labels.

Source: Wang et al. 2024 (arXiv 2405.16591), CapS-Adapter, over SuS-X (Udandarao et al. 2023, arXiv 2211.16198), whose
         KL term it uses. The authors' code takes p from the vectors themselves, not from their cosines with the labels;
         ``paper_code`` does that.
In:     image [B, D], columns.text [C, D], unit rows.
Assets: keys float32 [N, D] = (1 - delta) pictures + delta captions, without captions the texts of their labels;
        values float32 [N, C], 1 for the label of each, else 0; anchors float32 [K, D], the texts of the labels;
        log_p float32 [N, K], ln p of the pictures, p = softmax(picture . anchors / 0.5);
        ranges float32 [4], the least and greatest KL and A between two of these pictures.
Out:    A = image . keys; kl = KL(p of the image || p of the pictures), its range mapped to that of A;
        logits float32 [B, C] = scale * cosine + alpha * exp(-beta (1 - A)) values - gamma * kl values.

The paper takes the ranges from the batch that is classified. Here they are fixed by the fit, so a picture's scores do
not depend on other pictures.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head, tip
from calmclip.models.heads.cosine import softmax

HALF = np.float32(0.5)  # the temperature of p, as published
GAMMAS = np.array([0, 0.01, 0.03, 0.1, 0.3])  # of the zero-shot scale
DELTAS = (0.0, 0.25, 0.5)


class Params(tip.Params):
    gamma: float | None = Field(default=None, ge=0, le=1e6)  # None: the pictures choose
    delta: float | None = Field(default=None, ge=0, le=1)  # None: the pictures choose
    paper_code: bool = False


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    return {**tip.grid(examples), "gamma": (examples.scale * GAMMAS).tolist(), "delta": DELTAS}


def fit(examples: Examples, params: Params) -> Arrays:
    image, delta = examples.image, np.float32(params.delta or 0)
    captions = examples.text[examples.truth] if examples.captions is None else examples.captions
    keys = ((1 - delta) * image + delta * captions).astype(np.float32)
    anchors = np.eye(image.shape[1], dtype=np.float32) if params.paper_code else examples.text.astype(np.float32)
    log_p = log_softmax(image @ anchors.T / HALF)
    others = ~np.eye(len(image), dtype=bool)  # a picture is nearer to itself than to any new one
    near, apart = (image @ keys.T)[others], divergence(log_p, log_p)[others]
    ranges = np.array([apart.min(), apart.max(), near.min(), near.max()], np.float32)
    return {**tip.fit(examples, params), "keys": keys, "anchors": anchors, "log_p": log_p, "ranges": ranges}


def log_softmax(logits: Array) -> Array:
    """Over the last axis; the dtype of ``logits``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) for each row p of [B, K] and each row q of [N, K] -> [B, N]."""
    p: Array = np.exp(log_p)
    apart: Array = (p * log_p).sum(axis=1, keepdims=True) - p @ log_q.T
    return apart


def logits(image: Array, columns: Columns, params: Params) -> Array:
    assets = columns.assets
    near = image @ assets["keys"].T
    low, high, least, greatest = assets["ranges"]
    apart = divergence(log_softmax(image @ assets["anchors"].T / HALF), assets["log_p"])
    scaled = least + (apart - low) * ((greatest - least) / max(high - low, np.float32(1e-12)))
    cache = np.float32(params.alpha or 0) * tip.votes(near, columns, params.beta)
    alike: Array = np.float32(params.gamma or 0) * (scaled @ assets["values"])
    return tip.zero_shot(image, columns, params.scale) + cache - alike


def notes(examples: Examples, params: Params, assets: Arrays) -> Sequence[str]:
    return () if examples.captions is not None else ("no captions were given: the texts of the labels stand for them",)


ASSETS = {
    **tip.ASSETS, "anchors": Asset(("K", "D")), "log_p": Asset(("N", "K")), "ranges": Asset((4,))
}  # fmt: skip
FIT = Fit(fit, grid, ("delta",), ("alpha", "gamma"), ("captions",), notes=notes)
HEADS.register("caps")(Head(Params, logits, softmax, ASSETS, FIT))
