"""All steps of GRAIN's regions: a training file, one command, a sealed INT8 and float bundle, and regions over HTTP and
from a flow, as the definition in torch gives them. The weights are random."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from calmclip.export import samples
from calmclip.models.cli import main
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.regions import region_vectors
from tests.test_walk import serving
from tests.tiny_layouts import openai_like


def defined(runner: Runner, picture: Path) -> tuple[Array, Array]:
    """Unit vectors [R, D] and boxes [R, 4] in pixels of the picture."""
    pixels = torch.from_numpy(runner.bundle.image("regions").prepare(decode(picture.read_bytes()))[0])
    backbone, decoder = openai_like.Slip(qk_norm=True), openai_like.Decoder()
    vectors, boxes = decoder.regions(backbone.visual.forward_features(pixels), 1.0)
    with Image.open(picture) as image:
        scale = np.array([*image.size, *image.size])
    return vectors[0].numpy(), (boxes[0].numpy() * scale).clip(0, scale)


@pytest.mark.slow
@torch.inference_mode()
def test_regions_are_those_of_the_definition(checkpoint: Any, tmp_path: Path):
    out, pictures = tmp_path / "bundles", samples.pictures()
    assert main(["export", str(checkpoint("grain")), "--out", str(out), "--name", "grain", "--keep-float"]) == 0
    for kind in ("int8", "float"):
        assert main(["check", f"grain-{kind}", "--bundles", str(out)]) == 0
    runners = {kind: open_bundle(out / f"grain-{kind}", threads=1) for kind in ("int8", "float")}
    report = json.loads((out / "grain-int8" / "report.json").read_text())
    for output in ("class_embeds", "boxes", "image_embeds"):
        assert report["graphs"]["regions"]["int8_against_float"][output]["cosine"] >= 0.99, output
    wanted = [defined(runners["float"], picture) for picture in pictures]
    cosines = []
    for picture, (vectors, boxes) in zip(pictures, wanted, strict=True):
        ours, placed = runners["float"].run(region_vectors(runners["float"].bundle, picture))
        assert ours == pytest.approx(vectors, abs=1e-4)
        assert placed == pytest.approx(boxes, abs=0.1)  # of hundreds of pixels
        cosines.append(
            np.sum(runners["int8"].run(region_vectors(runners["int8"].bundle, picture))[0] * vectors, axis=1)
        )
    assert np.mean(cosines) >= 0.99
    with serving(out, tmp_path / "data") as server:
        over_http(server, runners["float"], pictures[0], *wanted[0])


def over_http(server: httpx.Client, runner: Runner, picture: Path, vectors: Array, boxes: Array) -> None:
    """The graph by the Open Inference Protocol, whose vector of the picture is that of /v1/embed, by the graph `image`;
    classify by GRAIN's rule in float64, and detect over the regions."""
    pixels = runner.bundle.image("regions").prepare(decode(picture.read_bytes()))[0]
    fed = {"name": "pixels", "datatype": "FP32", "shape": [*pixels.shape], "data": pixels.flatten().tolist()}
    answer = server.post("/v2/models/grain-float.regions/infer", json={"inputs": [fed]})
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer.json()["outputs"]}
    assert outputs["class_embeds"][0] == pytest.approx(vectors, abs=1e-4)
    image = {"image": {"b64": base64.b64encode(picture.read_bytes()).decode()}}
    embedded = server.post("/v1/embed", json={"model": "grain-float", "inputs": [image]})
    whole = np.array(embedded.json()["embeddings"][0])
    assert outputs["image_embeds"][0] == pytest.approx(whole, abs=1e-5)

    texts = ["a dog", "a cat", "a wet nose", "long whiskers", "pointed ears"]
    answer = server.post("/v1/embed", json={"model": "grain-float", "inputs": [{"text": text} for text in texts]})
    rows = np.array(answer.json()["embeddings"])
    scale = runner.bundle.classifier.params["scale"]
    described = {"a dog": [texts[2]], "a cat": texts[3:]}
    asked = {"model": "grain-float", **image, "labels": texts[:2], "templates": ["{}"]}
    answer = server.post("/v1/classify", json={**asked, "descriptions": described, "alpha": 0.25}).json()
    near = vectors.astype(np.float64) @ rows.T
    best = np.stack([near[:, 2], near[:, 3:].max(axis=1)], axis=1).mean(axis=0)  # GRAIN's rule
    powers = np.exp(scale * (0.25 * (rows[:2] @ whole) + 0.75 * best))
    scores = {row["label"]: row["score"] for row in answer["labels"]}
    assert [scores[text] for text in texts[:2]] == pytest.approx(powers / powers.sum(), abs=1e-3)

    every = {"method": "hard", "iou_threshold": 1.0, "min_score": 0.0}
    detected = server.post("/v1/detect", json={**asked, **every}).json()["detections"]
    sides = [[row["box"][side] for side in ("x0", "y0", "x1", "y1")] for row in detected]
    assert len(detected) == 2 * len(vectors)
    assert np.array(sorted(sides)) == pytest.approx(np.array(sorted(np.repeat(boxes, 2, axis=0).tolist())), abs=0.1)
