"""A decoder as an embedder, in INT8 and beside other engines: time, size, memory of the export.

    python -m tests.bench.decoders [--tiny] [--quick] [--outliers 20] [--out DIR] [--tokens 16 128] [--seconds 10]

A checkpoint of the shape of Qwen3-0.6B (28 layers, width 1024, 16 heads of 128, 8 of keys and values, MLP 3072, 151,669
words) gets random weights in bfloat16. ``--outliers``: a few channels of the residual stream are so much larger, as in
trained decoders, but without their training against the error. `calmclip export` runs on it in a process of its own,
and its largest resident set is the peak. Then
all engines embed one text in turns, in one process with one thread, by processor time:

    ours                     the bundles of that export, by our operators
    ONNX Runtime             the traced float graph, and `quantize_dynamic` of it, per channel
    OpenVINO                 the same float graph with int8 weights, whose activations OpenVINO quantizes at run time
                             (as after `nncf.compress_weights`); and in QDQ pairs with static ranges
    torch                    the module of transformers in float32, and `torch.ao.quantization.quantize_dynamic` of it

``--quick`` leaves out what is slow: torch float and the static OpenVINO graph. ``--tiny``: another shape, for a test.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from calmclip.models.flow import Array
from tests.bench.alternate import alternate, machine
from tests.bench.full_size import run

OURS, OURS_FLOAT = "calmclip INT8", "calmclip float"
ROWS = 4  # texts that the static rival's ranges are of
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 600,
}  # fmt: skip
FULL = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_669,
}  # fmt: skip
Run = Callable[[Array], Array]  # ids int64 [1, T] -> the vector [D]


@dataclass(frozen=True)
class Files:
    """``checkpoint``: the directory; ``bundles``: of the export; ``rivals``: ONNX files."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "qwen3"

    @property
    def bundles(self) -> Path:
        return self.folder / "bundles"

    @property
    def rivals(self) -> Path:
        return self.folder / "rivals"


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tiny", action="store_true", help="a tiny decoder")
    options.add_argument("--quick", action="store_true", help="without torch float and the static OpenVINO graph")
    options.add_argument("--out", type=Path, help="a folder that keeps all files; default: they are deleted")
    options.add_argument("--tokens", type=int, nargs="+", default=[16, 128])
    options.add_argument("--seconds", type=float, default=20.0, help="for each number of tokens")
    options.add_argument("--outliers", type=float, default=1.0, help="factor of a few channels (default 1: none)")
    options.add_argument("--step", choices=("checkpoint", "rivals", "measure"), help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    scratch = None if chosen.out else tempfile.TemporaryDirectory()
    files = Files(chosen.out or Path(scratch.name if scratch else ""))
    files.folder.mkdir(parents=True, exist_ok=True)
    try:
        if chosen.step:
            _step(chosen.step, files, chosen)
            return
        print(machine(1), end="\n\n")
        given = [
            "--out",
            str(files.folder),
            *(["--tiny"] if chosen.tiny else []),
            *(["--quick"] if chosen.quick else []),
            *("--outliers", str(chosen.outliers)),
        ]
        module = (sys.executable, "-m", "tests.bench.decoders")
        if not files.checkpoint.exists():
            run(*module, *given, "--step", "checkpoint")
        if not (files.folder / "export.json").exists():
            exported = run(
                sys.executable, "-m", "calmclip.models.cli", "export", str(files.checkpoint), "--name", "decoder",
                "--out", str(files.bundles), "--keep-float", "--replace",
            )  # fmt: skip
            facts = {"peak": exported.peak, "wall": exported.wall}
            (files.folder / "export.json").write_text(json.dumps(facts))
        if not files.rivals.exists():
            run(*module, *given, "--step", "rivals")
        measure = [*given, "--tokens", *map(str, chosen.tokens), "--seconds", str(chosen.seconds), "--step", "measure"]
        subprocess.run([*module, *measure], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        if scratch:
            scratch.cleanup()


def _step(step: str, files: Files, chosen: argparse.Namespace) -> None:
    if step == "checkpoint":
        checkpoint(files.checkpoint, TINY if chosen.tiny else FULL, chosen.outliers)
    elif step == "rivals":
        temporary = files.folder / "rivals.part"
        shutil.rmtree(temporary, ignore_errors=True)
        rivals(files.checkpoint, temporary, static=not chosen.quick)
        temporary.rename(files.rivals)
    else:
        table(files, chosen.tokens, chosen.seconds, quick=chosen.quick)


def checkpoint(folder: Path, shape: Mapping[str, int], outliers: float = 1.0) -> None:
    """Write a directory of transformers' Qwen3 with random weights, tensor by tensor."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from tests.tiny import save_tokenizer

    sizes: dict[str, Any] = dict(shape)
    config = transformers.Qwen3Config(
        **sizes, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
    )
    with torch.device("meta"):
        module = transformers.Qwen3Model(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in module.named_parameters():
        tensor = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim == 1:
            tensor = 1 + 0.1 * tensor
        else:
            tensor *= parameter.shape[1] ** -0.5
        if name.endswith(("embed_tokens.weight", "down_proj.weight")):  # a few channels of the residual stream
            columns = tensor if name.endswith("embed_tokens.weight") else tensor.T
            columns[:, : config.hidden_size // 128] *= outliers
        state[name] = tensor.to(torch.bfloat16)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)


def rivals(source: Path, folder: Path, static: bool = True) -> None:
    """Write the graphs of the other engines: float.onnx, dynamic.onnx, weights.onnx and, if ``static``, static.onnx."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from calmclip.export import pipeline
    from calmclip.export.checkpoints import Weights
    from calmclip.export.quantizers import QUANTIZERS
    from calmclip.export.trace import to_onnx

    folder.mkdir(parents=True)
    net = pipeline.load("decoder", str(source), Weights())
    model = to_onnx(net.towers["text"])
    if static:
        words = model_words(source)
        feeds = [feed(ids(64, words, seed)) for seed in range(1, 1 + ROWS)]
        quantizer = QUANTIZERS.get("static")
        params = quantizer.params()
        assert quantizer.observe is not None
        ranges = quantizer.observe(model, feeds, params)
        _save(quantizer.quantize(model, ranges, params), folder / "static.onnx")
    _save(dequantized(model), folder / "weights.onnx")
    _save(model, folder / "float.onnx")
    del model
    quantize_dynamic(
        folder / "float.onnx", folder / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True, op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
    )  # fmt: skip
    assert onnx.load(folder / "dynamic.onnx", load_external_data=False).graph.node


def dequantized(model: Any) -> Any:
    """The float graph whose matrices are int8 behind a DequantizeLinear, one scale for each column."""
    from calmclip.export.graph import Draft, matrices, node_of
    from calmclip.export.qdq import quantize_weight

    draft, nodes, done = Draft(model), [], set()
    chosen = {node.name for node in matrices(draft)}
    for original in draft.nodes:
        node = type(original)()
        node.CopyFrom(original)
        if node.name in chosen and node.op_type == "MatMul":
            name = node.input[1]
            if name not in done:
                integers, scales = quantize_weight(draft.array(name), 1)
                inputs = [draft.add(f"{name}_int8", integers), draft.add(f"{name}_scales", scales)]
                nodes.append(node_of("DequantizeLinear", inputs, f"{name}_back", axis=1))
                done.add(name)
            node.input[1] = f"{name}_back"
        nodes.append(node)
    draft.nodes = nodes
    return draft.finish()


def _save(model: Any, path: Path) -> None:
    import onnx

    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=4096)


def model_words(source: Path) -> int:
    return int(json.loads((source / "config.json").read_text())["vocab_size"])


def ids(tokens: int, words: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(3, words, (1, tokens))


def feed(rows: Array) -> dict[str, Array]:
    return {"ids": rows, "mask": np.ones_like(rows)}


def engines(files: Files, quick: bool) -> dict[str, Callable[[], Run]]:
    """Name -> what opens the engine, with one thread."""
    openvino = partial(_openvino, files.rivals)
    opening: dict[str, Callable[[], Run]] = {
        OURS: partial(_bundle, files, False),
        OURS_FLOAT: partial(_bundle, files, True),
        "ONNX Runtime float": partial(_onnxruntime, files.rivals / "float.onnx"),
        "ONNX Runtime dynamic INT8": partial(_onnxruntime, files.rivals / "dynamic.onnx"),
        "OpenVINO float": partial(openvino, "float.onnx"),
        "OpenVINO INT8 weights, dynamic": partial(openvino, "weights.onnx"),
        "OpenVINO INT8, static": partial(openvino, "static.onnx"),
        "torch float": partial(_torch, files.checkpoint, False),
        "torch dynamic INT8": partial(_torch, files.checkpoint, True),
    }
    slow = ("OpenVINO INT8, static", "torch float", "OpenVINO float") if quick else ()
    return {name: engine for name, engine in opening.items() if name not in slow}


def _bundle(files: Files, is_float: bool) -> Run:
    from calmclip.models.bundle.bundle import Bundle
    from calmclip.models.bundle.store import read
    from calmclip.models.runtime.session import Session, SessionOptions

    (folder,) = [path for path in files.bundles.iterdir() if path.is_dir() and path.name.endswith("-float") == is_float]
    graph = Bundle(read(folder)).manifest.graphs["text"]
    session = Session(folder / graph.file, graph, SessionOptions(threads=1))
    return lambda rows: np.asarray(session.run(feed(rows))["text_embeds"][0])


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda rows: np.asarray(session.run(None, feed(rows))[0][0])


def _openvino(folder: Path, file: str) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    if file == "weights.onnx":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(2**32 - 1)  # one scale for each row
    request = core.compile_model(core.read_model(folder / file), "CPU", settings).create_infer_request()

    def run_one(rows: Array) -> Array:
        request.infer(feed(rows), share_inputs=True)
        return np.array(request.get_output_tensor(0).data[0])

    return run_one


def _torch(source: Path, int8: bool) -> Run:
    import torch
    import transformers

    torch.set_num_threads(1)
    module = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    if int8:
        quantize: Any = torch.ao.quantization.quantize_dynamic
        module = quantize(module, {torch.nn.Linear}, dtype=torch.qint8)

    def run_one(rows: Array) -> Array:
        with torch.inference_mode():
            last = module(input_ids=torch.from_numpy(rows)).last_hidden_state[0, -1]
        return np.asarray(torch.nn.functional.normalize(last, dim=-1))

    return run_one


def table(files: Files, tokens: list[int], seconds: float, quick: bool) -> None:
    """Print the table; an engine that does not run the graph says so in its row."""
    opened: dict[str, Run] = {}
    failed: dict[str, str] = {}
    words = model_words(files.checkpoint)
    for name, engine in engines(files, quick).items():
        try:
            opened[name] = engine()
            opened[name](ids(5, words))
        except Exception as error:  # of any engine
            opened.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    truth = opened.get("torch float") or opened["ONNX Runtime float"]
    figures: dict[str, list[str]] = {name: [] for name in opened}
    for count in tokens:
        rows = ids(count, words)
        exact = truth(rows)
        calls = {name: partial(engine, rows) for name, engine in opened.items()}
        timed = alternate(calls, seconds=seconds, least=5, clock=process_time)
        for name, timing in timed.items():
            vector = opened[name](rows)
            cosine = float(vector @ exact / np.linalg.norm(vector) / np.linalg.norm(exact))
            ratio = timing.p50 / timed[OURS].p50
            figures[name] += [f"{timing.p50 * 1e3:.1f} ({ratio:.2f}x)", f"{cosine:.4f}"]
    print(f"| engine | {' | '.join(f'{count} tokens, ms | cosine' for count in tokens)} |")
    print("| --- " * (1 + 2 * len(tokens)) + "|")
    for name, cells in figures.items():
        print(f"| {name} | {' | '.join(cells)} |")
    for name, why in failed.items():
        print(f"\nNot measured: {name} ({why}).")
    exported = json.loads((files.folder / "export.json").read_text())
    folders = [path for path in files.bundles.iterdir() if path.is_dir()]
    sizes = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
    listed = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sorted(sizes.items()))
    print(f"\n{listed}; export: {exported['wall']:.0f} s, at most {exported['peak'] / 2**30:.2f} GiB resident.")


if __name__ == "__main__":
    main()
