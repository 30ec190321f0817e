"""`ai.calmclip.ImageToPixels` in front of an image tower: the graph takes a decoded picture of any size.

Source: the op is `calmclip.models.ops.spec.IMAGE_TO_PIXELS`; what it does is the bundle's `ImagePreprocess`.

The input `pixels` float32 [B, 3, H, W] gives way to `picture` uint8 [height, width, 3]. One picture at a time: those of
a batch would all have one size.
"""

from typing import Any

from onnxscript import ir

from calmclip.export.functions.image_to_pixels import image_to_pixels
from calmclip.export.rewrites import REWRITES, Outcome, Rewrite, inner
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess, fits
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import DOMAIN, IMAGE_TO_PIXELS, VERSION
from calmclip.models.preprocess.image import normalisation

PICTURE = "picture"


class Params(FrozenModel):
    preprocess: ImagePreprocess


def inside(spec: ImagePreprocess) -> ImagePreprocess:
    """``spec`` of a graph that does all of it itself. Raises `BadRequest` for what the op does not do."""
    if spec.resample == "gaussian":
        raise BadRequest(
            "the pictures of this net are resampled by a Gaussian, which ImageToPixels does not do; "
            "leave picture_input out of the recipe"
        )
    return spec.model_copy(update={"input": PICTURE, "in_graph": True})


def attributes(spec: ImagePreprocess) -> dict[str, Any]:
    """The op's attributes, by name those of ``spec``; ONNX has no None and no booleans."""
    gain, bias = (tuple(map(float, three.ravel())) for three in normalisation(spec))
    found = {name: getattr(spec, name) for name in IMAGE_TO_PIXELS.attributes if name not in ("gain", "bias")}
    whole = {
        name: int(value or 0) if value is None or isinstance(value, bool) else value for name, value in found.items()
    }
    return whole | {"gain": gain, "bias": bias}


def rewrite(model: ir.Model, params: Params) -> Outcome:
    graph, spec = model.graph, params.preprocess
    if why := _unfit(graph, spec):
        return Outcome(0, {"the graph": why})
    (before,) = [value for value in graph.inputs if value.name == spec.input]
    picture = ir.Value(name=PICTURE, shape=ir.Shape(("height", "width", 3)), type=ir.TensorType(ir.DataType.UINT8))
    pixels = ir.Value(name=spec.input, shape=ir.Shape((1, 3, *spec.size)), type=before.type)
    settings = [ir.convenience.convert_attribute(name, value) for name, value in attributes(spec).items()]
    name = f"{IMAGE_TO_PIXELS.name}.{spec.input}"
    node = ir.Node(DOMAIN, IMAGE_TO_PIXELS.name, [picture], settings, outputs=[pixels], version=VERSION, name=name)
    graph.inputs[graph.inputs.index(before)] = picture
    ir.convenience.replace_all_uses_with(before, pixels)
    graph.insert_before(graph[0], node)
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    return Outcome(1, {})


def _unfit(graph: ir.Graph, spec: ImagePreprocess) -> str:
    found = {value.name: value for value in graph.inputs}
    if spec.input not in found:
        return f"it has no input {spec.input!r}; it takes {', '.join(map(str, found))}"
    value, expected = found[spec.input], ("B", 3, *spec.size)
    shape = () if value.shape is None else tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    if value.dtype != ir.DataType.FLOAT or not fits(shape, expected):
        return f"its input {spec.input!r} is {value.dtype} {list(shape)}; expected float32 {list(expected)}"
    if PICTURE in found.keys() | inner(graph):
        return f"it has a tensor {PICTURE!r} already, which is what the new input is called"
    if value.is_graph_output():
        return f"its input {spec.input!r} is an output too, which would be gone"
    return ""


REWRITES.register("image_to_pixels")(
    Rewrite(
        IMAGE_TO_PIXELS,
        lambda params: image_to_pixels(**attributes(params.preprocess)),
        rewrite,
        replaces=0,
        attaches=True,
        params=Params,
    )
)
