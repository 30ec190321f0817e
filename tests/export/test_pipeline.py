import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from calmclip.export import samples
from calmclip.export.nets import NETS
from calmclip.export.pipeline import _family, _ties, build
from calmclip.export.recipe import load_recipe
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import names, read
from calmclip.models.cli import main
from calmclip.models.commands import check_command, show_command
from calmclip.models.errors import BadRequest, BarMissed, BundleError, ExportError, ParityLost
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.runtime.session import SessionOptions
from tests import tiny

FLOAT = {"image": {"name": "none"}, "text": {"name": "none"}}


@pytest.fixture(scope="module")
def net(tiny_hf_clip: Path):
    return NETS.get("clip").load(str(tiny_hf_clip))


def recipe(net, **flags):
    return load_recipe("x", "clip", net, name="tiny", **flags)


def test_int8_and_float_are_sealed_side_by_side_with_one_report(tiny_bundles: Path, tiny_hf_clip: Path):
    assert names(tiny_bundles) == ["tiny-float", "tiny-int8"]
    int8, float32 = (read(tiny_bundles / name) for name in ("tiny-int8", "tiny-float"))
    assert (int8.manifest.precision, float32.manifest.precision) == ("int8", "float")
    assert int8.manifest.quantization.graphs == {"image": "search", "text": "search"}
    reports = [json.loads((s.directory / "report.json").read_text()) for s in (int8, float32)]
    assert reports[0] == reports[1]
    assert set(reports[0]["graphs"]) == {"image", "text"}
    weights = hashlib.sha256((tiny_hf_clip / "model.safetensors").read_bytes()).hexdigest()
    assert int8.manifest.source.weights == {"model.safetensors": weights}
    assert reports[0]["graphs"]["image"]["float_against_torch"]["image_embeds"]["max_abs"] < 1e-4


def test_a_bundle_names_its_calibration_inputs_without_their_place(tiny_bundles: Path, tiny_hf_clip: Path):
    directory = tiny_bundles / "tiny-int8"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf_clip)
    fitting = sum(len(tokenizer(text).input_ids) <= 40 for text in samples.texts())
    source = read(directory).manifest.quantization.calibration["image"]
    assert source == "36 pictures, and 12 others to search with (samples that ship), seed 0"
    texts = json.loads((directory / "report.json").read_text())["inputs"]["texts"]
    assert texts["certificate"] == fitting
    assert texts["calibration"] + texts["search"] == sum(
        len(tokenizer(text).input_ids) <= 40 for text in samples.calibration_texts()
    )
    for file in directory.iterdir():
        assert str(tiny_hf_clip.parent).encode() not in file.read_bytes(), file.name


def test_int8_graphs_are_int8_and_smaller(tiny_bundles: Path):
    for role in ("image", "text"):
        model = onnx.load(tiny_bundles / "tiny-int8" / f"{role}.onnx")
        stored = {i.data_type for i in model.graph.initializer if int(np.prod(i.dims)) >= 32 * 32}
        assert onnx.TensorProto.INT8 in stored or onnx.TensorProto.UINT8 in stored
        assert {op.domain for op in model.opset_import} <= {"", "ai.onnx", "com.microsoft", "ai.calmclip"}


def test_int8_embeds_nearly_as_float_does(tiny_bundles: Path, photographs):
    int8, float32 = (open_bundle(tiny_bundles / name) for name in ("tiny-int8", "tiny-float"))
    images = [photographs[name] for name in ("cat", "coffee", "rocket")]
    texts = ["a photo of a cat.", "two dogs", "red"]
    cosines = np.sum(int8.embed(texts=texts, images=images) * float32.embed(texts=texts, images=images), axis=1)
    assert cosines.min() > 0.95
    assert cosines.min() < 0.9999999  # INT8 rounds


def test_a_bundle_below_a_bar_is_not_sealed_and_its_report_is_kept(net, tmp_path: Path):
    with pytest.raises(BarMissed, match=r"min_image_cosine is .*, the bar 1\.1"):
        build(recipe(net, quantize=FLOAT, bars={"min_image_cosine": 1.1}), tmp_path, net=net)
    (report,) = tmp_path.iterdir()
    assert report.name == "tiny-float.report.json"
    assert json.loads(report.read_text())["bars"]["min_image_cosine"]["passed"] is False


def test_a_sealed_bundle_is_replaced_only_when_asked(net, tmp_path: Path):
    (first,) = build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    assert first.manifest.precision == "float"
    with pytest.raises(BundleError, match="--replace"):
        build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    assert read(first.directory).digest == first.digest
    (second,) = build(recipe(net, quantize=FLOAT, replace=True), tmp_path, net=net)
    assert read(first.directory).digest == second.digest
    assert names(tmp_path) == ["tiny-float"]


def test_with_nothing_in_int8_the_only_bundle_is_the_float_one(net, tiny_bundles: Path, tmp_path: Path, capsys):
    """Also by the command, with --keep-float and --dimensions, and beside a bundle of that name."""
    command = ["export", str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--preset", "none", "--keep-float"]
    command += ["--dimensions", "4,8"]
    tiny.hf_clip(tmp_path / "tiny")
    assert main(command) == 0
    assert names(tmp_path / "out") == ["tiny-float"]
    sealed = read(tmp_path / "out" / "tiny-float")
    floats = read(tiny_bundles / "tiny-float")
    assert (sealed.manifest.name, sealed.manifest.precision) == ("tiny-float", "float")
    assert sealed.manifest.quantization == floats.manifest.quantization
    assert (sealed.manifest.dimensions, floats.manifest.dimensions) == ((4, 8), ())
    assert open_bundle(sealed.directory).embed(texts=["a cat"], dimensions=4).shape == (1, 4)
    for file in ("image.onnx", "text.onnx"):
        assert sealed.manifest.files[file].sha256 == floats.manifest.files[file].sha256
    assert show_command(["tiny-float", "--bundles", str(tmp_path / "out")]) == 0
    assert "tiny-float   float   format 2" in capsys.readouterr().out
    assert main(command) == 2
    assert "tiny-float exists, and a sealed bundle never changes" in capsys.readouterr().err


def test_a_bundle_below_the_accuracy_of_int8_is_mixed_and_says_why(net, tmp_path: Path):
    """Ranges that cut off most numbers ruin the text tower, and the bars let it pass."""
    said: list[str] = []
    bars = {"min_text_cosine": -1.0, "min_output_cosine": -1.0}
    how = {"text": {"name": "static", "params": {"percentile": 60.0}}}
    (sealed,) = build(recipe(net, quantize=how, bars=bars), tmp_path, net=only(net, "text"), say=said.append)
    assert (sealed.manifest.name, sealed.manifest.precision) == ("tiny-mixed", "mixed")
    report = json.loads((sealed.directory / "report.json").read_text())
    agreement = report["graphs"]["text"]["int8_against_float"]["text_embeds"]
    assert agreement["cosine"] < 0.99
    reasons = report["mixed_because"]
    assert f"the mean cosine of text.text_embeds is {agreement['cosine']:.4f}, not 0.99" in reasons
    assert next(line for line in said if "mixed" in line) == f"called tiny-mixed, not int8: {'; '.join(reasons)}"


def test_a_graph_that_differs_from_torch_stops_the_export(net, tmp_path: Path):
    class Drifting(torch.nn.Module):
        """Computes one function when it is traced and another when it runs."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            embeds = self.inner(pixels)
            return embeds if torch.compiler.is_exporting() else embeds + 0.1

    image = replace(net.towers["image"], module=Drifting(net.towers["image"].module))
    other = replace(net, towers={**net.towers, "image": image})
    with pytest.raises(ParityLost, match=r"image: torch against float ONNX.*image_embeds"):
        build(recipe(net, quantize=FLOAT), tmp_path, net=other)
    assert list(tmp_path.iterdir()) == []


def only(net, role, **change):
    """The net with one of its towers: half the time."""
    return replace(net, towers={role: replace(net.towers[role], **change)}, tasks=("raw",))


@pytest.mark.parametrize("name", ["tiny-int8", "tiny-float"])
def test_every_softmax_of_both_bundles_is_ours_and_the_report_counts_them(tiny_bundles: Path, name: str):
    """Two layers (tests/tiny.py). In INT8 the softmax is a part of QuantAttention."""
    sealed = read(tiny_bundles / name)
    assert sealed.manifest.ops.used == (INT8_OPS if name == "tiny-int8" else ("Softmax",))
    facts = json.loads((sealed.directory / "report.json").read_text())["rewrites"]
    for role in ("image", "text"):
        rewrites = facts[role]["int8" if name == "tiny-int8" else "float32"]
        assert rewrites["counts"]["softmax"] == (0 if name == "tiny-int8" else 2)
        assert rewrites["missed"] == {}
        least = 0.9999 if name == "tiny-int8" else 0.999999
        assert rewrites["against_standard"]["functions"][f"{role}_embeds"]["cosine_min"] > least
        nodes = onnx.load(sealed.directory / f"{role}.onnx").graph.node
        kind = "QuantAttention" if name == "tiny-int8" else "Softmax"
        assert [n.domain for n in nodes if n.op_type == kind] == ["ai.calmclip"] * 2


def test_the_search_obeys_the_bar_of_int8_coverage(net, tmp_path: Path):
    """With the default bar, 90 %, the second product of attention stays in float."""
    bars = {"min_int8_coverage": 1.0, "min_output_cosine": 0.5, "min_image_cosine": 0.5}
    (sealed,) = build(recipe(net, bars=bars), tmp_path, net=only(net, "image"))
    facts = json.loads((sealed.directory / "report.json").read_text())
    assert facts["graphs"]["image"]["coverage"]["part"] == 1.0
    assert facts["bars"]["min_int8_coverage"]["passed"]


def test_an_unknown_node_to_keep_in_float_is_named(net, tmp_path: Path):
    how = {"quantize": {"text": {"name": "static", "params": {"keep": ["MatMul.MatMul_0", "MatMul.MatMull_1"]}}}}
    with pytest.raises(BadRequest, match=r"quantize\.text: keep: 'MatMul\.MatMull_1' is no node"):
        build(recipe(net, **how), tmp_path, net=only(net, "text"))


def test_without_rewrites_a_bundle_has_standard_operators_alone(net, tmp_path: Path):
    how = {"quantize": {"text": {"name": "none"}}, "rewrites": ()}
    (sealed,) = build(recipe(net, **how), tmp_path, net=only(net, "text"))
    assert sealed.manifest.ops.used == ()
    model = onnx.load(sealed.directory / "text.onnx")
    assert {op.domain for op in model.opset_import} == {""}
    assert not model.functions


def test_fewer_rewrites_than_the_net_promises_stop_the_export(net, tmp_path: Path):
    other = only(net, "text", promises={"Softmax": 3})
    with pytest.raises(ExportError, match=r"text in float: the net promises 3 x Softmax, the rewrites made 2\."):
        build(recipe(net, quantize=FLOAT), tmp_path, net=other)
    assert list(tmp_path.iterdir()) == []


def test_a_rewrite_that_changes_the_answers_stops_the_export(net, tmp_path: Path, monkeypatch):
    """A rule with a wrong attribute: it stretches the softmax by a tenth."""
    from calmclip.export.rewrites import softmax

    stretched = softmax.replacement
    monkeypatch.setattr(softmax, "replacement", lambda node, last, gamma, zeta: stretched(node, last, gamma, zeta=1.1))
    with pytest.raises(ParityLost, match=r"image in float: standard ops against our functions: .*image_embeds"):
        build(recipe(net, quantize=FLOAT), tmp_path, net=net)


INT8_OPS = ("QuantAttention", "QuantLayerNorm", "QuantLinear", "QuantLinearToFloat", "QuantPatches")


def test_a_softmax_between_8_bit_tensors_is_compared_with_the_graph(tmp_path: Path):
    """ONNX Runtime's own integer softmax is no reference: its cosine is 0.9987 for this net."""
    checkpoint = str(tiny.vit(tmp_path / "vit"))
    net = NETS.get("vit").load(checkpoint)
    (sealed,) = build(load_recipe(checkpoint, "vit", net, preset="paper"), tmp_path / "out", net=net)
    report = json.loads((sealed.directory / "report.json").read_text())
    agreement = report["rewrites"]["logits"]["int8"]["against_standard"]
    assert min(side["logits"]["cosine_min"] for side in agreement.values()) > 0.9999


def test_what_belongs_to_one_run_is_told_and_not_sealed(net, tmp_path: Path):
    told: dict[str, Any] = {}
    how = recipe(net, quantize={"text": {"name": "none"}})
    (sealed,) = build(how, tmp_path, net=only(net, "text"), timings=told.update)
    assert {"load", "text: trace", "text: quantize", "write", "measure"} <= told["seconds"].keys()
    assert all(0 <= seconds < 600 for seconds in told["seconds"].values())
    assert 100 < told["peak_rss_mb"] < 1e5
    assert {"cpu", "threads", "onnxruntime"} <= set(told["machine"])
    assert 0 < told["latency_ms"]["text"]["int8"]["p50"] < 1000
    report = json.loads((sealed.directory / "report.json").read_text())
    assert not {*told, "created"} & report.keys()


def test_a_report_names_the_modules_of_outliers(tiny_bundles: Path):
    graphs = json.loads((tiny_bundles / "tiny-int8" / "report.json").read_text())["graphs"]
    outliers = {role: graphs[role]["outliers"] for role in ("image", "text")}
    assert {role: facts["inputs"] for role, facts in outliers.items()} == {
        "image": 16,
        "text": 16,
    }
    assert [name for name in outliers["image"]["tensors"] if name.startswith("blocks.1.")] == [
        f"blocks.1.{name}" for name in ("norm1", "attn.out", "attn.out (sum)", "norm2", "mlp.down", "mlp.down (sum)")
    ]
    norms = [norm for norm, _ in outliers["image"]["tensors"].values()]
    assert outliers["image"]["max_inf_norm"] == max(norms) > 1


def test_a_full_disk_leaves_no_file(net, tmp_path: Path):
    """The system refuses: no file of this process may exceed 30 kB, and every graph is larger."""
    how, most = recipe(net, quantize=FLOAT), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, most[1]))
    try:
        with pytest.raises(BundleError, match=r"tiny-(int8|float) cannot be written .*free some space"):
            build(how, tmp_path, net=net)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_net_keeps_its_weights_unless_the_export_may_release_them(tiny_hf_clip: Path, tmp_path: Path):
    net = NETS.get("clip").load(str(tiny_hf_clip))
    (first,) = build(recipe(net, quantize=FLOAT), tmp_path, net=net)
    (second,) = build(recipe(net, quantize=FLOAT, replace=True), tmp_path, net=net, release=True)
    graphs = [{n: f.sha256 for n, f in s.manifest.files.items() if n.endswith(".onnx")} for s in (first, second)]
    assert graphs[0] == graphs[1]
    assert not any(p.numel() for tower in net.towers.values() for p in tower.module.parameters())


@pytest.fixture(scope="module")
def open_clip_bundles(tiny_open_clip: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("open_clip")
    net = NETS.get("clip").load(str(tiny_open_clip))
    bars = {"min_image_cosine": 0.9, "min_text_cosine": 0.9}
    build(load_recipe("x", "clip", net, name="oc", keep_float=True, bars=bars), out, net=net)
    return out


@pytest.mark.parametrize("name", ["tiny-float", "oc-float", "tiny-int8", "oc-int8"])
def test_a_bundle_answers_the_same_with_the_op_library_and_without(
    tiny_bundles: Path, open_clip_bundles: Path, photographs, library, name: str
):
    directory = (tiny_bundles if name.startswith("tiny") else open_clip_bundles) / name
    assert read(directory).manifest.ops.used == (("Softmax",) if name.endswith("float") else INT8_OPS)
    images = [photographs[key] for key in ("cat", "coffee", "rocket")]
    texts = ["a photo of a cat.", "two dogs", "red"]
    with_ops, without_ops = (
        Runner(Bundle(read(directory)), SessionOptions(ops=mode)).embed(texts=texts, images=images)
        for mode in ("required", "off")
    )
    if name.endswith("float"):
        np.testing.assert_allclose(with_ops, without_ops, atol=1e-5)
    else:  # an activation at a tie may round to the other side
        assert np.sum(with_ops * without_ops, axis=1).min() > 0.999


def test_picture_input_gives_a_graph_that_takes_pictures(net, tiny_bundles: Path, tmp_path: Path, photographs, capsys):
    how = {"quantize": {"image": {"name": "none"}}, "picture_input": True}
    told: dict[str, Any] = {}
    (sealed,) = build(recipe(net, **how), tmp_path, net=only(net, "image"), timings=told.update)
    graph = sealed.manifest.graphs["image"]
    assert sealed.manifest.ops.used == ("ImageToPixels", "Softmax")
    assert (graph.batch, list(graph.inputs), graph.inputs["picture"].dtype) == (False, ["picture"], "uint8")
    assert (graph.preprocess.input, graph.preprocess.in_graph) == ("picture", True)
    facts = json.loads((sealed.directory / "report.json").read_text())
    rewrites = facts["rewrites"]["image"]["float32"]
    assert rewrites["counts"]["image_to_pixels"] == 1
    assert rewrites["picture_input"]["functions"]["image_embeds"]["max_abs"] < 1e-5
    assert "image" in told["latency_ms"]
    images = [photographs[key] for key in ("cat", "coffee", "rocket")]  # three sizes
    plain = open_bundle(tiny_bundles / "tiny-float")
    for mode in ("auto", "off"):
        opened = read(sealed.directory)
        embeds = opened._replace(manifest=opened.manifest.model_copy(update={"tasks": ("embed",)}))
        runner = Runner(Bundle(embeds), SessionOptions(ops=mode))
        np.testing.assert_allclose(runner.embed(images=images), plain.embed(images=images), atol=1e-5)
    assert check_command(["tiny-float", "--bundles", str(tmp_path)]) == 0
    assert "image: image_embeds [1, 16] float32, finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "bound"), [((1.0, 0.9999), 0.999), ((0.9999, 0.98), 0.99), ((0.5,), 0.95), ((), 0.999)]
)
def test_ties_may_cost_a_row_half_of_the_loss_of_int8(rows, bound):
    agreement = {str(at): {"cosine_min": cosine} for at, cosine in enumerate(rows)}
    assert _ties(agreement)["min_cosine"] == pytest.approx(bound, abs=1e-12)


def test_float_and_int8_of_one_export_are_one_family(tiny_bundles: Path):
    tiny = [read(tiny_bundles / name) for name in ("tiny-int8", "tiny-float")]
    assert len({item.manifest.family for item in tiny}) == 1
    assert len({item.digest for item in tiny}) == 2
    # another preprocessing changes the family; another time of export does not
    floats = tiny[1].manifest
    image = floats.graphs["image"]
    spec = image.preprocess.model_copy(update={"mean": (0.0, 0.0, 0.0)})
    graphs = {**floats.graphs, "image": image.model_copy(update={"preprocess": spec})}
    other = floats.model_copy(update={"graphs": graphs})
    families = [_family(item) for item in (floats, other)]
    assert families[0] == floats.family != families[1]
    named = floats.classifier.model_copy(update={"labels": "labels.json"})
    again = {
        "classifier": named,
        "files": {**floats.files, "labels.json": floats.files["text.onnx"]},
        "created": "another time",
    }
    assert _family(floats.model_copy(update=again)) == families[0]
