"""The graph `dense` with a guide, over invented graphs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.tasks import require
from calmclip.models.tasks.dense import look, views
from calmclip.models.tasks.regions import region_vectors

Png = Callable[..., bytes]
AXES = np.eye(3, dtype=np.float32)


@pytest.fixture
def guided(mapped: Bundle) -> Bundle:
    """The map of 2 x 2 cells, which reads a guide that sees 6 x 6 pixels, normalized another way."""
    graphs = dict(mapped.manifest.graphs)
    dense, patches = graphs["dense"], Tensor(dtype="float32", shape=("B", 2, 2, 4))
    assert dense.preprocess is not None
    spec = dense.preprocess.model_copy(update={"size": (6, 6), "mean": (1.0, 1.0, 1.0)})
    pixels = {"pixels": Tensor(dtype="float32", shape=("B", 3, 6, 6))}
    graphs["guide"] = Graph(file="image.onnx", inputs=pixels, outputs={"patches": patches}, preprocess=spec)
    graphs["dense"] = Graph.model_validate({**dict(dense), "inputs": {**dense.inputs, "guide": patches}})
    mapped.manifest = mapped.manifest.model_copy(update={"graphs": graphs})
    return mapped


class Answers:
    """`guide` answers twice the first axis of four in each cell; `dense` the picture's colours at the corners."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Arrays:
        self.calls.append(call)
        if call.graph == "guide":
            return {"patches": np.full((1, 2, 2, 4), 2 * np.eye(4)[0], np.float32)}
        return {"patches": call.feeds["pixels"][:, :, ::4, ::4].transpose(0, 2, 3, 1)}


def test_the_guide_sees_the_picture_first_by_its_own_preprocessing(guided: Bundle, png: Png):
    run = Answers()

    def flow() -> Any:
        feeds, frame = yield from views(guided, png("red", (8, 4)))
        return (yield from look(feeds)), frame

    outputs, frame = drive(flow(), run)
    assert [(call.graph, sorted(call.feeds)) for call in run.calls] == [
        ("guide", ["pixels"]),
        ("dense", ["guide", "pixels"]),
    ]
    assert frame.scale == (1, 1)  # of `dense`, whose 8 x 8 pixels the picture fills
    seen = run.calls[0].feeds["pixels"]
    assert seen.shape == (1, 3, 6, 6)
    assert seen[0, :, 0, 0].tolist() == [0, -1, -1]
    assert run.calls[1].feeds["guide"].tolist() == np.full((1, 2, 2, 4), [2, 0, 0, 0]).tolist()
    assert outputs["keys"].tolist() == np.full((1, 2, 2, 4), [1, 0, 0, 0]).tolist()
    assert outputs["patches"][0, 0].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_the_graphs_own_keys_stay(guided: Bundle):
    ones = np.ones((1, 2, 2, 1), np.float32)
    answers = {"guide": {"patches": ones}, "dense": {"patches": ones, "keys": 3 * ones}}
    feeds: Any = {"guide": {}, "dense": {}}
    assert drive(look(feeds), lambda call: answers[call.graph])["keys"].max() == 3


def test_vectors_of_boxes_come_from_a_guided_map_too(guided: Bundle, png: Png):
    rows, _ = drive(region_vectors(guided, png("blue", (8, 8)), [(0, 0, 4, 4)]), Answers())
    assert rows.tolist() == [[0, 0, 1]]


def test_a_manifests_guide_is_checked(guided: Bundle):
    require(guided.manifest)
    graphs = guided.manifest.graphs
    other = Tensor(dtype="float32", shape=("B", 2, 2, 5))
    for wrong in (
        {name: graph for name, graph in graphs.items() if name != "guide"},
        {**graphs, "guide": graphs["guide"].model_copy(update={"outputs": {"patches": other}})},
        {**graphs, "guide": graphs["guide"].model_copy(update={"preprocess": None})},
    ):
        with pytest.raises(ValueError, match=r"'dense' has an input 'guide', float32 \['B', 2, 2, 4\]: it needs"):
            require(guided.manifest.model_copy(update={"graphs": wrong}))
