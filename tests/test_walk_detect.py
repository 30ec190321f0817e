"""All steps of a detector: transformers writes an OWLv2 or OWL-ViT, one command exports it, `calmclip check` accepts
it, and a real server answers over HTTP as transformers does."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from calmclip.models.cli import main
from tests import tiny
from tests.asking import b64
from tests.test_walk import serving

LABELS = ["a cat", "two dogs"]


@pytest.fixture(scope="module")
def server(owl_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(owl_bundles, tmp_path_factory.mktemp("data")) as client:
        yield client


@pytest.fixture(scope="module")
def rotated(photographs: dict[str, Path]) -> bytes:
    """A tall photograph whose stored pixels are rotated."""
    tags = Image.Exif()
    tags[0x0112] = 6  # a rotation by 90 degrees to the right makes it upright
    file = io.BytesIO()
    Image.open(photographs["cat"]).convert("RGB").save(file, "PNG", exif=tags)
    return file.getvalue()


@dataclass(frozen=True)
class Detector:
    server: httpx.Client
    bundles: Path
    model: transformers.PreTrainedModel
    processor: transformers.BaseImageProcessor


@pytest.fixture
def owlv2(server: httpx.Client, owl_bundles: Path, tiny_owl: Path) -> Detector:
    model = transformers.Owlv2ForObjectDetection.from_pretrained(tiny_owl).eval()
    return Detector(server, owl_bundles, model, transformers.Owlv2ImageProcessor.from_pretrained(tiny_owl))


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    root = tmp_path_factory.mktemp("owlvit")
    checkpoint = tiny.owl(root / "owl", "owlvit", side=128, patch=32)
    assert main(["export", str(checkpoint), "--out", str(root / "bundles"), "--keep-float"]) == 0
    model = transformers.OwlViTForObjectDetection.from_pretrained(checkpoint).eval()
    processor = transformers.OwlViTImageProcessorPil.from_pretrained(checkpoint)
    with serving(root / "bundles", root / "data") as client:
        yield Detector(client, root / "bundles", model, processor)


@pytest.fixture
def detector(request: pytest.FixtureRequest) -> Detector:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("detector", ["owlv2", pytest.param("owlvit", marks=pytest.mark.slow)], indirect=True)
def test_labels_are_found_where_transformers_finds_them(detector: Detector, rotated: bytes):
    model, processor = detector.model, detector.processor
    upright = Image.open(io.BytesIO(rotated)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    rows = [tiny.tokenizer().encode(f"a photo of a {label}").ids for label in LABELS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    with torch.inference_mode():
        outputs = model(
            input_ids=ids,
            attention_mask=torch.tensor([[i < len(row) for i in range(length)] for row in rows]).long(),
            pixel_values=torch.tensor(np.asarray(processor(upright, return_tensors="np")["pixel_values"])),
        )
    (want,) = processor.post_process_object_detection(outputs, 0.0, target_sizes=[upright.size[::-1]])
    inside = want["boxes"][:, 1] < upright.height - 1
    inside &= want["boxes"][:, 0] < upright.width - 1
    best = int(torch.where(inside, want["scores"], 0.0).argmax())

    form = {"labels": LABELS, "method": "hard", "max_output": 1000}
    for name, score, pixels in (("owl-float", 1e-3, 0.1), ("owl-int8", 0.15, None)):
        assert main(["check", name, "--bundles", str(detector.bundles)]) == 0
        answer = detector.server.post("/v1/detect", files={"image": rotated}, data={**form, "model": name})
        assert answer.status_code == 200, answer.text
        result = answer.json()
        assert result["image"] == {"width": upright.width, "height": upright.height}
        assert result["suppression"]["min_score"] == 0.1  # the default of the bundle
        first = result["detections"][0]
        assert first["raw_score"] == pytest.approx(float(want["scores"][best]), abs=score)
        if pixels:
            assert first["index"] == int(want["labels"][best])
            box = np.clip(want["boxes"][best].numpy(), 0, [*upright.size] * 2)
            assert list(first["box"].values()) == pytest.approx(box.tolist(), abs=pixels)


@pytest.mark.parametrize("detector", ["owlv2", pytest.param("owlvit", marks=pytest.mark.slow)], indirect=True)
def test_int8_agrees_with_float(detector: Detector):
    report = json.loads((detector.bundles / "owl-int8" / "report.json").read_text())
    assert report["int8"]["coverage"] >= 0.9
    for facts in report["graphs"].values():
        assert all(output["max_abs"] <= 1e-4 for output in facts["float_against_torch"].values())
        assert all(output["cosine"] >= 0.99 for output in facts["int8_against_float"].values())


def test_an_example_is_found_again(server: httpx.Client, photographs: dict[str, Path]):
    picture = b64(photographs["rocket"].read_bytes())
    body = {"image": picture, "labels": LABELS, "examples": [{"image": picture, "label": "this"}], "max_output": 1000}
    for name in ("owl-float", "owl-int8"):
        answer = server.post("/v1/detect", json=body | {"model": name})
        assert answer.status_code == 200, answer.text
        matches = [row for row in answer.json()["detections"] if row["index"] == 2]
        assert {row["label"] for row in matches} == {"this"}
        assert max(row["raw_score"] for row in matches) > 0.5
