"""The towers of `tests.bench.rivals`: their weights, their inputs, and the file that each engine reads.

The folder of a tower holds `ours.onnx` with `graph.json`; `float.onnx`, `dynamic.onnx` and `static.onnx`; `float.xml`
and `int8.xml` of OpenVINO; `inputs.npz`, the measured inputs of all engines; `float.npy`, torch's outputs for them; and
`about.json`: multiply-accumulates, and the reason for each missing file.

Weights are random except those of the built-in model. One half of the shipped photographs and texts is for calibration,
the other half is measured; all engines get the same.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn

from calmclip.export import calibrate, nets, rewrites, samples
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.recipe import recognise
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Graph, TextPreprocess
from calmclip.models.flow import Array, Arrays
from calmclip.models.preprocess.text import TextPreparer
from tests.bench import checkpoints

ROWS = 8  # measured inputs, and calibration inputs
CROPS = 48  # calibration inputs of convolutional towers
Load = Callable[[Path, str], nn.Module]  # checkpoint, name of an attention of transformers -> module: inputs to vectors


@dataclass(frozen=True)
class Tower:
    """``libraries``: name -> its torch module of these weights, or the reason why it has none; other engines export the
    first module. ``tokens``: of each text, without padding; ``context``: the padded length in the rivals' graphs."""

    title: str
    checkpoint: str
    role: str
    libraries: Mapping[str, Load | str]
    tokens: int = 0
    context: int = 0
    convolutional: bool = False
    ours: Callable[[nets.Tower], nets.Tower] = lambda tower: tower
    note: str = ""

    @property
    def source(self) -> tuple[str, Load]:
        return next((name, load) for name, load in self.libraries.items() if not isinstance(load, str))


class Embeds(nn.Module):
    """The model of a library; ``call`` picks the vectors from its outputs."""

    def __init__(self, model: nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self.model, *inputs)


def _transformers(kind: str, call: Callable[..., torch.Tensor], checkpoint: Path, attention: str) -> nn.Module:
    import transformers

    return Embeds(getattr(transformers, kind).from_pretrained(checkpoint, attn_implementation=attention).eval(), call)


def _open_clip(name: str, role: str, checkpoint: Path, attention: str) -> nn.Module:
    """open_clip's tower of an open_clip checkpoint, or of a Hugging Face one whose tensors get open_clip's names."""
    import open_clip
    from safetensors.torch import load_file

    model = open_clip.create_model(name, pretrained=None)
    file = checkpoint / "open_clip_model.safetensors"
    state = load_file(file) if file.exists() else _as_open_clip(load_file(checkpoint / "model.safetensors"))
    tower = {name: tensor for name, tensor in state.items() if (role == "image") == name.startswith("visual.")}
    if unknown := model.load_state_dict(tower, strict=False).unexpected_keys:
        raise ValueError(f"open_clip's {name} has no tensor {unknown[0]}; add its name to _NAMES")
    if file.exists():  # a timm tower with branches; its authors fold them before they run it
        from timm.utils.model import reparameterize_model

        model = reparameterize_model(model.eval())
    call = (lambda model, x: model.encode_image(x)) if role == "image" else (lambda model, x: model.encode_text(x))
    _drop(model, "text" if role == "image" else "visual")
    return Embeds(model.eval(), call)


def _drop(model: nn.Module, part: str) -> None:
    """Delete the tower that is not measured, because its memory would count."""
    for name in ("transformer", "token_embedding") if part == "text" else ("visual",):
        if hasattr(model, name):
            delattr(model, name)


_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def _as_open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for old, tensor in state.items():
        name = old
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if ".self_attn.q_proj." in name:
            parts = [state[old.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
        elif name in ("visual_projection.weight", "text_projection.weight"):
            renamed["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        elif ".self_attn." not in name:
            renamed[name] = tensor
    return renamed


def _bert(checkpoint: Path, attention: str) -> nn.Module:
    """all-MiniLM-L6-v2 as transformers' BertModel, with the mean of its tokens' states."""
    import transformers

    from calmclip.export.nets.mini import facts, modules
    from calmclip.export.nets.mini.weights import minilm_state

    sizes = {"num_hidden_layers": facts.LAYERS, "hidden_size": facts.WIDTH, "intermediate_size": facts.INNER}
    more: dict[str, Any] = {"num_attention_heads": facts.HEADS, "attn_implementation": attention}
    model: Any = transformers.BertModel(transformers.BertConfig(**sizes | more), add_pooling_layer=False)
    model.load_state_dict(modules.tensors(minilm_state()), strict=False)
    return Embeds(model.eval(), _mean)


def _mean(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _mini(role: str) -> Any:
    from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, modules

    return getattr(modules.load(SHIPPED, DETECTOR, MASKS), role)


def _mini_text(checkpoint: Path, attention: str) -> Any:
    tower = _mini("text")
    tower.encoder = _bert(checkpoint, attention)
    return tower


def _mini_image(checkpoint: Path, attention: str) -> Any:
    return _mini("image")


_CLIP_IMAGE = partial(
    _transformers, "CLIPVisionModelWithProjection", lambda model, x: model(pixel_values=x).image_embeds
)
_CLIP_TEXT = partial(_transformers, "CLIPTextModelWithProjection", lambda model, x: model(input_ids=x).text_embeds)
_SIGLIP = partial(_transformers, "SiglipVisionModel", lambda model, x: model(pixel_values=x).pooler_output)

CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "ViT-B-32": checkpoints.hugging_face_clip,
    "ViT-B-16": partial(checkpoints.hugging_face_clip, patch_size=16),
    "ViT-L-14": partial(
        checkpoints.hugging_face_clip, width=768, patch_size=14,
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    ),
    "SigLIP-B-16": checkpoints.siglip_b_16,
    "MobileCLIP-S2": checkpoints.mobileclip_s2,
}  # fmt: skip


def _clip_image(name: str, title: str) -> Tower:
    return Tower(
        title, name, "image",
        {"transformers": _CLIP_IMAGE, "open_clip": partial(_open_clip, f"{name}-quickgelu", "image")},
    )  # fmt: skip


def _clip_text(tokens: int, context: int, note: str = "") -> Tower:
    title = f"CLIP ViT-B/32 text, {tokens} tokens" + (f", rivals' graphs of {context}" if context > tokens else "")
    libraries: dict[str, Load | str] = {"transformers": _CLIP_TEXT}
    libraries["open_clip"] = (
        partial(_open_clip, "ViT-B-32-quickgelu", "text") if context == 77 else "its text tower takes 77 tokens"
    )
    return Tower(title, "ViT-B-32", "text", libraries, tokens, context, note=note)


def _encoder(tower: nets.Tower) -> nets.Tower:
    return replace(tower, module=_mini("text").encoder, graph=None, promises={})


_NO_MODULE = "it has no module of these weights"
_EXACT = (
    "The mask is causal, so 16 tokens say all that 77 with padding say; calmclip's one graph takes either. The bound "
    "is of 77."
)

TOWERS: dict[str, Tower] = {
    "b32": _clip_image("ViT-B-32", "CLIP ViT-B/32 image"),
    "b16": _clip_image("ViT-B-16", "CLIP ViT-B/16 image"),
    "l14": _clip_image("ViT-L-14", "CLIP ViT-L/14 image"),
    "text77": _clip_text(77, 77),
    "text16-of-77": _clip_text(16, 77, _EXACT),
    "text16": _clip_text(16, 16, "The rivals' graphs were exported for 16 tokens alone."),
    "siglip": Tower(
        "SigLIP-B/16 image", "SigLIP-B-16", "image",
        {"transformers": _SIGLIP, "open_clip": "its SigLIP is timm's, which names and shapes its weights otherwise"},
    ),
    "mobileclip": Tower(
        "MobileCLIP-S2 image", "MobileCLIP-S2", "image",
        {"transformers": _NO_MODULE, "open_clip": partial(_open_clip, "MobileCLIP-S2", "image")}, convolutional=True,
    ),
    "minilm": Tower(
        "MiniLM sentence, 32 tokens", "mini", "text", {"transformers": _bert, "open_clip": _NO_MODULE}, 32, 32,
        ours=_encoder,
    ),
    "mini-image": Tower(
        "mini image", "mini", "image",
        {"transformers": _NO_MODULE, "open_clip": _NO_MODULE, "calmclip's module": _mini_image}, convolutional=True,
    ),
    "mini-text": Tower(
        "mini text, 16 tokens", "mini", "text", {"transformers": _mini_text, "open_clip": _NO_MODULE}, 16, 16
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Inputs:
    """The rows of each input: ``ours`` by name, ``theirs`` in the order of the library's module."""

    ours: Arrays
    theirs: tuple[Array, ...]

    @classmethod
    def read(cls, folder: Path) -> "Inputs":
        with np.load(folder / "inputs.npz") as arrays:
            ours = {name.removeprefix("ours "): arrays[name] for name in arrays.files if name.startswith("ours ")}
            return cls(ours, tuple(arrays[name] for name in sorted(arrays.files) if name.startswith("theirs ")))

    def rows(self, first: int, count: int) -> "Inputs":
        """``count`` rows from ``first`` on; the first row follows the last one."""

        def take(rows: Array) -> Array:
            return np.ascontiguousarray(rows.take(range(first, first + count), axis=0, mode="wrap"))

        return Inputs({name: take(rows) for name, rows in self.ours.items()}, tuple(map(take, self.theirs)))

    def write(self, folder: Path) -> None:
        arrays: dict[str, Any] = {f"ours {name}": rows for name, rows in self.ours.items()}
        np.savez(folder / "inputs.npz", **arrays | {f"theirs {at}": rows for at, rows in enumerate(self.theirs)})


def checkpoint_of(tower: Tower, out: Path) -> Path:
    return out / "checkpoints" / tower.checkpoint


def prepare(key: str, out: Path) -> None:
    """Write the files of a tower into ``out`` / ``key``, unless they exist."""
    tower, folder = TOWERS[key], out / key
    checkpoint = checkpoint_of(tower, out)
    if tower.checkpoint in CHECKPOINTS and not checkpoint.exists():
        torch.manual_seed(0)
        checkpoint.mkdir(parents=True)
        CHECKPOINTS[tower.checkpoint](checkpoint)
    if (folder / "about.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    measured, calibration = _inputs(tower, checkpoint)
    measured.write(folder)
    _export_ours(tower, checkpoint, calibration, folder)
    library, load = tower.source
    module = load(checkpoint, "eager")
    about: dict[str, Any] = {"library": library, "missing": {}}
    with torch.no_grad():
        rows = [torch.from_numpy(part) for part in measured.theirs]
        np.save(folder / "float.npy", module(*rows).numpy())
        about["macs"] = _macs(module, [part[:1] for part in rows])
    for file, make in FILES.items():
        print(f"{key}: {file}", flush=True)
        try:
            make(Source(tower, checkpoint, module, calibration, folder))
        except Exception as error:  # the report states the reason
            about["missing"][file] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    (folder / "about.json").write_text(json.dumps(about))


@dataclass(frozen=True)
class Source:
    """The inputs for a rival's file."""

    tower: Tower
    checkpoint: Path
    module: nn.Module
    calibration: Inputs
    folder: Path

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(f"input_{at}" for at in range(len(self.calibration.theirs)))

    @property
    def rows(self) -> list[tuple[Array, ...]]:
        """The calibration inputs, each with batch 1."""
        parts = self.calibration.theirs
        return [tuple(part[at : at + 1] for part in parts) for at in range(len(parts[0]))]


def _float_onnx(source: Source) -> None:
    """Export the library's module by torch, with a fixed length and any batch size.

    The old exporter is first. It is wrong for some modules, such as those with a floor division of negative numbers.
    """
    rows = [torch.from_numpy(part) for part in source.rows[0]]
    with torch.no_grad():
        expected = source.module(*rows).numpy()
    variants: tuple[dict[str, Any], ...] = (
        {"dynamo": False, "dynamic_axes": {name: {0: "B"} for name in (*source.inputs, "embeds")}, "opset_version": 17},
        {"dynamo": True, "dynamic_shapes": tuple({0: torch.export.Dim("B")} for _ in rows), "external_data": False},
    )
    for options in variants:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporters
            torch.onnx.export(
                source.module, tuple(rows), str(source.folder / "float.onnx"), input_names=list(source.inputs),
                output_names=["embeds"], **options,
            )  # fmt: skip
        session = onnxruntime.InferenceSession(source.folder / "float.onnx", providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, dict(zip(source.inputs, source.rows[0], strict=True)))
        if np.allclose(outputs, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max()):
            return
    (source.folder / "float.onnx").unlink()
    raise ValueError("the graphs of torch's exporters differ from the module")


def _dynamic_onnx(source: Source) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source.folder / "float.onnx", source.folder / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
    )  # fmt: skip


def _static_onnx(source: Source) -> None:
    """Unsigned activations, signed weights with a scale per output channel; signed activations are slower."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(source.rows)

        def get_next(self) -> Arrays | None:
            row = next(self.rows, None)
            return None if row is None else dict(zip(source.inputs, row, strict=True))

    quantize_static(
        source.folder / "float.onnx", source.folder / "static.onnx", Reader(), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=None if source.tower.convolutional else ["MatMul", "Gemm", "Conv"],
    )  # fmt: skip


def _float_xml(source: Source) -> None:
    """OpenVINO's own converter; its graph is no slower than one converted from ONNX."""
    import openvino

    _, load = source.tower.source
    module = load(source.checkpoint, "sdpa")
    model = openvino.convert_model(module, example_input=tuple(torch.from_numpy(part) for part in source.rows[0]))
    openvino.save_model(model, source.folder / "float.xml", compress_to_fp16=False)


def _int8_xml(source: Source) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(source.folder / "float.xml")
    quantized = nncf.quantize(
        model, nncf.Dataset(source.rows), preset=nncf.QuantizationPreset.MIXED, subset_size=len(source.rows),
        model_type=None if source.tower.convolutional else nncf.ModelType.TRANSFORMER,
    )  # fmt: skip
    openvino.save_model(quantized, source.folder / "int8.xml", compress_to_fp16=False)


FILES: dict[str, Callable[[Source], None]] = {
    "float.onnx": _float_onnx,
    "dynamic.onnx": _dynamic_onnx,
    "static.onnx": _static_onnx,
    "float.xml": _float_xml,
    "int8.xml": _int8_xml,
}


@cache
def _net(checkpoint: str) -> nets.Net:
    _, plugin = recognise(checkpoint)
    return plugin.load(checkpoint)


def _ours(tower: Tower, checkpoint: Path) -> tuple[nets.Net, nets.Tower]:
    net = _net("mini" if tower.checkpoint == "mini" else str(checkpoint))
    return net, tower.ours(net.towers[tower.role])


def _export_ours(tower: Tower, checkpoint: Path, calibration: Inputs, folder: Path) -> None:
    """Export the tower as `export.pipeline` does, by the quantizer `fast`, which checks no accuracy."""
    import onnx

    _, ours = _ours(tower, checkpoint)
    model, quantizer = ours.graph or to_onnx(ours), QUANTIZERS.get("fast")
    count = len(calibration.theirs[0])
    feeds = [{name: rows[at : at + 1] for name, rows in calibration.ours.items()} for at in range(count)]
    params = quantizer.params(channels=tower.convolutional)
    assert quantizer.observe is not None
    quantized = quantizer.quantize(model, quantizer.observe(model, feeds, params), params)
    onnx.save(rewrites.apply(quantized, rewrites.swaps()).model, folder / "ours.onnx")
    graph = Graph(file="ours.onnx", inputs=ours.inputs, outputs=ours.outputs, batch=True)
    (folder / "graph.json").write_text(graph.model_dump_json())


def _inputs(tower: Tower, checkpoint: Path) -> tuple[Inputs, Inputs]:
    """-> the measured inputs and the calibration inputs."""
    net, ours = _ours(tower, checkpoint)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file, data in net.files.items():
            (directory / file).write_bytes(data)
        if tower.tokens:
            return _texts(tower, ours, directory, 0), _texts(tower, ours, directory, 1)
        measured, others = samples.pictures()[::2], samples.pictures()[1::2]
        if tower.convolutional:
            return _pictures(ours, directory, measured, ROWS), _pictures(
                ours, directory, _crops(others, directory), CROPS
            )
        return _pictures(ours, directory, measured, ROWS), _pictures(ours, directory, others, ROWS)


def _pictures(ours: nets.Tower, directory: Path, pictures: Sequence[Path], count: int) -> Inputs:
    """``count`` prepared pictures; repeats them if there are fewer."""
    rows = [feed for feed in calibrate.feeds(ours, directory, pictures, [])]
    (name,) = ours.inputs
    pixels = np.concatenate([rows[at % len(rows)][name] for at in range(count)])
    return Inputs({name: pixels}, (pixels,))


def _crops(pictures: Sequence[Path], directory: Path) -> list[Path]:
    """`CROPS` random crops of ``pictures``: ranges of convolutions need many inputs."""
    draw, crops = np.random.default_rng(0), []
    for at in range(CROPS):
        with Image.open(pictures[at % len(pictures)]) as picture:
            side = draw.uniform(0.4, 1.0) * np.array(picture.size)
            x, y = draw.uniform(0, picture.size - side)
            crop = picture.convert("RGB").crop((int(x), int(y), int(x + side[0]), int(y + side[1])))
        crops.append(directory / f"crop-{at}.png")
        crop.save(crops[-1])
    return crops


def _texts(tower: Tower, ours: nets.Tower, directory: Path, parity: int) -> Inputs:
    """Sections of the shipped texts, joined, with the tower's number of tokens; every second one, from ``parity``."""
    assert isinstance(ours.preprocess, TextPreprocess)
    preparer = TextPreparer(ours.preprocess, directory)
    prepared = [preparer.prepare([text]) for text in samples.texts()]
    sentences = [ids[0][mask[0] > 0] for ids, mask in map(_ids_and_mask, prepared)]
    stream = np.concatenate([ids[1:-1] for ids in sentences])
    first, last = sentences[0][0], sentences[0][-1]
    inside = tower.tokens - 2
    starts = [(2 * row + parity) * (inside + 5) for row in range(ROWS)]
    ids = np.stack([
        np.concatenate([[first], stream.take(np.arange(start, start + inside), mode="wrap"), [last]])
        for start in starts
    ]).astype(np.int64)  # fmt: skip
    padded = np.concatenate([ids, np.full((ROWS, tower.context - tower.tokens), last, np.int64)], axis=1)
    if len(ours.inputs) == 1:
        return Inputs(dict(zip(ours.inputs, [ids], strict=True)), (padded,))
    mask = np.ones_like(ids)
    return Inputs(dict(zip(ours.inputs, [ids, mask], strict=True)), (ids, mask))


def _ids_and_mask(feed: Arrays) -> tuple[Array, Array]:
    """Ids and mask of a text; a tower without a mask gets one that ends with the text's end token."""
    ids = next(iter(feed.values()))
    if len(feed) > 1:
        return ids, list(feed.values())[1]
    end = np.argmax(ids == ids.max(axis=1, keepdims=True), axis=1)  # CLIP's end token has the largest id
    return ids, (np.arange(ids.shape[1])[None] <= end[:, None]).astype(np.int64)


def _macs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]))
