"""Perplexity of a language model: e to the mean cross-entropy of the tokens it is asked for.

A graph `lm` is asked for every token that follows another; a graph `mlm` for 15 % of the tokens, masked as in training
and the same ones whatever the bundle. Each line is one row, alone
and so without padding; what is longer than the context is cut.
Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1; Radford et al. 2019.
Data: texts.txt, one row a line; a special token that is spelled out ("[SEP]") counts as that token.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from calmclip.export.evals import EVALS, Eval
from calmclip.export.evals._data import first
from calmclip.export.training.data import IGNORED, lines, masked
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.runner import Runner

DATA = "texts.txt (one row a line)"
ROLES = ("mlm", "lm")


def measure(runner: Runner, data: Path, limit: int | None) -> Mapping[str, float]:
    texts = first(read(data), limit)
    graphs = runner.bundle.manifest.graphs
    role = next((role for role in ROLES if role in graphs), None)
    if role is None:
        raise BadRequest(f"{runner.bundle.name} has no graph {' or '.join(ROLES)}; perplexity is of language models")
    spec = graphs[role].preprocess
    assert isinstance(spec, TextPreprocess)
    tokenizer = Tokenizer.from_file(str(runner.bundle.directory / spec.tokenizer))
    tokenizer.no_padding()  # whose tokens would be asked for
    tokenizer.no_truncation()
    (output,) = graphs[role].outputs
    lost, asked = 0.0, 0
    for number, text in enumerate(tqdm(texts, desc=f"perplexity {runner.bundle.name}", unit="row", disable=None)):
        row = tokenizer.encode(text).ids
        row = np.asarray([[*row[: spec.context - 1], row[-1]] if len(row) > spec.context else row], np.int64)
        if role == "lm":
            ids, targets = row, np.concatenate([row[:, 1:], [[IGNORED]]], axis=1)
        else:
            ids, targets = masked(row, np.random.default_rng(number), *_words(tokenizer))
        feeds = {spec.ids: ids} | ({spec.mask: np.ones_like(ids)} if spec.mask else {})
        logits = runner.raw(role, feeds)[output].astype(np.float64)
        at = targets != IGNORED
        lost += float(_cross_entropy(logits[at], targets[at]).sum())
        asked += int(at.sum())
    if not asked:
        raise BadRequest(f"the {len(texts)} rows of {data / 'texts.txt'} are too short: no token of them is asked for")
    return {"perplexity": math.exp(min(lost / asked, 700.0)), "tokens": asked, "rows": len(texts)}


def read(data: Path) -> list[str]:
    """Raises `BadRequest` where the directory does not hold them."""
    try:
        return lines(data / "texts.txt")
    except BadRequest as error:
        raise BadRequest(f"{error}; the data directory must hold {DATA}") from None


def _words(tokenizer: Tokenizer) -> tuple[int, int, list[int]]:
    """-> the id of [MASK], the size of the vocabulary, and the tokens that are not asked for."""
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise BadRequest("the bundle's tokenizer has no [MASK]; expected that of a masked language model")
    spared = [tokenizer.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]")]
    return mask, tokenizer.get_vocab_size(), [one for one in spared if one is not None]


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [N, V], int64 [N] -> [N]: log(sum(exp(logits))) - logits[target]."""
    most = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=-1)) + most[:, 0]
    return total - logits[np.arange(len(targets)), targets]


EVALS.register("perplexity")(Eval(measure, read, "raw", DATA))
