"""Perplexity of a language model: e to the mean cross-entropy of the predicted tokens.

A graph `lm` predicts every token after the first; a graph `mlm` predicts 15 % of the tokens, masked as in training, the
same tokens for every bundle. Each line is one row without padding, cut to the context.

Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1; Radford et al. 2019.

Data: texts.txt, one row a line; a special token that is spelled out ("[SEP]") counts as that token.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.datasets import first, lines
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Samples, Statistic
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Arrays, Flow
from calmclip.models.preprocess.masking import IGNORED, masked
from calmclip.models.runner import Runner
from calmclip.models.tasks.raw import RawRequest, raw

DATA = "texts.txt (one row a line)"
ROLES = ("mlm", "lm")


@dataclass(frozen=True)
class DataSet:
    texts: Sequence[str]


def read(data: Path, params: NoParams, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` if the directory has no texts."""
    try:
        texts = lines(data / "texts.txt")
    except BadRequest as error:
        raise BadRequest(f"{error}; the data directory must hold {DATA}") from None
    return DataSet(first(texts, limit))


def predict(runner: Runner, data: DataSet, params: NoParams) -> Samples:
    bundle = runner.bundle
    role = next((role for role in ROLES if role in bundle.manifest.graphs), None)
    if role is None:
        raise BadRequest(f"{bundle.name} has no graph {' or '.join(ROLES)}; perplexity needs a language model")
    texts = progress(data.texts, f"perplexity {bundle.name}", "row", len(data.texts))
    rows = _rows(bundle, role, texts)
    losses = np.array([*runner.map(_loss(bundle, role, feeds, targets) for feeds, targets in rows)], np.float64)
    counts = losses[:, 1].astype(np.int64)
    if not counts.any():
        raise BadRequest(f"the {len(losses)} rows are too short: they have no token to predict")
    return Samples({"rows": len(losses), "tokens": int(counts.sum())}, {"lost": losses[:, 0], "asked": counts})


def _rows(bundle: Bundle, role: str, texts: Iterable[str]) -> Iterator[tuple[Arrays, Array]]:
    """-> feeds of the graph, and targets int64 [1, T]."""
    spec = bundle.graph(role).preprocess
    assert isinstance(spec, TextPreprocess)
    preparer = bundle.text(role)
    tokenizer = Tokenizer.from_file(str(bundle.directory / spec.tokenizer))
    for number, text in enumerate(texts):
        ids = preparer.encode(text)
        row = np.asarray([[*ids[: spec.context - 1], ids[-1]] if len(ids) > spec.context else ids], np.int64)
        if role == "lm":
            fed, targets = row, np.concatenate([row[:, 1:], [[IGNORED]]], axis=1)
        else:
            fed, targets = masked(row, np.random.default_rng(number), *_words(tokenizer))
        yield {spec.ids: fed} | ({spec.mask: np.ones_like(fed)} if spec.mask else {}), targets


def _loss(bundle: Bundle, role: str, feeds: Arrays, targets: Array) -> Flow[tuple[float, int]]:
    """-> the sum of the predicted tokens' cross-entropy in nats, and the number of these tokens."""
    (logits,) = (yield from raw(bundle, RawRequest(role, feeds))).values()
    at = targets != IGNORED
    return float(_cross_entropy(logits[at].astype(np.float64), targets[at]).sum()), int(at.sum())


def _words(tokenizer: Tokenizer) -> tuple[int, int, list[int]]:
    """-> the id of [MASK], the size of the vocabulary, and the tokens that are never predicted."""
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise BadRequest("the bundle's tokenizer has no [MASK]; expected a masked language model")
    spared = [tokenizer.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]")]
    return mask, tokenizer.get_vocab_size(), [token for token in spared if token is not None]


def _cross_entropy(logits: Array, targets: Array) -> Array:
    """float64 [N, V], int64 [N] -> [N]: log(sum(exp(logits))) - logits[target]."""
    most = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=-1)) + most[:, 0]
    lost: Array = total - logits[np.arange(len(targets)), targets]
    return lost


def score(samples: Samples, params: NoParams) -> Statistic:
    losses, counts = samples.arrays["lost"], samples.arrays["asked"]

    def of(rows: Array) -> Sequence[Figure]:
        tokens = counts[rows].sum()
        mean = losses[rows].sum() / tokens if tokens else math.nan
        return [Figure("perplexity", math.exp(min(mean, 700.0)))]

    return of


EVALS.register("perplexity")(Eval("raw", DATA, NoParams, read, predict, score))
