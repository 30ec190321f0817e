"""rank by a graph of its own: a hand-written bundle whose score is worked out by hand.

A picture has one token, its mean colour; a text has a token for each word, the axis of red, green or blue; the score is
the sum of all their products.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read, seal, stage
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, BundleInvalid, InputError
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.runner import Runner
from calmclip.models.tasks.rank import RankRequest, rank

Png = Callable[..., bytes]
GRAPHS = {
    "image": """<ir_version: 9, opset_import: ["" : 18]>
        image (float[B, 3, 4, 4] pixels) => (float[B, 1, 3] image_tokens) <int64[3] shape = {0, 1, 3}> {
            axes = Constant <value_ints = [2, 3]> ()
            mean = ReduceMean <keepdims = 0> (pixels, axes)
            image_tokens = Reshape (mean, shape)
        }""",
    "text": """<ir_version: 9, opset_import: ["" : 18]>
        text (int64[B, 6] ids) => (float[B, 6, 3] text_tokens)
        <float[5, 3] words = {0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}> { text_tokens = Gather (words, ids) }""",
    "rank": """<ir_version: 9, opset_import: ["" : 18]>
        rank (float[B, 1, 3] image_tokens, float[B, 6, 3] text_tokens) => (float[B] scores) {
            products = Mul (image_tokens, text_tokens)
            axes = Constant <value_ints = [1, 2]> ()
            scores = ReduceSum <keepdims = 0> (products, axes)
        }""",
}


def tensor(*shape: int | str) -> dict[str, Any]:
    return {"dtype": "float32", "shape": ["B", *shape]}


@pytest.fixture
def ranking(colours: dict[str, Any], write: Any, tmp_path: Path) -> Callable[[], Bundle]:
    """Seals the bundle; a test may change its manifest before."""
    graphs = colours["graphs"]
    graphs["image"]["outputs"] = {"image_tokens": tensor(1, 3)}
    graphs["text"]["outputs"] = {"text_tokens": tensor(6, 3)}
    graphs["text"]["inputs"]["ids"]["shape"] = ["B", 6]
    graphs["text"]["preprocess"]["pad"] = "context"
    graphs["rank"] = {
        "file": "rank.onnx",
        "inputs": {"image_tokens": tensor(1, 3), "text_tokens": tensor(6, 3)},
        "outputs": {"scores": tensor()},
    }
    colours["tasks"] = ["rank", "raw"]
    del colours["classifier"]

    def sealed() -> Bundle:
        with stage(tmp_path / "bundles", "colours") as staged:
            manifest = write(staged)
            for role, text in GRAPHS.items():
                (staged / f"{role}.onnx").write_bytes(parser.parse_model(text).SerializeToString())
            return Bundle(read(seal(staged, manifest).directory))

    return sealed


def test_scores_are_those_of_the_graph(ranking: Callable[[], Bundle], png: Png):
    bundle = ranking()
    assert bundle.tasks == ("rank", "raw")
    answer = Runner(bundle).rank([png("navy"), png("red"), png("orange")], "red green red")
    wanted = [(2, 2 + 165 / 255), (1, 2), (0, 0)]  # 2 r + g; orange is (255, 165, 0)
    assert [(p.index, p.score) for p in answer] == [(i, pytest.approx(score, abs=1e-6)) for i, score in wanted]
    assert answer.scale == "learned"


def test_the_instruction_runs_once_for_a_runner(ranking: Callable[[], Bundle], png: Png):
    bundle = ranking()
    runner, calls = Runner(bundle), []

    def run(call: Call) -> Arrays:
        calls.append(call.graph)
        return runner.session(call.graph).run(call.feeds)

    for _ in range(2):
        request = RankRequest([png("red"), png("lime")], "green")
        drive(rank(bundle, request), run, cache=runner._cached)
    assert calls == ["text", *["image", "rank"] * 4]
    assert len(runner.cache) == 6  # tokens, so that the size of the cache bounds its memory


@pytest.mark.parametrize(
    "asked", [{"classifier": Classifier(("red",))}, {"instruction": "red", "label": "red"}, {"instruction": None}]
)
def test_it_takes_an_instruction_alone(ranking: Callable[[], Bundle], png: Png, asked: dict[str, Any]):
    with pytest.raises(BadRequest, match="ranks by `instruction` alone"):
        Runner(ranking()).rank([png("red")], **asked)


def test_an_instruction_that_is_too_long_is_refused(ranking: Callable[[], Bundle], png: Png):
    with pytest.raises(InputError, match="7 tokens"):
        Runner(ranking()).rank([png("red")], "red red red red red red red")


def test_graphs_that_do_not_fit_together_are_named(ranking: Callable[[], Bundle], colours: dict[str, Any]):
    colours["graphs"]["rank"]["inputs"]["text_tokens"] = tensor(5, 3)
    with pytest.raises(BundleInvalid, match="'text_tokens' of `rank` and the output of 'text' differ"):
        ranking()


def test_other_inputs_of_the_graph_are_named(ranking: Callable[[], Bundle], colours: dict[str, Any]):
    colours["graphs"]["rank"]["inputs"]["more"] = tensor(1)
    with pytest.raises(BundleInvalid, match=r"`graphs\.rank\.inputs` are \['image_tokens', 'more', 'text_tokens'\]"):
        ranking()


def test_the_warm_up_uses_every_graph(ranking: Callable[[], Bundle], png: Png):
    bundle, calls = ranking(), set()
    runner = Runner(bundle)

    def run(call: Call) -> Arrays:
        calls.add(call.graph)
        return runner.session(call.graph).run(call.feeds)

    from calmclip.models.tasks import TASKS

    task = TASKS.get("rank")
    answer = drive(task.flow(bundle, task.example(bundle, png("red"))), run)
    assert calls == {"image", "text", "rank"}
    assert np.isfinite([p.score for p in answer]).all()
