"""raw checks its feeds against the manifest before the graph runs."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Tensor
from calmclip.models.errors import BadRequest, ImageTooLarge, TaskNotServed, TextTooLong
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.tasks.raw import RawRequest, raw


def run(bundle: Bundle, graph: str, feeds: Arrays) -> Arrays:
    def answer(call: Call) -> Arrays:
        assert call.graph == graph
        assert call.feeds is feeds
        return {"y": np.zeros(1)}

    return drive(raw(bundle, RawRequest(graph, feeds)), answer)


@pytest.fixture
def pair(bundle: Bundle) -> Bundle:
    """A graph `pair` of two inputs with the same dimension T."""
    ids = Tensor(dtype="int64", shape=("B", "T"))
    graph = Graph(file="pair.onnx", inputs={"ids": ids, "mask": ids}, outputs={"y": ids})
    bundle.manifest = bundle.manifest.model_copy(update={"graphs": {**bundle.manifest.graphs, "pair": graph}})
    return bundle


def ids(*shape: int, dtype: Any = np.int64) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_feeds_that_fit_reach_the_graph(pair: Bundle):
    assert run(pair, "pair", {"ids": ids(2, 5), "mask": ids(2, 5)})["y"] == 0


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({}, r"takes the inputs \['ids', 'mask'\]; \[\] were given"),
        ({"ids": ids(1, 1)}, r"\['ids'\] were given"),
        ({"ids": ids(1, 1), "mask": ids(1, 1), "more": ids(1)}, r"\['ids', 'mask', 'more'\] were given"),
        ({"ids": ids(1, 1, dtype=np.int32), "mask": ids(1, 1)}, "input 'ids' is int32; expected int64"),
        ({"ids": ids(1, 1), "mask": np.array([["a"]])}, "input 'mask' is str32; expected int64"),
        ({"ids": ids(1), "mask": ids(1, 1)}, r"input 'ids' has shape \[1\]; expected \['B', 'T'\]"),
        (
            {"ids": ids(2, 5), "mask": ids(2, 4)},
            r"input 'mask' has shape \[2, 4\]; expected \['B', 'T'\], with one",
        ),
        ({"ids": ids(0, 5), "mask": ids(0, 5)}, r"input 'ids' has shape \[0, 5\]; it holds nothing"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_by_name(pair: Bundle, feeds: Arrays, says: str):
    with pytest.raises(BadRequest, match=says):
        run(pair, "pair", feeds)


def test_fixed_dimensions_are_fixed(bundle: Bundle):
    with pytest.raises(BadRequest, match=r"shape \[1, 3, 4, 5\]; expected \['B', 3, 4, 4\]"):
        run(bundle, "image", {"pixels": np.zeros((1, 3, 4, 5), np.float32)})


def test_an_unknown_graph_and_a_bundle_without_raw(bundle: Bundle):
    with pytest.raises(TaskNotServed, match="has no graph 'audio'; it has image, text") as refused:
        run(bundle, "audio", {})
    assert refused.value.known == ["image", "text"]
    bundle.tasks = ("embed",)
    with pytest.raises(TaskNotServed, match="does not serve 'raw'"):
        run(bundle, "text", {"ids": ids(1, 1)})


def test_ids_are_within_the_context_and_the_vocabulary(bundle: Bundle):
    run(bundle, "text", {"ids": ids(2, 6)})
    with pytest.raises(TextTooLong, match="input 'ids' has 7 tokens in a row; graph 'text' reads at most 6"):
        run(bundle, "text", {"ids": ids(2, 7)})
    last = 4  # of [PAD], [UNK], red, green, blue
    run(bundle, "text", {"ids": np.array([[0, last]])})
    for wrong in (-1, last + 1):
        with pytest.raises(BadRequest, match=f"holds ids outside of the vocabulary; expected 0 to {last}"):
            run(bundle, "text", {"ids": np.array([[0, wrong]])})


def test_a_picture_is_within_the_limit_of_decoding(bundle: Bundle):
    spec = ImagePreprocess(input="picture", in_graph=True, size=(4, 4), shortest=4, mean=(0, 0, 0), std=(1, 1, 1))
    tensor = Tensor(dtype="uint8", shape=("height", "width", 3))
    graph = Graph(file="i.onnx", batch=False, inputs={"picture": tensor}, outputs={"y": tensor}, preprocess=spec)
    bundle.manifest = bundle.manifest.model_copy(update={"graphs": {"image": graph}})
    bundle.max_pixels = 12
    run(bundle, "image", {"picture": ids(3, 4, 3, dtype=np.uint8)})
    with pytest.raises(ImageTooLarge, match="has 4 x 4 pixels; at most 12"):
        run(bundle, "image", {"picture": ids(4, 4, 3, dtype=np.uint8)})
