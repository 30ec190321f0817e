"""Relevance of hits, composed queries and negatives, on Flickr8k's photographs.

    python -m tests.bench.relevance --data DIR [--bundle models/bundles/mini-int8] [--vectors FILE.npz]

DIR holds the folders flickr8k (300 photographs of the dev split, captions.json) and flickr8k-train (6,000 of the train
split, captions.jsonl). All 6,300 are one collection. ``--vectors``: where their vectors are kept between runs.

Off-topic queries are those of tests/bench/data/off_topic.txt, which were written before any score was seen. R@5 is that
of the 1,500 dev captions, each searched for in all 6,300; a target with less than the least relevance is lost. Captions
define the pairs of composed queries and negatives; a caption that does not name a thing does not prove its absence, so
the figures are lower bounds of what is right and comparable only with each other.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from calmclip.models import references, vocabulary
from calmclip.models.flow import Array
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.embed import query_prompt
from calmclip.service.relevance import PICTURE, TEXT, Measured, Part, Parts, sampled
from calmclip.service.routes.collections import composed
from calmclip.service.settings import Settings

OFF_TOPIC = Path(__file__).with_name("data") / "off_topic.txt"
LEVELS = 0.5, 0.8, 0.9, 0.93, 0.95, 0.99
TOP = 10
# Of pairs: names of an object as captions have them, and things, places and activities that a photograph may have too.
OBJECTS = {
    "dog": ("dog", "dogs", "puppy"),
    "boy": ("boy", "boys"),
    "girl": ("girl", "girls"),
    "man": ("man", "men"),
    "woman": ("woman", "women"),
    "bike": ("bike", "bikes", "bicycle", "biker", "bicycles"),
    "people": ("people", "group", "crowd"),
}
ATTRIBUTES = {
    "water": ("water",),
    "snow": ("snow", "snowy"),
    "grass": ("grass", "grassy"),
    "beach": ("beach",),
    "sand": ("sand", "sandy"),
    "ball": ("ball", "balls"),
    "street": ("street",),
    "rocks": ("rock", "rocks", "rocky"),
    "jumping": ("jumping", "jumps", "jump", "leaping", "leaps"),
    "running": ("running", "runs", "run"),
    "sitting": ("sitting", "sits"),
    "hat": ("hat", "hats"),
    "pool": ("pool",),
    "stick": ("stick", "sticks"),
}
QUERIES = 20  # pictures for each pair
LEAST_TARGETS = 10
# Of negatives: what is searched for. The negatives are the words that the captions of three of its ten hits name.
SUBJECTS = (
    "a dog", "two dogs", "a child", "a man", "people", "a girl", "a boy", "a woman", "a baby", "a bike", "a horse",
    "a football player", "a skateboarder", "a climber", "a swimmer", "a crowd", "a mountain", "a beach", "a street",
    "a boat",
)  # fmt: skip
NAMING = 3
NO_NEGATIVES = """
a an the in on of and with is are at to his her its their it he she they them by for from through into over
while two three one some as up down out off near who that this there or other another each be being has have
having wearing black white brown red blue green yellow small large little young old big man men woman women
boy boys girl girls dog dogs child children people person kid kids group running run runs playing plays play
standing stands stand sitting sits sit walking looking looks holding holds jumping jumps jump front behind
around along across something someone background
"""  # words that name nothing to remove, or what is searched for


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundle", type=Path, default=Path("models/bundles/mini-int8"))
    options.add_argument("--vectors", type=Path)
    asked = options.parse_args()
    runner = open_bundle(asked.bundle)
    photographs = Photographs(runner, asked.data, asked.vectors)
    least = Settings.model_fields["min_relevance"].default
    off_topic(runner, photographs)
    sizes(runner, photographs, least)
    pictures_and_words(runner, photographs)
    negatives(runner, photographs, least)


class Photographs:
    """``dev``: the captions of each of the first photographs; ``named``: the words of each photograph's captions;
    ``counts``: in how many of its captions a word is. ``vectors`` float32 [N, D]."""

    def __init__(self, runner: Runner, data: Path, kept: Path | None) -> None:
        dev = json.loads((data / "flickr8k" / "captions.json").read_text(encoding="utf-8"))
        lines = (data / "flickr8k-train" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        train = {entry["image"]: entry["captions"] for entry in map(json.loads, lines)}
        self.dev = [*dev.values()]
        captions = [*self.dev, *train.values()]
        self.counts = [Counter(word for caption in each for word in {*words_of(caption)}) for each in captions]
        self.named = [{*each} for each in self.counts]
        files = [data / "flickr8k" / "images" / name for name in dev]
        files += [data / "flickr8k-train" / "images" / name for name in train]
        if kept and kept.exists():
            self.vectors = np.load(kept)["vectors"]
        else:
            self.vectors = np.stack([*runner.embed_many(files)])
            if kept:
                np.savez(kept, vectors=self.vectors)
        assert len(self.vectors) == len(captions)
        self.measured = measured(runner, self.vectors)

    def naming(self, names: Iterable[str], least: int = 1) -> Array:
        """bool [N]: photographs of which so many captions have one of the words (at most one counts of each name)."""
        return np.array([max(counts[name] for name in names) >= least for counts in self.counts])


def measured(runner: Runner, vectors: Array) -> Measured:
    texts = runner.embed(texts=references.texts(), prompt_name=query_prompt(runner.bundle))
    pictures = runner.embed(images=references.pictures())
    return Measured.of({TEXT: texts, PICTURE: pictures}, sampled([vectors]), len(vectors))


def relevance(known: Measured, scores: Array, parts: Parts, rows: int) -> Array:
    values = known.relevance(scores, parts, rows)
    assert values is not None, "the bundle cannot tell the references apart"
    return values


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


def unrelated() -> list[str]:
    lines = OFF_TOPIC.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("# ")]


def off_topic(runner: Runner, photographs: Photographs) -> None:
    parts = (Part(TEXT, 1.0),)
    count = len(photographs.vectors)
    prompt = query_prompt(runner.bundle)
    best = (runner.embed(texts=unrelated(), prompt_name=prompt) @ photographs.vectors.T).max(axis=1)
    captions = [caption for each in photographs.dev for caption in each]
    target = np.repeat(np.arange(len(photographs.dev)), [len(each) for each in photographs.dev])
    scores = runner.embed(texts=captions, prompt_name=prompt) @ photographs.vectors.T
    right = scores[np.arange(len(captions)), target]
    among = (scores > right[:, None]).sum(axis=1) < 5
    print(f"{count} photographs; {len(best)} off-topic queries; {len(captions)} captions, R@5 {among.mean():.4f}")
    print("least relevance   off-topic queries without an answer   R@5      of R@5 without a least")
    for level in LEVELS:
        silent = (relevance(photographs.measured, best, parts, count) < level).sum()
        kept = among & (relevance(photographs.measured, right, parts, count) >= level)
        print(f"{level:15.2f}   {silent:4d} of {len(best)}   {kept.mean():32.4f}   {kept.sum() / among.sum():.3f}")


def sizes(runner: Runner, photographs: Photographs, least: float) -> None:
    """Collections of other sizes: random photographs, and mixtures of photographs' vectors for a large one."""
    queries = runner.embed(texts=unrelated(), prompt_name=query_prompt(runner.bundle))
    print(f"\nitems     off-topic queries without an answer at {least}, mean of the draws")
    random = np.random.default_rng(0)
    for count, draws in ((1, 20), (10, 20), (100, 10), (1000, 5), (100_000, 1)):
        shares = []
        for _ in range(draws):
            vectors = mixed(photographs.vectors, count, random)
            known = Measured.of(photographs.measured.vectors, sampled([vectors]), count)
            best = (queries @ vectors.T).max(axis=1)
            shares.append((relevance(known, best, (Part(TEXT, 1.0),), count) < least).mean())
        print(f"{count:7d}   {np.mean(shares):.3f}")


def mixed(vectors: Array, count: int, random: np.random.Generator) -> Array:
    """``count`` of the vectors; beyond their number, each plus a part of the difference of two more."""
    chosen = vectors[random.permutation(len(vectors))[:count]]
    more = count - len(chosen)
    if more <= 0:
        return chosen
    base, end, start = random.integers(0, len(vectors), (3, more))
    rows = vectors[base] + random.uniform(0.2, 0.8, (more, 1)) * (vectors[end] - vectors[start])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.concatenate([chosen, rows.astype(np.float32)])


def pictures_and_words(runner: Runner, photographs: Photographs) -> None:
    """Query: a photograph whose captions name the object (three of them) and not the attribute, plus the attribute.
    Targets: all other photographs of which two captions name the object, and two the attribute."""
    random = np.random.default_rng(0)
    ways = {"picture": (1.0, 0.0), "word": (0.0, 1.0)} | {f"picture + {w} word": (1.0, w) for w in (0.5, 1.0, 2.0)}
    precision, at_one, pairs = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0), 0
    for names, (word, forms) in ((o, a) for o in OBJECTS.values() for a in ATTRIBUTES.items()):
        targets = photographs.naming(names, 2) & photographs.naming(forms, 2)
        queries = np.flatnonzero(photographs.naming(names, 3) & ~photographs.naming(forms))
        if targets.sum() < LEAST_TARGETS or not len(queries):
            continue
        text = runner.embed(texts=[word], prompt_name=query_prompt(runner.bundle))[0]
        for query in random.permutation(queries)[:QUERIES]:
            pairs += 1
            for name, (picture, words) in ways.items():
                vector = picture * photographs.vectors[query] + words * text
                scores = photographs.vectors @ vector
                scores[query] = -np.inf  # a stored item is no hit of its own query
                hits = targets[np.argsort(-scores)[:TOP]]
                precision[name] += hits.mean()
                at_one[name] += hits.any()
    print(f"\n{pairs} pairs of a picture and a word   right among the first {TOP}   R@{TOP}: at least one right")
    for name in ways:
        print(f"{name:30s}   {precision[name] / pairs:26.3f}   {at_one[name] / pairs:.3f}")


def negatives(runner: Runner, photographs: Photographs, least: float) -> None:
    """Before and after a negative: of all pairs' first hits, those whose captions name the negative, and those whose
    captions name the subject."""
    pairs = [*named_by_hits(runner, photographs)]
    print(f"\n{len(pairs)} negatives: words that captions of {NAMING} of the first {TOP} hits name")
    print(
        f"weight    first {TOP} before: name it, the subject    first {TOP} after: name it, less by, the subject    "
        f"of relevance {least}: hits, name it, less by, the subject"
    )
    count = len(photographs.vectors)
    for weight in (-0.5, -0.75, -1.0, -1.25, -1.5):
        parts = (Part(TEXT, 1.0), Part(TEXT, weight))
        before, after, answered = np.zeros((3, 3), int)  # hits, those that name the negative, and the subject
        for subject, vector, word, negative in pairs:
            names = np.stack(
                [
                    np.ones(count, bool),
                    photographs.naming([word, f"{word}s"]),
                    photographs.naming(forms_of(subject)),
                ]
            )
            old = np.argsort(-(photographs.vectors @ vector))[:TOP]
            scores = photographs.vectors @ composed(np.stack([vector, negative]), [1.0, weight])
            new = np.argsort(-scores)[:TOP]
            relevant = new[relevance(photographs.measured, scores[new], parts, count) >= least]
            before += names[:, old].sum(axis=1)
            after += names[:, new].sum(axis=1)
            answered += names[:, relevant].sum(axis=1)
        less = [1 - each[1] / before[1] for each in (after, answered)]
        print(
            f"{weight:6.2f}    {before[1]:4d}  {before[2]:4d}    {after[1]:4d}  {less[0]:.3f}  {after[2]:4d}    "
            f"{answered[0]:4d}  {answered[1]:4d}  {less[1]:.3f}  {answered[2]:4d}"
        )


def named_by_hits(runner: Runner, photographs: Photographs) -> Iterator[tuple[str, Array, str, Array]]:
    """Subject, its vector, negative, its vector."""
    everyday, prompt = {*vocabulary.words()} - {*NO_NEGATIVES.split()}, query_prompt(runner.bundle)
    for subject, vector in zip(SUBJECTS, runner.embed(texts=SUBJECTS, prompt_name=prompt), strict=True):
        hits = np.argsort(-(photographs.vectors @ vector))[:TOP]
        counts = Counter(word for hit in hits for word in photographs.named[hit])
        for word, count in sorted(counts.items()):
            if count >= NAMING and word in everyday and word not in subject and len(word) > 2:
                yield subject, vector, word, runner.embed(texts=[word], prompt_name=prompt)[0]


def forms_of(subject: str) -> Sequence[str]:
    noun = subject.rpartition(" ")[2]
    return OBJECTS.get(noun.removesuffix("s"), (noun, f"{noun}s", noun.removesuffix("s")))


if __name__ == "__main__":
    main()
