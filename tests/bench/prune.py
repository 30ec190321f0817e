"""The adapter `prune` on CLIP's ViT-B/16 (open_clip, random weights): speed, and cosine to the whole tower.

    python -m tests.bench.prune [--keep 0.3 0.5 0.7] [--after 3 4 6] [--threads 1] [--seconds 20] [--float]

All towers of the table are open at once, run one picture a call, and take turns. They are INT8 graphs by the quantizer
`fast`, with our operators; with --float, float graphs. The cosine is that of float vectors of the samples. Random
weights attend almost evenly, so the cosine says nothing about a trained tower.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from calmclip.export import calibrate, light, parity, rewrites, samples
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Tower
from calmclip.export.pipeline import load
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.trace import to_onnx
from calmclip.models.flow import Arrays
from calmclip.models.ops.library import find
from tests.bench import checkpoints
from tests.bench.alternate import alternate, machine

PLAIN = "whole"
CALIBRATION = 8  # pictures


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    options.add_argument("--after", type=int, nargs="+", default=[3, 4, 6])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--float", action="store_true", help="float graphs instead of INT8")
    arguments = options.parse_args()
    print(machine(arguments.threads))
    cases: dict[str, list[Adapt]] = {PLAIN: []} | {
        f"after {after}, keep {keep:g}": [Adapt(name="prune", params={"keep": keep, "after": after})]
        for after in arguments.after
        for keep in arguments.keep
    }
    runs: dict[str, Callable[[], object]] = {}
    cosines: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = checkpoints.write("ViT-B-16", Path(name) / "vit")
        for case, adapters in cases.items():
            net = load("clip", str(checkpoint), Weights(), adapters)
            tower = net.towers["image"]
            feeds = [*calibrate.feeds(tower, Path(name), samples.pictures(), ())]
            runs[case] = _run(case, tower, feeds, arguments)
            cosines[case] = net.facts["prune"]["cosine"] if adapters else 1.0
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    timings = alternate(runs, seconds=arguments.seconds, clock=clock)
    print(f"{'':22s} {'ms':>7s} {'p95':>7s} {'speed':>6s} {'cosine':>7s}   {timings[PLAIN].calls} rounds")
    for case, timing in timings.items():
        speed = timings[PLAIN].p50 / timing.p50
        print(f"{case:22s} {timing.p50 * 1e3:7.1f} {timing.p95 * 1e3:7.1f} {speed:5.2f}x {cosines[case]:7.4f}")


def _run(case: str, tower: Tower, feeds: Sequence[Arrays], arguments: argparse.Namespace) -> Callable[[], object]:
    """One picture through the tower's graph. Prints how many operators of ours it has."""
    model = to_onnx(tower)
    if not arguments.float:
        quantizer = QUANTIZERS.get("fast")
        params = quantizer.params()
        assert quantizer.observe
        with parity.one_thread():
            model = quantizer.quantize(model, quantizer.observe(model, feeds[:CALIBRATION], params), params)
    applied = rewrites.apply(model, rewrites.swaps())
    counts = ", ".join(f"{name} {count}" for name, count in applied.counts.items() if count)
    print(f"{case}: {counts}", flush=True)
    for parameter in tower.module.parameters():
        parameter.data = torch.empty(0)
    session = light.Session(applied.model, threads=arguments.threads, library=find())
    return partial(session.run, None, feeds[0])


if __name__ == "__main__":
    main()
