"""The map of tests/service/conftest.py is the mean brightness of the picture, so the numbers are worked out by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.manifest import MANIFEST
from calmclip.models.cli import main
from tests.asking import b64, metric, raw


def pixels(data: bytes) -> np.ndarray:
    """Of a PNG file."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    return np.asarray(image)


def grey(left: int, right: int, size: tuple[int, int] = (8, 6)) -> bytes:
    """A PNG with two halves."""
    array = np.full((size[1], size[0]), left, np.uint8)
    array[:, size[0] // 2 :] = right
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_divided_by_its_map_and_clipped(client):
    """The mean of 60 and 140 is 100, as a part of 255: 60 / (100 / 255) = 153, and 140 -> 357 -> 255."""
    for sent in (raw(grey(60, 140)), {"json": {"image": b64(grey(60, 140))}}, {"files": {"image": grey(60, 140)}}):
        answer = client.post("/v1/enhance", **sent)
        assert answer.headers["content-type"] == "image/png"
        enhanced = pixels(answer.content)
        assert enhanced.shape == (6, 8, 3)
        assert (enhanced[:, :4] == 153).all()
        assert (enhanced[:, 4:] == 255).all()
    assert "infer;dur=" in answer.headers["server-timing"]


def test_the_answer_is_as_large_as_the_picture_for_a_map_of_fewer_pixels(client):
    answer = client.post("/v1/enhance?map_pixels=1024", **raw(grey(60, 140, (300, 200))))
    assert pixels(answer.content).shape == (200, 300, 3)
    assert (pixels(answer.content)[:, :140] == 153).all()


def test_a_large_jpeg_is_decoded_whole(client, halved):
    """Every other task reads half of its sides. The gate counts what is decoded."""
    for route, size in (("classify?labels=red", 75 * 50), ("enhance", 150 * 100)):
        before = metric(client, "calmclip_picture_pixels_sum")
        answer = client.post(f"/v1/{route}", **raw(halved(150, 100)))
        assert answer.status_code == 200
        assert metric(client, "calmclip_picture_pixels_sum") - before == size
    assert pixels(answer.content).shape == (100, 150, 3)


@pytest.mark.parametrize(
    ("query", "body", "status", "slug", "says"),
    [
        ("map_pixels=1023", grey(1, 2), 422, "invalid-request", "1024"),
        ("map_pixels=5000", grey(1, 2), 422, "invalid-request", "map_pixels is 5000; at most 4096 are computed"),
        ("map_pixel=2000", grey(1, 2), 422, "invalid-request", "map_pixel"),
        ("model=nothing", grey(1, 2), 404, "model-not-found", "nothing"),
        ("", b"no picture", 415, "unsupported-image", "no picture we read"),
        ("", grey(1, 2, (101, 100)), 413, "image-too-large", "at most 10000"),
    ],
)
def test_limits(settings, serve, query: str, body: bytes, status: int, slug: str, says: str):
    with serve(settings(limits={"map_pixels": 4096, "image_pixels": 10_000})) as client:
        answer = client.post(f"/v1/enhance?{query}", **raw(body))
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}")
    assert says in answer.text


def test_a_bundle_without_the_task_is_a_409(settings, serve, bundle_maker, tmp_path):
    file = bundle_maker(tmp_path / "bundles", "colours-int8").directory / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": ["embed"]}))
    with serve(settings(bundles_dir=tmp_path / "bundles")) as client:
        answer = client.post("/v1/enhance", **raw(grey(1, 2)))
        named = client.post("/v1/enhance?model=colours-int8", **raw(grey(1, 2)))
    assert [(a.status_code, a.json()["type"]) for a in (answer, named)] == [(409, "/problems/task-not-served")] * 2


def test_the_command_writes_pictures_into_a_folder(bundles, tmp_path, capsys):
    for name, right in (("dark", 140), ("darker", 90)):
        (tmp_path / f"{name}.png").write_bytes(grey(60, right))
    pictures = [str(tmp_path / f"{name}.png") for name in ("dark", "darker")]
    command = [
        "run",
        "colours-int8",
        "enhance",
        "--bundles",
        str(bundles),
        "--json",
        "--out",
        str(tmp_path / "new" / "out"),
    ]
    assert main([*command, *pictures]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["picture"], row["map_size"]) for row in answers] == [(path, [8, 6]) for path in pictures]
    assert [pixels(Path(row["enhanced"]).read_bytes())[0, 0, 0] for row in answers] == [153, 204]
    assert main([*command, pictures[0], pictures[0]]) == 2
    assert "two pictures have one name" in capsys.readouterr().err
