"""A user's ONNX graph of an image network -> the tower `guide`: pixels float32 [B, 3, H, W] -> patches float32
[B, h, w, C].

The network may answer tokens [B, T, C], those of patches last and row by row, or a map [B, C, h, w] or [B, h, w, C]. A
run on noise tells which. The weights stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, version_converter

from calmclip.export import light, parity
from calmclip.export.checkpoints.locate import one_line
from calmclip.export.graph import Draft, cut
from calmclip.export.nets import Tower, float32
from calmclip.export.trace import OPSET
from calmclip.models.bundle.manifest import GUIDE, ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array

Size = tuple[int, int]
Triple = tuple[float, float, float]
OUTPUTS = ("patches", "last_hidden_state")  # by which several outputs are told apart
EXTRA = 16  # most tokens before those of patches: a class token and registers
# name -> mean and standard deviation of pixels
NORMS: Mapping[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Layout:
    """How an answer becomes [B, *grid, channels]: the ``first`` tokens are dropped; ``channels_first``: of a map."""

    grid: Size
    channels: int
    first: int | None = None  # None: the answer is a map
    channels_first: bool = False


def guide(file: Path, norm: str, seen: ImagePreprocess, like: Tower) -> Tower:
    """``norm``: one of `NORMS`; ``seen``: how the graph `dense` sees a picture, of which the guide sees the same part;
    ``like``: a tower with the quantizer. Raises `BadRequest` for a graph that is none of these."""
    model = _read(file)
    size = _size(model, file, seen.size)
    output = _output(model, file)
    layout = _layout(_answer(model, file, size, output), size, file)
    mean, std = NORMS[norm]
    changes = {"input": "pixels", "size": size, "mean": mean, "std": std, "pad": round(255 * sum(mean) / 3)}
    return Tower.drawn(
        _finished(model, output, size, layout),
        {"pixels": float32("B", 3, *size)},
        {"patches": float32("B", *layout.grid, layout.channels)},
        ImagePreprocess.model_validate(seen.model_dump() | changes),
        quantizer=like.quantizer,
        quantizer_params=like.quantizer_params,
    )


def _read(file: Path) -> onnx.ModelProto:
    """The graph in our opset, with names for all its nodes. Raises `BadRequest`."""
    try:
        model = onnx.load(file)
        light.check(model)
        versions = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
        if versions.get("ai.onnx") != OPSET:
            model = version_converter.convert_version(model, OPSET)
    except Exception as error:  # protobuf, the checker and the converter raise types of their own
        raise BadRequest(
            f"--guide {file}: it is no ONNX graph that is read here: {one_line(error)}; export the network again with "
            f"opset {OPSET}"
        ) from None
    if other := sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"}):
        raise BadRequest(f"--guide {file}: it has operators of {other[0]}; expected those of ai.onnx alone")
    for place, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{place}"
    return model


def _size(model: onnx.ModelProto, file: Path, size: Size) -> Size:
    """Rows and columns of the pixels that the graph takes; ``size`` if it takes any. Raises `BadRequest`."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    kinds = [value.type.tensor_type for value in inputs]
    shapes = [[dim.dim_value or None for dim in kind.shape.dim] for kind in kinds]
    if len(inputs) != 1 or kinds[0].elem_type != TensorProto.FLOAT or len(shapes[0]) != 4 or shapes[0][1] != 3:
        names = ", ".join(f"{value.name} {shape}" for value, shape in zip(inputs, shapes, strict=True)) or "none"
        raise BadRequest(f"--guide {file}: its inputs are {names}; expected pixels alone, float32 [any, 3, H, W]")
    if shapes[0][0] is not None:
        raise BadRequest(
            f"--guide {file}: it takes exactly {shapes[0][0]} pictures; export it with a dynamic first dimension"
        )
    rows, columns = (given or side for given, side in zip(shapes[0][2:], size, strict=True))
    if rows * size[1] != columns * size[0]:
        raise BadRequest(
            f"--guide {file}: it takes {rows} x {columns} pixels, which is another shape than {size[0]} x {size[1]}, "
            "those of the image tower"
        )
    return rows, columns


def _output(model: onnx.ModelProto, file: Path) -> str:
    """Raises `BadRequest`."""
    names = [value.name for value in model.graph.output]
    known = names if len(names) == 1 else [name for name in OUTPUTS if name in names]
    if not known:
        raise BadRequest(f"--guide {file}: its outputs are {names}; expected one, or one called {' or '.join(OUTPUTS)}")
    return known[0]


def _answer(model: onnx.ModelProto, file: Path, size: Size, output: str) -> Array:
    """To noise of two pictures. Raises `BadRequest`."""
    noise = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    try:
        part = cut(model, [output])
        answer: Array = parity.onnx_run(part)({part.graph.input[0].name: noise})[output]
    except Exception as error:  # the types of ONNX Runtime's errors are not public
        raise BadRequest(f"--guide {file}: it does not run on {[*noise.shape]}: {one_line(error)}") from None
    if answer.dtype != np.float32 or answer.ndim not in (3, 4) or len(answer) != 2:
        raise BadRequest(
            f"--guide {file}: its output {output} is {answer.dtype} {[*answer.shape]} for two pictures; expected "
            "float32 tokens [2, T, C] or a map [2, C, h, w]"
        )
    return answer


def _layout(answer: Array, size: Size, file: Path) -> Layout:
    """Raises `BadRequest`."""
    shape = answer.shape[1:]
    if len(shape) == 2:
        tokens, channels = shape
        grids = [(rows, rows * size[1] // size[0]) for rows in range(1, tokens + 1) if rows * size[1] % size[0] == 0]
        fitting = [grid for grid in grids if grid[0] * grid[1] <= tokens]
        grid = fitting[-1] if fitting else (0, 0)
        if not 0 <= (first := tokens - grid[0] * grid[1]) <= EXTRA:
            raise BadRequest(
                f"--guide {file}: {tokens} tokens of {size[0]} x {size[1]} pixels are no grid of that shape with at "
                f"most {EXTRA} tokens before it"
            )
        return Layout(grid, channels, first)
    maps = [((shape[1], shape[2]), shape[0], True), ((shape[0], shape[1]), shape[2], False)]
    layouts = [Layout(grid, channels, None, turned) for grid, channels, turned in maps]
    fits = [layout for layout in layouts if layout.grid[0] * size[1] == layout.grid[1] * size[0]]
    if len(fits) != 1:
        raise BadRequest(
            f"--guide {file}: a map {[*shape]} of {size[0]} x {size[1]} pixels; expected exactly one of [C, h, w] and "
            "[h, w, C] to have the shape of the picture"
        )
    return fits[0]


def _finished(model: onnx.ModelProto, output: str, size: Size, layout: Layout) -> onnx.ModelProto:
    """``model`` with the input `pixels` and the output `patches` alone."""
    part = cut(model, [output])
    source, names = part.graph.input[0].name, {part.graph.input[0].name: "pixels"}
    names |= {name: f"{GUIDE}.{name}" for name in ("pixels", "patches") if name != source}
    for node in part.graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
    for tensor in part.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    shape: list[int | str | None] = ["B", *layout.grid, layout.channels]
    pixels: list[int | str | None] = ["B", 3, *size]
    for values, name, dims in ((part.graph.input, "pixels", pixels), (part.graph.output, "patches", shape)):
        del values[:]
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    del part.graph.value_info[:]  # they may be of another size
    draft = Draft(part)
    draft.nodes += _shaped(draft, names.get(output, output), layout)
    return draft.finish()


def _shaped(draft: Draft, answer: str, layout: Layout) -> list[onnx.NodeProto]:
    """The nodes from the network's answer to `patches`."""
    if layout.first is None:
        order = (0, 2, 3, 1) if layout.channels_first else (0, 1, 2, 3)
        return [helper.make_node("Transpose", [answer], ["patches"], name=f"{GUIDE}.Transpose", perm=order)]
    bounds = (("first", layout.first), ("end", np.iinfo(np.int64).max), ("axis", 1))
    slices = [draft.add(f"{GUIDE}.{name}", np.array([value], np.int64)) for name, value in bounds]
    shape = draft.add(f"{GUIDE}.shape", np.array([0, *layout.grid, layout.channels], np.int64))
    rows = f"{GUIDE}.rows"
    return [
        helper.make_node("Slice", [answer, *slices], [rows], name=f"{GUIDE}.Slice"),
        helper.make_node("Reshape", [rows, shape], ["patches"], name=f"{GUIDE}.Reshape"),
    ]
