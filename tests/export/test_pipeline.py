import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from export import samples
from export.nets import NETS
from export.pipeline import build
from export.recipe import load_recipe
from models.bundle.store import names, read
from models.errors import BarMissed, BundleError, ParityLost
from models.runner import open_bundle

FLOAT = {"image": {"name": "none"}, "text": {"name": "none"}}


@pytest.fixture(scope="module")
def net(tiny_hf_clip: Path):
    return NETS.get("hf_clip").load(str(tiny_hf_clip))


def recipe(net, **flags):
    return load_recipe("x", "hf_clip", net, name="tiny", **flags)


def test_int8_and_float_are_sealed_side_by_side_with_one_report(tiny_bundles: Path):
    assert names(tiny_bundles) == ["tiny-float", "tiny-int8"]
    int8, whole = (read(tiny_bundles / name) for name in ("tiny-int8", "tiny-float"))
    assert (int8.manifest.precision, whole.manifest.precision) == ("int8", "float32")
    assert int8.manifest.quantization.graphs == {"image": "static", "text": "smooth"}
    reports = [json.loads((s.directory / "report.json").read_text()) for s in (int8, whole)]
    assert reports[0] == reports[1]
    assert set(reports[0]["graphs"]) == {"image", "text"}
    assert reports[0]["graphs"]["image"]["float_against_torch"]["image_embeds"]["max_abs"] < 1e-4
    assert {"cpu", "threads", "onnxruntime"} <= set(reports[0]["machine"])


def test_a_bundle_says_what_it_was_calibrated_on_and_not_where_that_lay(tiny_bundles: Path, tiny_hf_clip: Path):
    directory = tiny_bundles / "tiny-int8"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf_clip)
    fitting = sum(len(tokenizer(text).input_ids) <= 40 for text in samples.texts())
    source = read(directory).manifest.quantization.calibration["image"]
    assert source == f"13 pictures (samples that ship) and {fitting} texts (samples that ship), seed 0"
    for file in directory.iterdir():
        assert str(tiny_hf_clip.parent).encode() not in file.read_bytes(), file.name


def test_int8_graphs_are_int8_and_smaller(tiny_bundles: Path):
    import onnx

    for role in ("image", "text"):
        model = onnx.load(tiny_bundles / "tiny-int8" / f"{role}.onnx")
        stored = {i.data_type for i in model.graph.initializer if int(np.prod(i.dims)) >= 32 * 32}
        assert onnx.TensorProto.INT8 in stored or onnx.TensorProto.UINT8 in stored
        assert {op.domain for op in model.opset_import} <= {"", "ai.onnx", "com.microsoft"}


def test_int8_says_nearly_what_float_says(tiny_bundles: Path, photographs):
    int8, whole = (open_bundle(tiny_bundles / name) for name in ("tiny-int8", "tiny-float"))
    images = [photographs[name] for name in ("cat", "coffee", "rocket")]
    texts = ["a photo of a cat.", "two dogs", "red"]
    cosines = np.sum(int8.embed(texts=texts, images=images) * whole.embed(texts=texts, images=images), axis=1)
    assert cosines.min() > 0.95
    assert cosines.min() < 0.9999999  # it is another arithmetic


def test_a_bundle_below_a_bar_is_not_sealed_and_its_report_is_kept(net, tmp_path: Path):
    with pytest.raises(BarMissed, match=r"min_image_cosine is .*, the bar 1\.1"):
        build(recipe(net, quantize=FLOAT, bars={"min_image_cosine": 1.1}), tmp_path, net=net)
    (report,) = tmp_path.iterdir()
    assert report.name == "tiny-int8.report.json"
    assert json.loads(report.read_text())["bars"]["min_image_cosine"]["passed"] is False


def test_a_sealed_bundle_is_replaced_only_when_asked(net, tmp_path: Path):
    (first,) = build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    with pytest.raises(BundleError, match="--replace"):
        build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    assert read(first.directory).digest == first.digest
    (second,) = build(recipe(net, quantize=FLOAT, replace=True), tmp_path, net=net)
    assert read(first.directory).digest == second.digest
    assert names(tmp_path) == ["tiny-int8"]


def test_a_graph_that_differs_from_torch_stops_the_export(net, tmp_path: Path):
    class Drifting(torch.nn.Module):
        """Answers otherwise when traced than when run."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            found = self.inner(pixels)
            return found if torch.compiler.is_exporting() else found + 0.1

    from dataclasses import replace

    image = replace(net.towers["image"], module=Drifting(net.towers["image"].module))
    other = replace(net, towers={**net.towers, "image": image})
    with pytest.raises(ParityLost, match=r"image: torch against float ONNX.*image_embeds"):
        build(recipe(net, quantize=FLOAT), tmp_path, net=other)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_left_in_float_is_not_called_int8(net, tmp_path: Path):
    (sealed,) = build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    assert sealed.manifest.precision == "mixed"
