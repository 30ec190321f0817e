"""OWL-ViT and OWLv2 against transformers on checkpoints that it wrote: regions, boxes, queries by picture."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from calmclip.export import parity, pipeline, rewrites, trace
from calmclip.export.nets import NETS, Net
from calmclip.export.nets.common.detect_graph import CANDIDATES
from calmclip.export.nets.owl import detect_graph, grid_bias, pixels
from calmclip.export.recipe import Recipe
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import Sealed
from calmclip.models.cli import main
from calmclip.models.commands import check_command
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.ops.reference import soft_nms
from calmclip.models.preprocess.image import decode
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.suppression import Suppression
from calmclip.models.tasks.detect import DETECTED, Detections, DetectRequest, Example, detect
from tests import tiny

KINDS = {"owlvit": "OwlViT", "owlv2": "Owlv2"}
EVERYTHING = Suppression("hard", iou_threshold=1.0, min_score=0.0, max_output=1000)  # no IoU exceeds 1
LABELS = ["a cat", "two dogs", "a photo of red"]


@dataclass
class Case:
    """One checkpoint: our net, and the model and processor of transformers."""

    directory: Path
    net: Net
    bundle: Bundle
    run: Callable[[Call], Arrays]
    model: Any
    processor: Any
    prepared: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def find(self, picture: bytes, labels: list[str], **more: Any) -> Detections:
        return drive(detect(self.bundle, DetectRequest(picture, labels, ["{}"], EVERYTHING, **more)), self.run)

    def prepare(self, picture: bytes) -> torch.Tensor:
        """The pixels of transformers' processor, cached because it is slow."""
        if picture not in self.prepared:
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
            pixels = self.processor(upright, return_tensors="np")["pixel_values"]
            self.prepared[picture] = torch.tensor(np.asarray(pixels))
        return self.prepared[picture]

    def tokenize(self, labels: list[str]) -> dict[str, torch.Tensor]:
        """The inputs of transformers' processor: 16 tokens each; a mask hides the padding."""
        rows = [tiny.tokenizer().encode(label).ids for label in labels]
        ids, mask = (torch.zeros((len(rows), 16), dtype=torch.int64) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}


def assemble(net: Net, directory: Path) -> tuple[Bundle, Callable[[Call], Arrays]]:
    """A bundle with the torch modules as towers and the real graph `detect`."""
    for name, data in net.files.items():
        (directory / name).write_bytes(data)
    built = net.built["detect"]
    graph = rewrites.apply(built.model, built.attach).model
    runs = {role: parity.torch_run(tower) for role, tower in net.towers.items()} | {"detect": parity.onnx_run(graph)}
    regions = net.towers["regions"].outputs
    f32, i64 = ({"dtype": dtype, "shape": (1,)} for dtype in ("float32", "int64"))
    taken = {"text_embeds": {"dtype": "float32", "shape": ("Q", 32)}}
    for value in graph.graph.input:
        if value.name not in {*regions, *taken}:
            taken[value.name] = i64 if value.name in ("method", "per_class", "max_output") else f32
        elif value.name in regions:
            taken[value.name] = {"dtype": "float32", "shape": (1, *regions[value.name].shape[1:])}
    graphs: dict[str, Any] = {
        role: {"file": f"{role}.onnx", "inputs": t.inputs, "outputs": t.outputs, "preprocess": t.preprocess}
        for role, t in net.towers.items()
    }
    graphs["detect"] = {
        "file": "detect.onnx", "batch": False, "inputs": taken, "outputs": dict.fromkeys(DETECTED, f32)
    }  # fmt: skip
    manifest = Manifest(
        name="assembled",
        precision="float",
        tasks=net.tasks,
        source=net.source,
        graphs=graphs,
        classifier=net.classifier,
        suppression=net.suppression,
        quantization={"name": "none"},
        created="2026-01-01T00:00:00+00:00",
    )
    return Bundle(Sealed(directory, manifest, "0" * 64)), lambda call: runs[call.graph](call.feeds)


@pytest.fixture(scope="module")
def case_of(tiny_owl: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def of(kind: str) -> Case:
        if kind not in cases:
            directory = (
                tiny_owl if kind == "owlv2" else tiny.owl(tmp_path_factory.mktemp(kind), kind, side=128, patch=32)
            )
            net = NETS.get("owl").load(str(directory))
            name = KINDS[kind]
            model = getattr(transformers, f"{name}ForObjectDetection").from_pretrained(directory).eval()
            # OWLv2's Pillow processor needs scipy; for OWL-ViT ours equals the Pillow processor to the bit
            processor = getattr(transformers, f"{name}ImageProcessor{'Pil' if kind == 'owlvit' else ''}")
            bundle, run = assemble(net, tmp_path_factory.mktemp("assembled"))
            cases[kind] = Case(directory, net, bundle, run, model, processor.from_pretrained(directory))
        return cases[kind]

    return of


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def shown(photographs: dict[str, Path]) -> dict[str, bytes]:
    """Pictures of several shapes. An EXIF tag rotates `turned`."""
    astronaut = Image.open(photographs["astronaut"]).convert("RGB")
    tags = Image.Exif()
    tags[0x0112] = 6
    return {
        "wide": photographs["cat"].read_bytes(),
        "tall": saved(astronaut.crop((100, 0, 300, astronaut.height))),  # below 1:2, so that it is not sliced
        "turned": saved(Image.open(photographs["coffee"]).convert("RGB"), "JPEG", quality=95, exif=tags),
        "tiny": saved(astronaut.resize((9, 5))),
    }


SHAPES = ["wide", "tall", "turned", "tiny"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_prepared_as_by_transformers(case_of: Callable[[str], Case], shown, kind: str, shape: str):
    """Within one grey level. OWLv2 pads to a square: the picture is at the upper left, the padding is black."""
    case, picture = case_of(kind), shown[shape]
    mine, want = case.bundle.image("regions").prepare(decode(picture))[0], case.prepare(picture).numpy()
    mean, std = (np.reshape(three, (3, 1, 1)) * 255 for three in (tiny.MEAN, tiny.STD))
    assert np.abs((mine - want) * std).max() < 1
    if kind == "owlv2" and shape in ("wide", "tall"):
        width, height = Image.open(io.BytesIO(picture)).size
        assert (width > height) is (shape == "wide")
        levels = (mine * std + mean)[0]
        beyond = levels[:, -5:] if shape == "wide" else levels[:, :, -5:]
        assert np.abs(beyond).max() < 0.01
        assert levels[:, :5, :5].max() > 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_region_tower_equals_transformers(case_of: Callable[[str], Case], shown, kind: str, shape: str):
    case = case_of(kind)
    inputs = case.prepare(shown[shape])
    side = inputs.shape[-1]
    feeds = case.tokenize(LABELS)
    with torch.inference_mode():
        want = case.model(pixel_values=inputs, **feeds)
        names = list(case.net.towers["regions"].outputs)
        regions = dict(zip(names, case.net.towers["regions"].module(inputs), strict=True))
        texts = TextPreparer(case.net.towers["text"].preprocess, case.bundle.directory).prepare(LABELS)
        texts = case.net.towers["text"].module(torch.tensor(texts["ids"]))
    assert (texts - want.text_embeds[0]).abs().max() < 1e-5
    logits = (regions["class_embeds"] @ texts.T + regions["logit_shift"][..., None]) * regions["logit_scale"][..., None]
    assert want.logits.std() > 0.5, "the scores of the oracle differ"
    assert (logits - want.logits).abs().max() < 1e-4
    centre, size = want.pred_boxes[..., :2], want.pred_boxes[..., 2:]
    corners = torch.cat((centre - size / 2, centre + size / 2), dim=-1)
    assert (regions["boxes"] / side - corners).abs().max() < 1e-5
    assert regions["class_embeds"].norm(dim=-1) == pytest.approx(1, abs=1e-4)
    if kind == "owlv2":
        assert (regions["objectness"] - want.objectness_logits.sigmoid()).abs().max() < 1e-5
        assert regions["objectness"].std() > 0.01
    else:
        assert (regions["objectness"] == 1).all()


def expected(case: Case, boxes: torch.Tensor, scores: torch.Tensor, picture: bytes) -> tuple[Array, Array]:
    """The boxes of transformers, clipped to the picture, best first: x0 y0 x1 y1 in pixels; and their scores."""
    size = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).size
    cut = np.clip(boxes.numpy(), 0, [*size, *size])
    inside = (cut[:, 0] < cut[:, 2]) & (cut[:, 1] < cut[:, 3])
    order = np.argsort(-scores.numpy()[inside], kind="stable")
    return cut[inside][order], scores.numpy()[inside][order]


def agree(detections: Detections, boxes: Array, scores: Array, index: int = 0):
    mine = [detection for detection in detections if detection.index == index]
    assert len(mine) == len(boxes) > 0
    assert [detection.score for detection in mine] == pytest.approx(scores, abs=1e-4)
    assert np.ptp(scores) > 0.01
    assert np.abs(np.array([detection.box for detection in mine]) - boxes).max() < 0.1  # pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_equal_those_of_transformers(case_of: Callable[[str], Case], shown, kind: str, shape: str):
    """By `post_process_grounded_object_detection`, label by label: it returns only the best label of each box."""
    case, picture = case_of(kind), shown[shape]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture)))
    detections = case.find(picture, LABELS)
    assert (detections.width, detections.height) == upright.size
    post = getattr(transformers, f"{KINDS[kind]}Processor").post_process_grounded_object_detection
    owner = type("Processor", (), {"image_processor": case.processor})()
    for index, label in enumerate(LABELS):
        with torch.inference_mode():
            outputs = case.model(pixel_values=case.prepare(picture), **case.tokenize([label]))
        sizes = torch.tensor([upright.size[::-1]])
        (want,) = post(owner, outputs, threshold=0.0, target_sizes=sizes, text_labels=[[label]])
        agree(detections, *expected(case, want["boxes"], want["scores"], picture), index)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_equals_image_guided_detection(case_of: Callable[[str], Case], photographs, shown, kind: str):
    case, picture = case_of(kind), shown["wide"]
    size = Image.open(io.BytesIO(picture)).size
    chosen = set()
    for name in ("flower", "clock", "turned", "tall"):
        example = shown[name] if name in shown else photographs[name].read_bytes()
        with torch.inference_mode():
            want = case.model.image_guided_detection(case.prepare(picture), case.prepare(example))
            patches = case.model.image_embedder(case.prepare(example))[0]
            chosen.add(int(case.model.embed_image_query(patches.flatten(1, 2), patches)[1]))
            boxes = transformers.image_transforms.center_to_corners_format(want.target_pred_boxes[0])
        scale = torch.tensor([*size, *size] if kind == "owlvit" else [max(size)] * 4)
        detections = case.find(picture, [], examples=[Example(example)])
        agree(detections, *expected(case, boxes * scale, want.logits[0, :, 0].sigmoid(), picture))
    assert len(chosen) > 1, "the examples select different patches"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_the_grid_equals_transformers(case_of: Callable[[str], Case], kind: str):
    model = case_of(kind).model
    side = model.num_patches_height
    assert (grid_bias(side) - model.compute_box_bias(side, side)).abs().max() < 1e-6


def test_the_detect_graph_equals_its_formula():
    """sigmoid((cos + shift) scale), then SoftNMS by its oracle, on at most `CANDIDATES` pairs: the best."""
    patches, dim, prompts = 60, 8, 50
    random = np.random.default_rng(1)
    built = detect_graph(patches, dim, 100)
    run = parity.onnx_run(rewrites.apply(built.model, built.attach).model)
    feeds = dict(built.examples[0]) | {"text_embeds": random.standard_normal((prompts, dim)).astype(np.float32)}
    feeds["text_embeds"] /= np.linalg.norm(feeds["text_embeds"], axis=1, keepdims=True)
    settings = Suppression("gaussian", min_score=0.2, max_output=500)
    outputs = run(feeds | settings.tensors())
    cosines = feeds["class_embeds"][0].astype(np.float64) @ feeds["text_embeds"].T
    logits = (cosines + feeds["logit_shift"].T) * feeds["logit_scale"].T
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    assert outputs["candidates"] == (scores >= 0.2).sum()
    best = np.argsort(-scores.ravel(), kind="stable")
    best = best[scores.ravel()[best] >= 0.2][:CANDIDATES]
    suppressed = soft_nms(
        feeds["boxes"][0][best // prompts],
        scores.ravel()[best],
        best % prompts,
        method="gaussian",
        per_class=True,
        iou_threshold=0.3,
        sigma=0.5,
        min_score=0.2,
        max_output=500,
    )
    assert len(suppressed.indices) == len(outputs["scores"]) > 100
    assert outputs["scores"] == pytest.approx(suppressed.scores, abs=1e-5)
    assert outputs["classes"].tolist() == (best[suppressed.indices] % prompts).tolist()
    every = run(feeds | Suppression("hard", min_score=0.0, iou_threshold=1.0, max_output=1000).tensors())
    assert every["candidates"] == patches * prompts > CANDIDATES


@pytest.mark.parametrize(
    ("kind", "config", "want"),
    [
        ("owlvit", {"size": [768, 768]}, ("exact", "bicubic", 0)),
        ("owlvit", {"size": {"height": 768, "width": 768}, "resample": 2}, ("exact", "bilinear", 0)),
        ("owlvit", {"size": 768, "do_center_crop": None, "crop_size": 768}, ("exact", "bicubic", 0)),
        ("owlv2", {"size": {"height": 768, "width": 768}, "resample": 2}, ("square", "gaussian", 0)),
        ("owlv2", {"do_pad": True, "resample": 77}, ("square", "gaussian", 0)),  # the reference ignores it
    ],
)
def test_the_preprocessing_is_that_of_the_processor_config(kind: str, config: dict[str, Any], want):
    spec = pixels(kind, {"image_mean": tiny.MEAN, "image_std": tiny.STD} | config, 768)
    assert (spec.size, (spec.resize, spec.resample, spec.pad)) == ((768, 768), want)
    assert (spec.mean, spec.std) == (tiny.MEAN, tiny.STD)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("owlvit", {"do_center_crop": True}, "do_center_crop = True; only owlvit's own False"),
        ("owlv2", {"do_pad": False}, "do_pad = False; only owlv2's own True"),
        ("owlv2", {"do_normalize": False}, "do_normalize = False"),
        ("owlv2", {"size": {"height": 960, "width": 768}}, r"pictures of \[960, 768\]; the model reads 768 x 768"),
        ("owlvit", {"size": {"shortest_edge": 768}}, "the model reads 768 x 768"),
        ("owlvit", {"resample": 1}, "resample = 1; expected 2 or 3"),
        ("owlvit", {"image_std": None}, "lacks image_std"),
    ],
)
def test_another_processor_is_refused(kind: str, config: dict[str, Any], message: str):
    with pytest.raises(UnknownCheckpoint, match=message):
        pixels(kind, {"image_mean": tiny.MEAN, "image_std": tiny.STD} | config, 768)


@pytest.fixture
def broken(tiny_owl: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of the checkpoint with other tensors or another config."""

    def make(tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any) -> str:
        copy = tiny.changed(tiny_owl, tmp_path / "copy", **config)
        state = load_file(copy / "model.safetensors")
        if tensors:
            tensors(state)
        save_file(state, copy / "model.safetensors")
        return str(copy)

    return make


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("box_head.dense1.bias"), {}, "box_head.dense1.bias"),
        (lambda s: s.pop("class_head.logit_shift.weight"), {}, "1 tensors, for example class_head.logit_shift.weight"),
        (lambda s: s.pop("owlv2.vision_model.pre_layernorm.weight"), {}, "pre_layernorm"),
        (lambda s: s.pop("objectness_head.dense0.weight"), {}, "objectness_head.dense0.weight"),
        (lambda s: s.pop("owlv2.vision_model.embeddings.position_embedding.weight"), {}, "position_embedding"),
        (lambda s: s.update(extra=torch.zeros(1)), {}, "extra"),
        (lambda s: s.update({"layer_norm.bias": torch.zeros(3)}), {}, r"layer_norm.bias has the shape \[3\]"),
        (lambda s: s.update({"owlv2.text_projection.weight": torch.zeros(31, 32)}), {}, "texts become 31 numbers"),
        (None, {"vision_config": {"image_size": 112}}, "37 positions are not those"),
        (None, {"vision_config": {"image_size": 100}}, "in a square of 100"),  # 6 patches of 16, and 4 pixels
        (None, {"vision_config": {"num_hidden_layers": 3}}, "num_hidden_layers is 3; the weights hold 2"),
        (None, {"text_config": {"hidden_act": "tanh"}}, "hidden_act is 'tanh'"),
        (None, {"model_type": "owlvit"}, "not of the layout 'Hugging Face OWL-ViT'"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(broken, change, config, message: str):
    with pytest.raises(UnknownCheckpoint, match=message):
        NETS.get("owl").load(broken(change, **config))


def test_owlvit_has_no_objectness_head(case_of: Callable[[str], Case]):
    names = {kind: set(case_of(kind).net.towers["regions"].module.state_dict()) for kind in KINDS}
    assert {name.split(".")[0] for name in names["owlv2"] - names["owlvit"]} == {"objectness"}


# --- exported -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runners(owl_bundles: Path) -> dict[str, Runner]:
    return {side: open_bundle(owl_bundles / f"owl-{side}", threads=1) for side in ("float", "int8")}


def test_graphs_equal_the_towers(runners: dict[str, Runner], case_of: Callable[[str], Case], shown):
    case = case_of("owlv2")
    inputs = case.prepare(shown["tall"]).numpy()
    want, outputs = (run({"pixels": inputs}) for run in (
        parity.torch_run(case.net.towers["regions"]), lambda feeds: runners["float"].raw("regions", feeds)
    ))  # fmt: skip
    for name in want:
        assert np.abs(want[name] - outputs[name]).max() < (1e-2 if name == "boxes" else 1e-4), name


def test_int8_regions_are_near_float_regions(runners: dict[str, Runner], photographs, shown):
    cosines, moved = [], []
    for picture in [*shown.values(), *(photographs[n].read_bytes() for n in ("cat", "rocket", "coffee"))]:
        feeds = {"pixels": runners["int8"].bundle.image("regions").prepare(decode(picture))[0]}
        int8, float32 = (runners[side].raw("regions", feeds) for side in ("int8", "float"))
        cosines += (int8["class_embeds"] * float32["class_embeds"]).sum(axis=-1).ravel().tolist()
        moved += np.abs(int8["boxes"] - float32["boxes"]).ravel().tolist()
    assert np.mean(cosines) >= 0.99
    assert np.min(cosines) >= 0.97
    assert np.mean(moved) < 1  # pixels of 96


def test_the_report_counts_our_operators(owl_bundles: Path):
    report = json.loads((owl_bundles / "owl-int8" / "report.json").read_text())
    counts = {
        role: {name: facts["counts"] for name, facts in graphs.items()} for role, graphs in report["rewrites"].items()
    }
    for role in ("regions", "text"):
        assert counts[role]["float32"]["softmax"] == 2
        ops = [node.op_type for node in onnx.load(owl_bundles / "owl-int8" / f"{role}.onnx").graph.node]
        assert ops.count("QuantAttention") == 2
    assert counts["detect"]["float32"]["soft_nms"] == 1
    manifest = json.loads((owl_bundles / "owl-int8" / "bundle.json").read_text())
    quantized = {"QuantAttention", "QuantLayerNorm", "QuantLinear", "QuantLinearToFloat", "QuantPatches"}
    assert {*manifest["ops"]["used"]} == {"SoftNMS", *quantized}
    assert manifest["suppression"]["min_score"] == 0.1
    assert all(row["measured"] > 0.99 for row in report["bars"].values())


def test_check_passes(owl_bundles: Path, capsys: pytest.CaptureFixture[str]):
    assert check_command(["owl-int8", "--bundles", str(owl_bundles), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {"detect: kept_boxes", "regions: class_embeds rows are unit vectors"} <= {
        check["check"].split(" [")[0] for check in checks
    }


def test_int8_detects_the_best_object_of_float(runners: dict[str, Runner], shown):
    for more in ({"labels": LABELS}, {"examples": [shown["turned"]]}):
        best = [next(iter(runners[side].detect(shown["wide"], **more))) for side in ("float", "int8")]
        assert best[0].score == pytest.approx(best[1].score, abs=0.05)
        assert best[0].index == best[1].index


def test_picture_input_with_a_gaussian_is_refused_before_any_tower_is_traced(
    case_of: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    owlv2, owlvit, file = case_of("owlv2"), case_of("owlvit"), tmp_path / "recipe.toml"
    capsys.readouterr()
    file.write_text('name = "owl"\npicture_input = true\n')
    monkeypatch.setattr(trace, "to_onnx", lambda tower: pytest.fail("it was traced"))
    out = ["--out", str(tmp_path / "out"), "--recipe", str(file)]
    for verb in ("recipe", "export"):
        assert main([verb, str(owlv2.directory), *out]) == 2
        error = capsys.readouterr().err
        assert "resampled by a Gaussian, which ImageToPixels does not do; leave picture_input out" in error
        assert error.count("\n") == 1
    assert main(["recipe", str(owlvit.directory), *out]) == 0
    recipe = Recipe(checkpoint="x", net="owl", name="owl", picture_input=True)
    with pytest.raises(BadRequest, match="Gaussian"):
        pipeline.build(recipe, tmp_path / "out", net=owlv2.net)
