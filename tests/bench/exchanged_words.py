"""Wrong words of captions: what a bundle's key `explain` is fitted on, and the goals of the built-in bundle.

    python -m tests.bench.exchanged_words fit --data flickr8k-train
    python -m tests.bench.exchanged_words goals --data flickr8k

``fit`` takes photographs that no goal is measured on, and prints, for some values of ``expected``, how often the
exchanged word has the lowest margin, and the threshold below which ``--alarms`` percent of the unchanged captions have
a margin. ``goals`` runs the eval misalignment on both bundles with the values that ship, for each kind of exchange, and
prints a table. ``cost`` prints the CPU time of one explanation by the number of words.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.datasets import read_captions
from calmclip.models.evals import measure
from calmclip.models.evals.bootstrap import Resampling
from calmclip.models.evals.exchanged import exchange
from calmclip.models.evals.misalignment import changed
from calmclip.models.evals.tables import tabulate, text
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.contributions import Scene
from calmclip.models.tasks.explain import METHODS
from calmclip.models.tasks.features import picture
from calmclip.models.tasks.words import words

EXPECTED = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)
SENTENCE = "a brown dog runs along the beach with a red ball in its mouth while two children watch it"
SIDES = ("int8", "float")
GOALS = {  # figure -> least or most
    ("exchanged word", "lowest"): (">=", 65.0),
    ("captions", "AUROC F-CLIPScore"): (">=", 0.75),
    ("captions with a flag", "unchanged"): ("<=", 10.0),
}


def fit(options: argparse.Namespace) -> None:
    captioned = [*read_captions(options.data / "captions.jsonl").items()]
    drawn = np.random.default_rng(options.seed).permutation(len(captioned))[: options.pictures]
    names, captions = zip(*(captioned[place] for place in drawn), strict=True)
    rows = exchange(captions, options.seed, options.kinds)
    runner = open_bundle(options.bundles / options.bundle, threads=options.threads)
    flows = (
        _told(runner, options.data / "images" / names[row.picture], (row.caption, row.false), options.method)
        for row in rows
    )
    told = [*runner.map(flows)]
    marks = [np.array(changed(row.caption, row.false)) for row in rows]
    print(f"{len(rows)} pictures of {options.data.name}, seed {options.seed}, {options.bundle}, {options.method}")
    print("| expected | lowest % | threshold | flagged unchanged % | recall % |\n| --- | --- | --- | --- | --- |")
    for expected in EXPECTED:
        true, false = ([pair[side].margins(expected) for pair in told] for side in (0, 1))
        (unchanged, _), (lowest, hits) = _lowest(rows, true, None), _lowest(rows, false, marks)
        threshold = float(np.quantile(unchanged, options.alarms / 100))
        print(
            f"| {expected} | {100 * hits.mean():.1f} | {threshold:.3f} | {100 * (unchanged < threshold).mean():.1f} "
            f"| {100 * (hits & (lowest < threshold)).mean():.1f} |"
        )


def _told(runner: Runner, image: Path, captions: tuple[str, str], method: str) -> Flow[Any]:
    row = yield from picture(runner.bundle, image)
    answers = []
    for caption in captions:
        scene = Scene(caption, words(caption), row[0])
        answers.append((yield from METHODS[method].flow(runner.bundle, scene)))
    return answers


def _lowest(rows: Any, margins: list[Array], marks: list[Array] | None) -> tuple[Array, Array]:
    """The lowest margin of the content words of each caption, and whether an exchanged word has it."""
    values, hits = np.empty(len(rows)), np.zeros(len(rows), bool)
    for place, (row, each) in enumerate(zip(rows, margins, strict=True)):
        content = np.array([span.has_content for span in words(row.caption if marks is None else row.false)])
        kept = np.where(content, each, np.inf)
        values[place] = kept.min()
        hits[place] = marks is not None and bool(marks[place][kept.argmin()])
    return values, hits


def goals(options: argparse.Namespace) -> None:
    runners = [open_bundle(options.bundles / f"{options.bundle}-{kind}", threads=options.threads) for kind in SIDES]
    lines = []
    for kinds in options.kinds.split(","):
        params = {"seed": options.seed, "kinds": kinds, "method": options.method}
        data = measure.read("misalignment", options.data, params, options.pictures)
        sides = [measure.predict("misalignment", runner, data, params) for runner in runners]
        print(f"\nkinds = {kinds}\n{text(tabulate(sides, {}, Resampling()))}", flush=True)
        measured = [{figure.key: figure.value for figure in measure.figures(side)} for side in sides]
        for key, (sense, bar) in GOALS.items():
            values = [each[key] for each in measured]
            reached = all(value >= bar if sense == ">=" else value <= bar for value in values)
            shown = " | ".join(f"{value:.3g}" for value in values)
            lines.append(f"| {kinds} | {key[1]} | {sense} {bar:g} | {shown} | {'yes' if reached else 'no'} |")
    print("\n| kinds | goal | bar | INT8 | float | reached |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


def cost(options: argparse.Namespace) -> None:
    """CPU time on one thread, so that other processes do not count."""
    image = next((options.data / "images").iterdir())
    print("| bundle | words | texts | CPU ms picture | CPU ms words |\n| --- | --- | --- | --- | --- |")
    for kind in SIDES:
        runner = open_bundle(options.bundles / f"{options.bundle}-{kind}", threads=1, cached_rows=0)
        row = runner.embed(images=[image])[0]
        shown = _best(lambda runner=runner: runner.embed(images=[image]))
        for count in (4, 8, 12, 20):
            caption = " ".join((SENTENCE.split() * 2)[:count])
            scene = Scene(caption, words(caption), row)
            flow = METHODS[options.method].flow
            told = _best(lambda runner=runner, flow=flow, scene=scene: runner.run(flow(runner.bundle, scene)))
            print(f"| {kind} | {count} | {count + 1} | {shown:.0f} | {told:.0f} |")


def _best(work: Any, repeats: int = 7) -> float:
    """CPU milliseconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"fit": (fit, "mini-int8", 600), "goals": (goals, "mini", 300), "cost": (cost, "mini", 1)}
    steps = parser.add_subparsers(required=True)
    for verb, (function, bundle, pictures) in verbs.items():
        step = steps.add_parser(verb)
        step.add_argument("--data", type=Path, required=True)
        step.add_argument("--bundle", default=bundle)
        step.add_argument("--bundles", type=Path, default=Path("models/bundles"))
        step.add_argument("--method", default="leave_one_out", choices=sorted(METHODS))
        step.add_argument("--pictures", type=int, default=pictures)
        step.add_argument("--seed", type=int, default=0)
        step.add_argument("--kinds", default="any,wide,narrow" if verb == "goals" else "wide")
        step.add_argument("--threads", type=int, default=0)
        step.add_argument("--alarms", type=float, default=5.0, help="percent of unchanged captions with a flag")
        step.set_defaults(function=function)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
