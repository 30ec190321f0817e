"""What the reduced decode of a large JPEG costs in accuracy, time and memory, beside the full one.

`python -m tests.bench.reduced BUNDLE PICTURES [--each N]`: each photograph is enlarged to 8064 x 6048 (bicubic, so it
has no finer detail than its own) with grain of one grey level, and saved as JPEG of quality 92. Both decodes alternate.
Printed: the difference of the graph's input in grey levels; the cosine of the vectors; as a control, the cosine of the
full decode with itself after as many random steps of one grey level; seconds of the decode, one thread. ``--size
12000x9000`` shows another scale.
"""

from argparse import ArgumentParser
from io import BytesIO
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from calmclip.models.flow import Array
from calmclip.models.preprocess.image import MAX_PIXELS, SUFFIXES, decode, normalisation, whole_size
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.features import row_of


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("pictures", type=Path)
    options.add_argument("--each", type=int, default=24, help="photographs, evenly from the folder")
    options.add_argument("--size", default="8064x6048")
    asked = options.parse_args()
    width, height = map(int, asked.size.split("x"))
    paths = sorted(path for path in asked.pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = [paths[at] for at in np.linspace(0, len(paths) - 1, min(asked.each, len(paths))).astype(int)]
    runner = open_bundle(asked.bundle, threads=1)
    preparer = runner.bundle.image()
    gain, _ = normalisation(preparer.spec)
    grain = np.random.default_rng(0).integers(-1, 2, (height, width, 3), np.int8)
    dice = np.random.default_rng(1)
    cosines: dict[str, list[float]] = {"reduced": [], "control": []}
    steps, seconds, sides = [], {"full": 0.0, "reduced": 0.0}, set()

    def row(pixels: Array) -> Array:
        rows: Array = runner.run(row_of(runner.bundle, {preparer.spec.input: pixels}))
        first: Array = rows[0]
        return first

    for path in paths:
        large = np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC), np.int16)
        file = BytesIO()
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        pictures = {}
        for name, whole in (("full", True), ("reduced", False)):
            start = perf_counter()
            pictures[name] = decode(file.getvalue(), max_pixels=max(MAX_PIXELS, width * height), whole=whole)
            seconds[name] += perf_counter() - start
        assert whole_size(pictures["reduced"]) == (width, height)
        sides.add(pictures["reduced"].size)
        full, reduced = (preparer.prepare(pictures[name])[0] for name in ("full", "reduced"))
        step = np.abs(full - reduced) / gain
        steps.append(step)
        noise = dice.choice((-1, 1), full.shape) * (dice.random(full.shape) < step.mean()) * gain
        cosines["reduced"].append(float(row(full) @ row(reduced)))
        cosines["control"].append(float(row(full) @ row((full + noise).astype(np.float32))))
    print(f"{len(paths)} photographs at {width} x {height}, decoded at {sides}")
    print(f"input: largest difference {np.max(steps):.2f}, mean {np.mean(steps):.3f} grey levels")
    for name, values in cosines.items():
        print(f"cosine, {name}: least {min(values):.6f}, mean {np.mean(values):.6f}")
    print(", ".join(f"{name} {total / len(paths):.2f} s" for name, total in seconds.items()))


if __name__ == "__main__":
    main()
