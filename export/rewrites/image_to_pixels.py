"""`ai.calmclip.ImageToPixels` in front of an image tower: the graph takes a decoded picture of any size.

Source: the op is `calmclip.models.ops.spec.IMAGE_TO_PIXELS`; it does what the bundle's `ImagePreprocess` says.

The input `picture` uint8 [height, width, 3] replaces `pixels` float32 [B, 3, H, W]. One picture at a time: the pictures
of a batch would all need the same size.
"""

from typing import Any

from onnxscript import ir

from calmclip.export.matching import Outcome
from calmclip.export.matching.values import insert, new_value
from calmclip.export.rewrites import REWRITES, Rewrite, mismatch, tensor_names
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess, Tensor
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import IMAGE_TO_PIXELS
from calmclip.models.preprocess.image import normalisation

PICTURE = "picture"


class Params(FrozenModel):
    preprocess: ImagePreprocess


def inside(spec: ImagePreprocess) -> ImagePreprocess:
    """``spec`` for a graph that does all of it itself. Raises `BadRequest` if the op cannot do it."""
    if spec.resample == "gaussian":
        raise BadRequest(
            "the pictures of this net are resampled by a Gaussian, which ImageToPixels does not do; "
            "leave picture_input out of the recipe"
        )
    return spec.model_copy(update={"input": PICTURE, "in_graph": True})


def attributes(spec: ImagePreprocess) -> dict[str, Any]:
    """The op's attributes, which have the names of fields of ``spec``. ONNX has neither None nor booleans."""
    gain, bias = (tuple(map(float, channels.ravel())) for channels in normalisation(spec))
    fields = {name: getattr(spec, name) for name in IMAGE_TO_PIXELS.attributes if name not in ("gain", "bias")}
    values = {
        name: int(field or 0) if field is None or isinstance(field, bool) else field for name, field in fields.items()
    }
    return values | {"gain": gain, "bias": bias}


def rewrite(model: ir.Model, params: Params) -> Outcome:
    graph, spec = model.graph, params.preprocess
    if why := _unfit(graph, spec):
        return Outcome(0, {"the graph": why})
    (old,) = [value for value in graph.inputs if value.name == spec.input]
    picture = new_value(PICTURE, ir.DataType.UINT8, ("height", "width", 3))
    pixels = new_value(spec.input, ir.DataType.FLOAT, (1, 3, *spec.size))
    graph.inputs[graph.inputs.index(old)] = picture
    ir.convenience.replace_all_uses_with(old, pixels)
    insert(graph[0], IMAGE_TO_PIXELS, [picture], pixels, **attributes(spec))
    return Outcome(1, {})


def _unfit(graph: ir.Graph, spec: ImagePreprocess) -> str:
    inputs = {value.name: value for value in graph.inputs}
    if spec.input not in inputs:
        return f"it has no input {spec.input!r}; it takes {', '.join(map(str, inputs))}"
    if why := mismatch(inputs[spec.input], Tensor(dtype="float32", shape=("B", 3, *spec.size))):
        return f"its input {why}"
    if PICTURE in inputs.keys() | tensor_names(graph):
        return f"it has a tensor {PICTURE!r} already, and the new input needs that name"
    if inputs[spec.input].is_graph_output():
        return f"its input {spec.input!r} is also an output, which would be lost"
    return ""


REWRITES.register("image_to_pixels")(
    Rewrite(
        IMAGE_TO_PIXELS,
        rewrite,
        replaces=0,
        attaches=True,
        params=Params,
        attributes=lambda params: attributes(params.preprocess),
    )
)
