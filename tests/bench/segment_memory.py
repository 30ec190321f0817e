"""Peak memory of `segment` above the tower alone, and whether a batch changes an answer.

    python -m tests.bench.segment_memory models/bundles/mini-int8 [--role dense] [--method maskclip]

The picture is a sample photograph, enlarged to 4000 x 3000 pixels; the labels are 80 words. Each side is a process of
its own, which opens the bundle and answers twice: one side decodes the picture and runs the tower on it, another embeds
the labels too, the others ask for masks: as answers, as COCO's runs, and as an indexed PNG. A figure is the process's
largest resident set. Then eight photographs are segmented one by one and in batches of eight, and masks are compared.
"""

import argparse
import multiprocessing
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from calmclip import open_bundle
from calmclip.export.samples import pictures
from calmclip.models import vocabulary
from calmclip.models.flow import Call, Flow
from calmclip.models.runner import Runner
from calmclip.models.tasks.features import prepared
from calmclip.models.tasks.segment import SegmentRequest, segment
from tests.bench.alternate import machine
from tests.bench.detect_picture import SAMPLES

SIZE = (4000, 3000)
LABELS = 80
BATCH = 8


def tower(runner: Runner, picture: Path, role: str) -> None:
    def flow() -> Flow[None]:
        feeds, _ = yield from prepared(runner.bundle, picture, role)
        yield Call(role, feeds)

    runner.run(flow())


def peak(bundle: Path, picture: Path, side: str, role: str, method: str | None) -> float:
    """MB, of this process."""
    runner, words = open_bundle(bundle, threads=1), vocabulary.words()[:LABELS]
    for _ in range(2):
        if side.startswith("tower"):
            tower(runner, picture, role)
            if side == "tower and labels":
                runner.embed(texts=words)
            continue
        segments = runner.segment(picture, words, method=method)
        if side == "masks as runs":
            _ = [each.mask.rle() for each in segments]
        elif side == "masks as an indexed PNG":
            segments.indexed_png()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def differing(runner: Runner, files: Sequence[Path], labels: Sequence[str], method: str | None) -> tuple[int, int]:
    """Pixels of all masks that differ between answers one by one and in batches, and pixels of all masks."""
    requests = [SegmentRequest(path, labels, method=method) for path in files]
    alone = [runner.run(segment(runner.bundle, request)) for request in requests]
    flows = (segment(runner.bundle, request) for request in (requests[0], *requests))  # the first runs alone
    batched = [*runner.map(flows, batch=BATCH)][1:]
    differ = total = 0
    for one_by_one, together in zip(alone, batched, strict=True):
        masks = [{each.index: each.mask.pixels() for each in answer} for answer in (one_by_one, together)]
        for index in masks[0].keys() | masks[1].keys():
            parts = [side[index] for side in masks if index in side]
            differ += int((parts[0] != parts[1]).sum()) if len(parts) == 2 else int(parts[0].sum())
            total += int(parts[0].sum())
    return differ, total


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--role", default="dense", help="the graph of the tower (default dense)")
    options.add_argument("--method", help="of the family segmenters; else the bundle's")
    arguments = options.parse_args()
    print(machine(1))
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        with Image.open(pictures()[0]) as sample:
            sample.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(picture, quality=90)
        work = partial(peak, arguments.bundle, picture, role=arguments.role, method=arguments.method)
        figures: dict[str, float] = {}
        for side in ("tower", "tower and labels", "masks", "masks as runs", "masks as an indexed PNG"):
            with multiprocessing.get_context("spawn").Pool(1) as process:  # a process each: a peak never falls
                figures[side] = process.apply(work, kwds={"side": side})
            print(f"{side:26s} {figures[side]:7.1f} MB   {figures[side] - figures['tower']:+7.1f}")
    runner = open_bundle(arguments.bundle, threads=1)
    files = sorted(SAMPLES.glob("*.jpg"))[:BATCH]
    differ, total = differing(runner, files, vocabulary.words()[:LABELS], arguments.method)
    print(f"one by one and in a batch of {BATCH}: {differ} of {total} pixels of masks differ")


if __name__ == "__main__":
    main()
