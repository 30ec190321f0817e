"""How far a temperature that is fitted to N pictures is from the right one: the reason for `labels.MIN_PICTURES`.

    python -m tests.bench.temperatures [--draws 60]

No bundle: the logits of a picture are drawn, its label is drawn from their softmax, and a head answers them times 2, so
the right temperature is 2. ``spread`` is the deviation of the logits: a larger one gives a better classifier. A line
has the median of the fitted temperatures, the deviation of their logarithm, and the part that is off by more than 25 %.

Then the labels differ: each is too sure by a factor of its own (2, times e to a normal of .5), and half of 10 labels
have only k of 100 pictures each. The figure is the root mean square of ln (fitted / fitted to 300 pictures of each
label).
"""

import argparse

import numpy as np

from calmclip.models.flow import Array
from calmclip.models.heads import BoundHead
from calmclip.models.heads.cosine import softmax
from calmclip.models.tasks.calibrate import best_temperature

RIGHT = 2.0


def drawn(draw: np.random.Generator, count: int, labels: int, spread: float) -> tuple[Array, Array]:
    """True logits float64 [N, C] and labels int64 [N]."""
    logits = spread * draw.standard_normal((count, labels))
    return logits, (softmax(logits).cumsum(axis=1) > draw.random((count, 1))).argmax(axis=1)


def fitted(logits: Array, truth: Array) -> float:
    head = BoundHead("cosine", {}, {}, [str(i) for i in range(logits.shape[1])])
    return best_temperature(logits, truth.tolist(), head)


def by_count(draw: np.random.Generator, draws: int) -> None:
    for labels, spread in ((2, 2), (2, 4), (10, 2), (10, 4), (100, 3)):
        for count in (1, 10, 30, 50, 100, 200, 500):
            pairs = (drawn(draw, count, labels, spread) for _ in range(draws))
            logs = np.log([fitted(RIGHT * logits, truth) for logits, truth in pairs])
            off = np.abs(logs - np.log(RIGHT)) > np.log(1.25)
            print(
                f"{labels:3d} labels, spread {spread}, {count:3d} pictures: median {np.exp(np.median(logs)):5.2f}   "
                f"deviation of ln {logs.std():.2f}   off by 25 % {off.mean():.2f}",
                flush=True,
            )


def by_label(draw: np.random.Generator, draws: int) -> None:
    labels = 10
    apart: dict[int, list[float]] = {}
    for _ in range(draws):
        factors = RIGHT * np.exp(0.5 * draw.standard_normal(labels))
        logits, truth = drawn(draw, 12_000, labels, 3.0)
        rows = [np.flatnonzero(truth == label) for label in range(labels)]
        sure = logits * factors[truth][:, None]

        def of(counts: list[int], rows: list[Array] = rows, sure: Array = sure, truth: Array = truth) -> float:
            chosen = np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
            return fitted(sure[chosen], truth[chosen])

        every = of([300] * labels)
        for few in (0, 1, 2, 5, 10):
            apart.setdefault(few, []).append(np.log(of([few] * 5 + [20 - few] * 5) / every))
    for few, logs in apart.items():
        print(f"half of the labels have {few:2d} pictures, 100 in all: {np.sqrt(np.mean(np.square(logs))):.2f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--draws", type=int, default=60)
    draws = options.parse_args().draws
    by_count(np.random.default_rng(0), draws)
    by_label(np.random.default_rng(1), draws)


if __name__ == "__main__":
    main()
