"""The engines of `tests.bench.rivals`, and the process that runs one engine.

    python -m tests.bench.rival_engines ENGINE TOWER OUT THREADS

prints a line of JSON with the memory that the engine takes, or with the reason why it does not run the tower. Then it
answers each line of JSON on standard input: ``{"batch": 8, "calls": 3}`` -> seconds of each call, by the clock and by
processor time; ``{"outputs": true}`` -> the vectors of all measured inputs. With one thread it stays on one core.
"""

import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from calmclip.models.flow import Array
from tests.bench.rival_report import AVX2, OURS
from tests.bench.rival_towers import TOWERS, Inputs, Tower, checkpoint_of
from tests.tiny import MEAN, STD


class Unsupported(Exception):
    """An engine does not run a tower; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """The files of a tower, and the number of threads for the engine."""

    tower: Tower
    out: Path
    folder: Path
    threads: int

    def file(self, name: str) -> Path:
        if not (self.folder / name).exists():
            raise Unsupported(json.loads((self.folder / "about.json").read_text())["missing"].get(name, f"no {name}"))
        return self.folder / name


Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Engine:
    """``package``: imported before memory is measured. ``slow``: ``--quick`` omits the engine for large towers.
    ``environment``: variables of its process.
    """

    package: str
    build: Callable[[Place], Run]
    slow: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def _calmclip(place: Place) -> Run:
    from calmclip.models.bundle.manifest import Graph
    from calmclip.models.runtime.session import Session, SessionOptions

    graph = Graph.model_validate_json(place.file("graph.json").read_text())
    session = Session(place.file("ours.onnx"), graph, SessionOptions(threads=place.threads))
    (output,) = graph.outputs
    return lambda inputs: session.run(inputs.ours)[output]


def _onnxruntime(file: str, place: Place) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = place.threads
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(place.file(file)), settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs.theirs, strict=True)))[0]


def _openvino(file: str, precision: str, place: Place) -> Run:
    import openvino

    core, source = openvino.Core(), place.file(file)
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(place.threads), "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    ready: dict[int, Any] = {}  # batch -> its own request, because fixed shapes are faster

    def run(inputs: Inputs) -> Any:
        batch = len(inputs.theirs[0])
        if batch not in ready:
            model = core.read_model(source)
            model.reshape({at: list(rows.shape) for at, rows in enumerate(inputs.theirs)})
            ready[batch] = core.compile_model(model, "CPU", settings).create_infer_request()
        request = ready[batch]
        request.infer(list(inputs.theirs), share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    return run


def _torch(library: str, dtype: str, place: Place) -> Run:
    import torch

    load = place.tower.libraries[library]
    if isinstance(load, str):
        raise Unsupported(load)
    torch.set_num_threads(place.threads)
    kind = getattr(torch, dtype)
    module = load(checkpoint_of(place.tower, place.out), "sdpa").to(kind)

    def run(inputs: Inputs) -> Any:
        rows = [torch.from_numpy(part) for part in inputs.theirs]
        with torch.inference_mode():
            return module(*[part.to(kind) if part.is_floating_point() else part for part in rows]).float().numpy()

    return run


def _faster_clip(place: Place) -> Run:
    """faster-clip reads picture files, so its time includes decoding and normalising a PNG of 224 x 224 pixels."""
    if place.tower.checkpoint != "ViT-B-32" or place.tower.role != "image":
        raise Unsupported("it knows the image tower of ViT-B/32 alone")
    home = place.out / "faster-clip"
    link = home / "sentence-transformers__clip-ViT-B-32" / "0_CLIPModel"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(checkpoint_of(place.tower, place.out).resolve())
    os.environ["FASTER_CLIP_CACHE"] = str(home)
    import faster_clip

    model = faster_clip.ClipModel()
    files = cache(lambda inputs: [_png(pixels) for pixels in inputs.theirs[0]])
    return lambda inputs: np.asarray(model.encode_image(files(inputs)))


def _png(pixels: Array) -> bytes:
    from PIL import Image

    levels = (pixels.transpose(1, 2, 0) * STD + MEAN) * 255
    file = io.BytesIO()
    Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


ENGINES: dict[str, Engine] = {
    OURS: Engine("onnxruntime", _calmclip),
    "ONNX Runtime float": Engine("onnxruntime", partial(_onnxruntime, "float.onnx"), slow=True),
    "ONNX Runtime dynamic INT8": Engine("onnxruntime", partial(_onnxruntime, "dynamic.onnx")),
    "ONNX Runtime static INT8": Engine("onnxruntime", partial(_onnxruntime, "static.onnx")),
    "OpenVINO float": Engine("openvino", partial(_openvino, "float.xml", "f32"), slow=True),
    "OpenVINO bf16": Engine("openvino", partial(_openvino, "float.xml", "bf16"), slow=True),
    "OpenVINO INT8": Engine("openvino", partial(_openvino, "int8.xml", "f32")),
    "OpenVINO INT8, bf16 rest": Engine("openvino", partial(_openvino, "int8.xml", "bf16")),
    "faster-clip": Engine("faster_clip", _faster_clip, slow=True),
    # ONNX Runtime has no setting that limits it; see ops_avx2_instructions
    OURS + AVX2: Engine("onnxruntime", _calmclip, environment={"CALMCLIP_OPS_WITHOUT": "avx512,vnni,vbmi,avxvnni"}),
    "OpenVINO INT8" + AVX2: Engine(
        "openvino", partial(_openvino, "int8.xml", "f32"), environment={"ONEDNN_MAX_CPU_ISA": "AVX2"}
    ),
}
PEAK = "INT8 peak"
_ROUNDS, _ROUND_MACS = 500_000, 1536  # kPeakMacs of csrc/kernels/quant_linear.h


def _peak(place: Place) -> Run:
    """The op library's loop of 8-bit products in registers, without a tower; its "vector" is the products per call."""
    import ctypes

    from calmclip.models.ops.library import find

    library = find()
    address = {kernel.name: kernel.address for kernel in library.kernels if kernel.runs} if library else {}
    if "int8_peak" not in address:
        raise Unsupported("no op library with the kernel int8_peak")
    loop = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_size_t)(address["int8_peak"])

    def run(inputs: Inputs) -> Array:
        loop(_ROUNDS)
        return np.array([[_ROUNDS * _ROUND_MACS]])

    return run


_DTYPES = {"float": "float32", "bf16": "bfloat16"}


def engines(tower: Tower) -> dict[str, Engine]:
    """The engines of the table, and torch with each library of the tower; a library without the tower is refused."""
    return ENGINES | {
        f"torch {kind}, {library}": Engine("torch", partial(_torch, library, dtype), slow=True)
        for library in tower.libraries
        for kind, dtype in _DTYPES.items()
    }


def main(name: str, key: str, out: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to standard error
    tower, folder = TOWERS[key], Path(out) / key
    if threads == "1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    engine, inputs = (engines(tower) | {PEAK: Engine("models", _peak)})[name], Inputs.read(folder)
    try:
        importlib.import_module(engine.package)
        before = _resident()
        run = engine.build(Place(tower, Path(out), folder, int(threads)))
        run(inputs.rows(0, 1))
    except Exception as error:
        reason = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
        print(json.dumps({"refused": reason.strip().splitlines()[0][:200]}), file=answers)
        return
    print(json.dumps({"memory_mb": (_resident() - before) / 1e6}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(run, inputs, json.loads(line))), file=answers)


def _answer(run: Run, inputs: Inputs, request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("outputs"):
        return {"outputs": [np.asarray(run(inputs.rows(at, 1)))[0].tolist() for at in range(len(inputs.theirs[0]))]}
    rows = inputs.rows(0, request["batch"])
    wall, busy = [], []
    for _ in range(request["calls"]):
        begin, used = perf_counter(), process_time()
        run(rows)
        wall.append(perf_counter() - begin)
        busy.append(process_time() - used)
    return {"wall": wall, "busy": busy}


def _resident() -> int:
    """The resident set of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    main(*sys.argv[1:])
