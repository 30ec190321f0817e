"""What is left of long texts in a budget of tokens: rank retention over a gallery.

    python -m tests.bench.long_texts_collect FOLDER
    python -m tests.bench.long_texts FOLDER [BUNDLE] [--budgets 32 64 256] [--threads 1]

The gallery holds the vectors of all whole texts of FOLDER (the mean of their windows). Each shortened text is a query:

R@1, R@5, MRR  the rank of its own whole text
neighbours     the share of the whole's ten nearest other texts that are among the query's ten
order          Spearman's correlation of the similarities to all other texts, of the whole and of the query
cosine         of the query and its whole

Ways to shorten, each to the same budget: `end` cuts after its tokens; `first`: the first sentences that fit; `ends`:
sentences from both ends in turns; `random`: sentences in a random order; `compress`. `chunk` reads all, so it has the
gallery's own vectors and is not listed. The difference of `compress` and `end` has a 95 % interval by the bootstrap
over the texts. The run fails if an answer of `compress` has more tokens than the budget by a tokenizer of its own, is
not made of whole sentences in order, or differs from a text that fits.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from calmclip.models.flow import Array
from calmclip.models.preprocess.sentences import sentences
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.compression import joined
from calmclip.models.tasks.features import unit
from tests.bench.alternate import machine

NEIGHBOURS = 10
RESAMPLES = 2000
COLUMNS = ("R@1", "R@5", "MRR", "neighbours", "order", "cosine")


def figures(queries: Array, gallery: Array) -> Array:
    """[N, 6]: `COLUMNS` of each query, in percent. Query i belongs to row i of the gallery."""
    between, similar = gallery @ gallery.T, queries @ gallery.T
    rank = (similar > np.diag(similar)[:, None]).sum(axis=1)
    rows = []
    for i in range(len(gallery)):
        others = np.arange(len(gallery)) != i
        whole, query = between[i, others], similar[i, others]
        nearest = [set(np.argsort(-values, kind="stable")[:NEIGHBOURS]) for values in (whole, query)]
        order = np.corrcoef(np.argsort(np.argsort(whole)), np.argsort(np.argsort(query)))[0, 1]
        rows.append(
            [
                rank[i] < 1,
                rank[i] < 5,
                1 / (1 + rank[i]),
                len(nearest[0] & nearest[1]) / NEIGHBOURS,
                order,
                similar[i, i],
            ]
        )
    return 100 * np.array(rows, float)


class Shortener:
    """The ways to shorten a text to ``budget`` tokens, which a tokenizer of its own counts."""

    def __init__(self, runner: Runner, budget: int, seed: int = 0) -> None:
        self.runner, self.budget = runner, budget
        self.tokenizer = Tokenizer.from_file(str(runner.bundle.directory / runner.bundle.text().spec.tokenizer))
        self.random = np.random.default_rng(seed)

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)

    def end(self, text: str) -> str:
        """The longest beginning, to the character, within the budget."""
        offsets = self.tokenizer.encode(text).offsets
        for last in range(min(self.budget, len(offsets)) - 2, -1, -1):
            if self.count(text[: offsets[last][1]]) <= self.budget:
                return text[: offsets[last][1]]
        raise AssertionError("not one token fits")

    def first(self, text: str) -> str:
        return self._in_order(text, range(len(sentences(text))), stops=True)

    def ends(self, text: str) -> str:
        places = range(len(sentences(text)))
        half = (len(places) + 1) // 2
        turns = chain.from_iterable(zip_longest(places[:half], reversed(places[half:])))
        return self._in_order(text, [place for place in turns if place is not None], stops=True)

    def anyhow(self, text: str) -> str:
        return self._in_order(text, self.random.permutation(len(sentences(text))).tolist(), stops=False)

    def compress(self, text: str) -> str:
        (answer,) = self.runner.compress([text], self.budget)
        spans = sentences(text)
        assert self.count(answer.text) == answer.tokens <= self.budget
        assert list(answer.kept) == sorted(set(answer.kept))
        assert answer.cut or answer.text == joined(text, spans, answer.kept)
        (same,) = self.runner.compress([answer.text], self.budget)
        assert same.text == answer.text
        return answer.text

    def _in_order(self, text: str, order: Sequence[int], stops: bool) -> str:
        """Sentences in ``order`` as long as they fit; with ``stops`` the first that does not fit is the last."""
        spans, chosen = sentences(text), list[int]()
        for place in order:
            if self.count(joined(text, spans, [*chosen, place])) <= self.budget:
                chosen.append(place)
            elif stops or len(chosen) > self.budget // 4:
                break
        return joined(text, spans, chosen) or self.end(text)


def interval(first: Array, second: Array) -> tuple[float, float]:
    """95 % of the mean of the differences, by resampling the texts."""
    draws = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    low, high = np.percentile((second - first)[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("bundle", nargs="?", type=Path, default=Path("models/bundles/mini-int8"))
    options.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 256])
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    texts = [file.read_text(encoding="utf-8") for file in sorted(args.folder.glob("*.txt"))]
    runner = open_bundle(args.bundle, threads=args.threads, cached_rows=1 << 18)
    began = time.process_time()
    gallery = unit(runner.embed(texts=texts, truncate="chunk"))
    tokens = [runner.bundle.text().count(text) for text in texts]
    print(machine(args.threads))
    print(f"{len(texts)} texts of {min(tokens)} to {max(tokens)} tokens, median {np.median(tokens):.0f};")
    print(f"the gallery took {time.process_time() - began:.0f} s of processor time\n")
    print(f"| budget | way | {' | '.join(COLUMNS)} | s |\n|{' --- |' * (len(COLUMNS) + 3)}")
    for budget in args.budgets:
        shortener = Shortener(runner, budget)
        ways: dict[str, Callable[[str], str]] = {
            "end": shortener.end,
            "first": shortener.first,
            "ends": shortener.ends,
            "random": shortener.anyhow,
            "compress": shortener.compress,
        }
        table = {}
        for way, shorten in ways.items():
            began = time.process_time()
            shortened = [shorten(text) for text in texts]
            seconds = time.process_time() - began
            table[way] = figures(unit(runner.embed(texts=shortened, truncate="chunk")), gallery)
            means = " | ".join(f"{value:.1f}" for value in table[way].mean(axis=0))
            print(f"| {budget} | {way} | {means} | {seconds:.0f} |", flush=True)
        cells = []
        for end, ours in zip(table["end"].T, table["compress"].T, strict=True):
            low, high = interval(end, ours)
            cells.append(f"{(ours - end).mean():+.1f} ({low:+.1f} to {high:+.1f})")
        print(f"| {budget} | compress - end | {' | '.join(cells)} | |", flush=True)


if __name__ == "__main__":
    main()
