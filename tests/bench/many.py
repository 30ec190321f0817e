"""Many pictures from Python: `Runner.classify_many` against the sum of its parts, each measured alone.

`python -m tests.bench.many BUNDLE PICTURES`: 1,000 pictures (those of the folder, repeated), 1,000 labels with 7
templates. Run it on one core (`taskset -c 0`), because work on another core hides a part of the cost.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from calmclip import Runner, open_bundle
from calmclip.models.classifier import Classifier
from calmclip.models.measure import machine
from calmclip.models.preprocess.image import decode
from calmclip.models.tasks.features import labels

TEMPLATES = tuple(
    f"a {kind} of a {{}}." for kind in ("photo", "picture", "drawing", "close-up", "view", "painting", "sketch")
)


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def drain(answers: Iterable[object]) -> None:
    for _ in answers:
        pass


def parts(runner: Runner, pictures: list[bytes]) -> dict[str, float]:
    """Seconds for all pictures: decoding, preprocessing and the image graph, in sequence."""
    preparer, session = runner.bundle.image(), runner.session("image")
    start = time.perf_counter()
    opened = [decode(picture) for picture in pictures]
    decoded = time.perf_counter()
    ready = [preparer.prepare(image)[0] for image in opened]
    prepared = time.perf_counter()
    drain(session.run({preparer.spec.input: pixels}) for pixels in ready)
    return {"decode": decoded - start, "preprocess": prepared - decoded, "image": time.perf_counter() - prepared}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("pictures", type=Path)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--labels", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    files = sorted(file for file in arguments.pictures.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = list(islice(cycle([file.read_bytes() for file in files]), arguments.count))
    names = tuple(f"thing number {i}" for i in range(arguments.labels))
    print(", ".join(f"{key} {value}" for key, value in machine(arguments.threads).items()))
    alone, together, once = [], [], []
    for _ in range(arguments.rounds):
        runner = open_bundle(arguments.bundle, threads=arguments.threads)
        runner.classify(pictures[0], ["a thing"])  # opens the sessions
        classifier = Classifier(names, TEMPLATES).with_defaults(runner.bundle.classifier)
        once.append(seconds(lambda: runner.run(labels(runner.bundle, classifier))))  # noqa: B023 - run at once
        fresh = open_bundle(arguments.bundle, threads=arguments.threads)
        fresh.classify(pictures[0], ["a thing"])
        answer = partial(fresh.classify_many, pictures, names, templates=TEMPLATES, top_k=5)
        together.append(seconds(lambda: drain(answer())))  # noqa: B023 - as above
        alone.append(parts(fresh, pictures))
    least = {name: min(times[name] for times in alone) for name in alone[0]}
    total = sum(least.values())
    for name, value in {**least, "labels once": min(once), "classify_many": min(together)}.items():
        print(f"{name:14s} {value:7.2f} s   {1000 * value / len(pictures):6.3f} ms a picture")
    print(f"(classify_many - labels) / parts = {(min(together) - min(once)) / total:.3f}")


if __name__ == "__main__":
    main()
