"""An INT8 tower of CLIP ViT-B/32's size by batch size, threads and spinning: the options of our sessions.

    python -m tests.bench.batches [--batches 1 2 4 8 16 32] [--seconds 3]

Random weights, the quantizer `fast`, our operators. Figures are wall-clock milliseconds per item, all sides in turns:
measure on a quiet machine. The service runs one thread per core, without spinning.
"""

import argparse
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime as ort

from calmclip.export import rewrites
from calmclip.export.quantizers import fast
from calmclip.export.trace import to_onnx
from calmclip.models.ops.library import find
from tests.bench.alternate import alternate, machine
from tests.bench.quantizers import vit

THREADS = (1, 2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    options.add_argument("--seconds", type=float, default=3.0, help="for each batch")
    arguments = options.parse_args()
    print(machine(max(THREADS)))
    random = np.random.default_rng(0)
    pixels = random.standard_normal((max(4, *arguments.batches), 3, 224, 224)).astype(np.float32)
    model, params = to_onnx(vit(12)), fast.Params()
    ranges = fast.observe(model, [{"pixels": pixels[i : i + 1]} for i in range(4)], params)
    graph = rewrites.apply(fast.quantize(model, ranges, params), rewrites.swaps()).model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b32.onnx"
        path.write_bytes(graph.SerializeToString())
        del graph, model
        sides = {
            f"{threads} thread{'s'[: threads != 1]}{', spinning' if spin else ''}": _open(path, threads, spin)
            for threads, spin in product(THREADS, (False, True))
            if threads > 1 or not spin
        }
    print("| ms an item | " + " | ".join(sides) + " |\n" + "| --- " * (len(sides) + 1) + "|")
    for batch in arguments.batches:
        feeds = {"pixels": pixels[:batch]}
        runs = {name: partial(session.run, None, feeds) for name, session in sides.items()}
        timings = alternate(runs, seconds=arguments.seconds)
        cells = " | ".join(f"{timings[name].p50 * 1e3 / batch:.2f}" for name in sides)
        print(f"| batch {batch} | {cells} |", flush=True)


def _open(path: Path, threads: int, spin: bool) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = False
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    library = find("required")
    assert library is not None
    settings.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
