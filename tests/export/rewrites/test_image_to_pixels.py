"""ImageToPixels attached: the graph on pictures against the original graph on pixels from Pillow."""

import re

import numpy as np
import onnx
import pytest
from onnx import parser
from PIL import Image

from calmclip.export import rewrites
from calmclip.export.functions import alone
from calmclip.export.parity import onnx_run
from calmclip.export.rewrites.image_to_pixels import attributes, inside
from calmclip.models.bundle.manifest import ImagePreprocess, Tensor
from calmclip.models.ops.library import find
from calmclip.models.ops.spec import DOMAIN, IMAGE_TO_PIXELS
from calmclip.models.preprocess.image import ImagePreparer

RULE = ["image_to_pixels"]
CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


MEANS = "sum = ReduceMean <keepdims = 0> (pixels, axes) y = Neg (sum)"


def tower(inputs="float[b, 3, 24, 20] pixels", body=MEANS):
    """The negative mean of each channel. Two nodes read the pixels."""
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (float[b, 3] y, float[b, 3, 24, 20] z)
        <int64[2] axes = {{2, 3}}> {{ {body} z = Identity (pixels) }}
    """)


def spec(**change):
    return ImagePreprocess(**{"size": (24, 20), "shortest": 30, **CLIP, **change})


def attach(model, preprocess):
    return rewrites.apply(model, RULE, {"image_to_pixels": {"preprocess": preprocess}})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_offset": "floor", "resample": "bilinear"},
        {"keep_square": True},
        {"resize": "exact", "shortest": None},
        {"resize": "letterbox", "shortest": None, "pad": 127},
    ],
)
def test_pictures_of_any_size_give_the_answers_of_prepared_pixels(change):
    done = attach(tower(), spec(**change))
    assert done.counts == {"image_to_pixels": 1}
    before, after = onnx_run(tower()), onnx_run(done.model)
    for height, width in ((48, 64), (101, 33), (40, 40), (7, 9)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        prepared = ImagePreparer(spec(**change)).prepare(Image.fromarray(pixels))[0]
        expected, answer = before({"pixels": prepared}), after({"picture": pixels})
        grey = 1 / 255 / min(CLIP["std"])  # one grey level
        assert np.abs(answer["z"] - expected["z"]).max() <= grey * 1.01
        np.testing.assert_allclose(answer["y"], expected["y"], atol=0.1 * grey)


def test_only_the_input_changes():
    before, after = tower(), attach(tower(), spec()).model
    assert [(v.name, v.type.tensor_type.elem_type) for v in after.graph.input] == [("picture", onnx.TensorProto.UINT8)]
    assert after.graph.output == before.graph.output
    assert [n.op_type for n in after.graph.node] == ["ImageToPixels", *(n.op_type for n in before.graph.node)]
    assert after.graph.node[0].output == ["pixels"]
    onnx.checker.check_model(after, full_check=True)


def test_the_node_says_how_pictures_are_prepared():
    (node,) = [n for n in attach(tower(), spec(keep_square=True)).model.graph.node if n.domain == DOMAIN]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes.keys() == IMAGE_TO_PIXELS.attributes.keys()
    assert (attributes["size"], attributes["shortest"], attributes["keep_square"], attributes["resize"]) == (
        [24, 20],
        30,
        1,
        b"shortest",
    )
    assert attributes["gain"] == pytest.approx(1 / (255 * np.array(CLIP["std"])))
    assert attributes["bias"] == pytest.approx(-np.array(CLIP["mean"]) / CLIP["std"])
    letterbox = spec(resize="letterbox", shortest=None)
    (node,) = [n for n in attach(tower(), letterbox).model.graph.node if n.domain == DOMAIN]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["shortest"] == 0


@pytest.mark.parametrize(
    ("model", "preprocess", "why"),
    [
        (tower(), spec(input="image"), "it has no input 'image'; it takes pixels"),
        (tower(), spec(size=(24, 24)), r"its input pixels is FLOAT .* expected float32 \['B', 3, 24, 24\]"),
        (tower("float[b, 3, 24, 20] pixels, float picture"), spec(), "it has a tensor 'picture' already"),
        (tower(body=MEANS.replace("sum", "picture")), spec(), "it has a tensor 'picture' already"),
        (
            parser.parse_model(
                '<ir_version: 10, opset_import: ["": 20]> g (float[b, 3, 24, 20] pixels) => '
                "(float[b, 3, 24, 20] pixels, float[b, 3, 24, 20] y) { y = Relu (pixels) }"
            ),
            spec(),
            "its input 'pixels' is also an output",
        ),
        (
            tower(
                "float16[b, 3, 24, 20] half",
                "pixels = Cast <to = 1> (half) y = ReduceMean <keepdims = 0> (pixels, axes)",
            ),
            spec(input="half"),
            "its input half is FLOAT16",
        ),
    ],
)
def test_a_graph_with_another_input_does_not_change_and_the_report_says_why(model, preprocess, why):
    done = attach(model, preprocess)
    assert done.counts == {"image_to_pixels": 0}
    assert done.model == model
    assert re.search(why, done.missed["image_to_pixels"]["the graph"])


def test_the_service_feeds_the_picture_unchanged_with_the_same_frame():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    prepared, frame = ImagePreparer(inside(spec())).prepare(picture)
    assert (prepared.dtype, prepared.shape) == (np.uint8, (48, 64, 3))
    np.testing.assert_array_equal(prepared, np.asarray(picture))
    assert frame == ImagePreparer(spec()).prepare(picture)[1]
    assert inside(spec()).feeds() == {"picture": ("uint8", ("height", "width", 3))}


def test_a_node_computes_the_same_bits_as_the_service(photographs):
    """0.48 / 0.27 differs between float64 and float32 in the last bit, which changes INT8 answers."""
    for how in (spec(), spec(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)):
        pixels = {"pixels": Tensor(dtype="float32", shape=(1, 3, *how.size))}
        model = alone(IMAGE_TO_PIXELS, IMAGE_TO_PIXELS.inputs, pixels, attributes(how))
        for library in (None, find()):
            for name in ("cat", "rocket"):
                with Image.open(photographs[name]) as picture:
                    prepared, _ = ImagePreparer(how).prepare(picture)
                    (output,) = onnx_run(model, library=library)({"image": np.asarray(picture)}).values()
                assert np.array_equal(output, prepared), (name, library)
