"""Maps with keys and guides, from a checkpoint to masks: export, check, commands, service. The weights are random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from starlette.testclient import TestClient

from calmclip.export import samples
from calmclip.models.cli import main
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import open_bundle
from calmclip.models.segmenters import Windows
from calmclip.models.segmenters.maps import Maps, dense_maps
from calmclip.models.tasks.segment import SegmentRequest, segment
from calmclip.service.app import create_app
from calmclip.service.settings import Settings
from tests import tiny
from tests.asking import b64, until

pytestmark = pytest.mark.slow

OPTIONS = {
    "dinoiser": ("--dense", "values", "--dinoiser", "last.pt"),
    "trident": ("--dense", "guided"),
    "guide": ("--dense", "guided", "--guide", "dino.onnx"),
}
METHOD = {"dinoiser": "dinoiser", "trident": "trident", "guide": "trident"}


def save_layers(file: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = {"obj_proj.bias": (5,), "obj_proj.weight": (5, 32, 3, 3),
              "bkg_decoder.bias": (1,), "bkg_decoder.weight": (1, 32, 1, 1)}  # fmt: skip
    torch.save({"model_state_dict": {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}}, file)


def save_guide(file: Path) -> None:
    """Two convolutions, over pixels of twice the tower's side."""
    random = np.random.default_rng(0)
    weights = {"first": (24, 3, 8, 8), "second": (24, 24, 3, 3)}
    tensors = [numpy_helper.from_array((0.1 * random.standard_normal(shape)).astype(np.float32), name)
               for name, shape in weights.items()]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], strides=[8, 8]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["y"], pads=[1, 1, 1, 1]),
    ]
    pixels = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, 64, 64])
    plane = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 24, 8, 8])
    graph = helper.make_graph(nodes, "dino", [pixels], [plane], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


@pytest.fixture(scope="module", params=OPTIONS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """-> the name of the options, and the INT8 and the float bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny.hf_clip(folder / "clip", 4)
    save_layers(folder / "last.pt")
    save_guide(folder / "dino.onnx")
    options = [str(folder / text) if "." in text else text for text in OPTIONS[request.param]]
    out = folder / "out"
    assert main(["export", str(checkpoint), "--out", str(out), "--name", "tiny", "--keep-float", *options]) == 0
    (int8,) = (path for path in out.iterdir() if path.name in ("tiny-int8", "tiny-mixed"))
    return request.param, int8, out / "tiny-float"


def test_the_bundle_passes_its_own_check(exported: tuple[str, Path, Path]):
    for bundle in exported[1:]:
        assert main(["check", str(bundle)]) == 0


def test_patches_in_int8_point_where_those_in_float_do(exported: tuple[str, Path, Path]):
    runners = [open_bundle(bundle) for bundle in exported[1:]]
    cosines = []
    for file in samples.pictures()[:8]:
        picture = decode(file.read_bytes())
        left, right = (runner.run(dense_maps(runner.bundle, picture)) for runner in runners)
        for name in ("patches", "keys"):
            pair = [getattr(side, name).reshape(-1, getattr(side, name).shape[-1]) for side in (left, right)]
            units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in pair]
            cosines.append((units[0] * units[1]).sum(axis=1).mean())
    assert min(cosines) >= 0.98


def test_one_window_is_the_picture_without_windows(exported: tuple[str, Path, Path]):
    runner = open_bundle(exported[2])
    picture = decode(samples.pictures()[0].read_bytes()).resize((200, 200))
    maps: list[Maps] = [runner.run(dense_maps(runner.bundle, picture, each)) for each in (None, Windows(size=1.0))]
    assert maps[0].patches.tolist() == maps[1].patches.tolist()
    assert maps[0].keys == pytest.approx(maps[1].keys, abs=1e-6)
    assert maps[0].frame == maps[1].frame


def test_the_command_and_the_service_answer_alike(exported: tuple[str, Path, Path], tmp_path: Path, capsys):
    """By the default method and with windows; the service merges the windows of several requests."""
    name, int8, _ = exported
    file = tmp_path / "picture.png"
    Image.open(samples.pictures()[0]).convert("RGB").resize((160, 90)).save(file)
    labels = ["a cat", "a red dog"]
    flags = [flag for label in labels for flag in ("--label", label)]
    argv = ["run", str(int8), "segment", str(file), *flags, "--no-background", "--window", "0.6", "--json"]
    capsys.readouterr()
    assert main(argv) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    settings: Any = Settings(bundles_dir=int8.parent, data_dir=tmp_path / "data", threads=1)
    body = {"model": int8.name, "image": b64(file.read_bytes()), "labels": labels, "background": [], "window": 0.6}
    with TestClient(create_app(settings)) as client:
        until(lambda: client.get("/readyz").status_code == 200, 60)
        replies = [client.post("/v1/segment", json=body) for _ in range(2)]
        wrong = client.post("/v1/segment", json={**body, "method": "trident", "params": {"factor": -1}})
    assert [reply.status_code for reply in replies] == [200, 200]
    segments = replies[0].json()["segments"]
    assert replies[0].json()["method"] == METHOD[name]
    assert {part["label"]: part["rle"] for part in segments} == {
        part["label"]: part["mask"] for part in answer["segment"]
    }
    assert wrong.status_code == 422
    assert "factor" in wrong.text


def test_many_pictures_answer_as_each_alone(exported: tuple[str, Path, Path]):
    runner = open_bundle(exported[1])
    pictures = [decode(file.read_bytes()).resize((96, 64)) for file in samples.pictures()[:4]]
    requests = [SegmentRequest(picture, ["a cat", "a dog"], windows=Windows(size=0.7)) for picture in pictures]
    together = [*runner.map(segment(runner.bundle, request) for request in requests)]
    for request, answer in zip(requests, together, strict=True):
        alone = runner.run(segment(runner.bundle, request))
        assert [(part.label, part.mask.rle()) for part in answer] == [(part.label, part.mask.rle()) for part in alone]
