"""`calmclip index`: against a service whose answers are written here, and in process. test_cli.py has a service."""

import asyncio
import base64
import hashlib
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from calmclip.models.cli import main
from calmclip.models.errors import CalmclipError
from calmclip.models.preprocess import image as preprocessing
from calmclip.service import indexing
from calmclip.service.indexing import FIRST_PICTURES, MOST_PICTURES, REQUEST_S, TRIES, Pace, _Service
from calmclip.service.thumbnails import thumbnail


def asked(*statuses: int) -> list[tuple[str, str, object]]:
    """The requests that one call sends if their answers have these statuses."""
    requests: list[tuple[str, str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        status = statuses[len(requests)]
        requests.append((request.method, request.url.path, json.loads(request.content)))
        return httpx.Response(status, headers={"retry-after": "0"}, json={"detail": f"number {len(requests)}"})

    async def ask() -> None:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            await _Service(client, "a b").ask("POST", "/items", {"items": []})

    try:
        asyncio.run(ask())
    except CalmclipError as error:
        requests.append(("error", str(error), None))
    return requests


POSTED = ("POST", "/v1/collections/a b/items", {"items": []})


@pytest.mark.parametrize(
    ("statuses", "requests"),
    [
        ([200], [POSTED]),
        ([503, 503, 200], [POSTED] * 3),
        ([500], [POSTED, ("error", "500 number 1", None)]),
        ([503] * TRIES, [POSTED] * TRIES + [("error", f"503 number {TRIES}", None)]),
    ],
)
def test_a_request_is_repeated_while_the_service_is_overloaded(statuses: list[int], requests: list[object]):
    assert asked(*statuses, 200) == requests


@pytest.fixture
def index(bundles, tmp_path, monkeypatch, capsys):
    """`calmclip index` of the folder `pictures` into the collection c of an own store; -> status, result, errors."""
    monkeypatch.setenv("CALMCLIP_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "pictures"
    folder.mkdir()

    def run(*flags: str) -> tuple[int, dict, str]:
        arguments = ["index", str(folder), "--collection", "c", "--bundles", str(bundles), "--json", "--threads", "1"]
        status = main([*arguments, *flags])
        captured = capsys.readouterr()
        return status, json.loads(captured.out or "{}"), captured.err

    return run


def stored(bundles: Path, capsys) -> dict[str, dict]:
    """id -> metadata, as `calmclip collection items` prints it."""
    assert main(["collection", "items", "c", "--limit", "1000", "--json", "--bundles", str(bundles)]) == 0
    return {item["id"]: item["meta"] for item in json.loads(capsys.readouterr().out)["items"]}


def test_each_picture_is_decoded_once_and_all_is_as_through_a_service(
    index, bundles, tmp_path, picture, monkeypatch, capsys
):
    """Hashes, thumbnails and the count of decoded files come from here; vectors are those of the hand-made bundle."""
    names = [f"{number:02}-{name}.png" for number in range(7) for name in ("red", "green", "blue")]
    for name in names:
        (tmp_path / "pictures" / name).write_bytes(picture(name[3:-4], size=(300, 150)))
    decoded, plain = [], preprocessing.decode
    files = {(tmp_path / "pictures" / name).read_bytes() for name in names}  # of three colours; others warm graphs up
    monkeypatch.setattr(
        preprocessing, "decode", lambda data, **more: (decoded.append(data in files), plain(data, **more))[1]
    )
    status, result, _ = index()
    assert (status, result["added"], result["items"], result["broken"]) == (0, 21, 21, [])
    assert sum(decoded) == len(names)
    metas = stored(bundles, capsys)
    assert list(metas) == sorted(names)
    for name, meta in metas.items():
        data = (tmp_path / "pictures" / name).read_bytes()
        assert (meta["title"], meta["file"], meta["sha256"]) == (name, name, hashlib.sha256(data).hexdigest())
        small = Image.open(io.BytesIO(base64.b64decode(meta["thumbnail"].removeprefix("data:image/jpeg;base64,"))))
        assert (small.format, small.size) == ("JPEG", (100, 50))
        wanted = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[name[3:-4]]
        assert np.abs(np.asarray(small).mean((0, 1)) - wanted).max() < 4
    assert index()[1]["skipped"] == 21
    assert sum(decoded) == len(names)
    search = ["search", "c", "blue", "--bundles", str(bundles), "--top-k", "7", "--min-relevance", "0", "--json"]
    assert main(search) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert {hit["id"][3:] for hit in hits} == {"blue.png"}
    assert [hit["score"] for hit in hits] == pytest.approx([1.0] * 7, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((60, 40), (60, 40)),
        ((128, 9), (128, 9)),
        ((640, 480), (128, 96)),
        ((130, 100), (128, 98)),
        ((1, 999), (1, 125)),
    ],
)
def test_a_thumbnail_is_small_whole_and_as_pillow_averages(size: tuple[int, int], small: tuple[int, int]):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    uri = thumbnail(Image.fromarray(noise))
    made = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (made.format, made.size) == ("JPEG", small)
    assert len(uri) < 16 * 1024 - 1024  # room for the rest of the metadata, also with noise
    assert np.abs(np.asarray(made).mean((0, 1)) - noise.mean((0, 1))).max() < 8


def test_broken_pictures_and_files_of_other_kinds_are_named(index, tmp_path, picture, capsys, bundles):
    folder = tmp_path / "pictures"
    status, result, error = index()
    assert (status, result["added"], result["passed_over"], error) == (0, 0, {}, "")
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    (folder / "films").mkdir()
    for name in ("a.MP4", "b.mp4"):
        (folder / "films" / name).write_bytes(b"x")
    status, result, _ = index()
    assert (status, result["added"]) == (1, 0)
    assert result["passed_over"] == {".mp4": 2, ".txt": 1}
    assert [entry["id"] for entry in result["broken"]] == [f"{number}.jpg" for number in range(5)]
    assert main(["index", str(folder), "--collection", "c", "--bundles", str(bundles)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("skipped 0.jpg, 1.jpg, 2.jpg and 2 more: ")
    assert lines[1] == "passed over 3 other files: 2 .mp4, 1 .txt"


def test_prune_removes_what_is_gone_and_was_indexed(index, bundles, tmp_path, picture, capsys):
    folder = tmp_path / "pictures"
    for name in ("red", "green", "blue"):
        (folder / f"{name}.png").write_bytes(picture(name))
    assert index()[1]["added"] == 3
    settings = indexing.from_environment(bundles_dir=bundles)

    async def add() -> None:  # as the page does: without a hash
        async with indexing._local(settings, "c", None) as service:
            await service.ask("POST", "/items", {"items": [{"id": "page", "text": "red", "meta": {"title": "x"}}]})

    asyncio.run(add())
    (folder / "red.png").unlink()
    assert index()[1]["pruned"] == 0
    assert set(stored(bundles, capsys)) == {"red.png", "green.png", "blue.png", "page"}
    status, result, _ = index("--prune")
    assert (status, result["pruned"], result["skipped"], result["items"]) == (0, 1, 2, 3)
    assert set(stored(bundles, capsys)) == {"green.png", "blue.png", "page"}

    for name in ("green", "blue"):
        (folder / f"{name}.png").rename(folder / f"new-{name}.png")
    status, result, error = index("--prune")
    assert (status, result) == (2, {})
    assert "none of the 2 indexed items has its file" in error
    assert set(stored(bundles, capsys)) == {"green.png", "blue.png", "page"}  # and nothing was added
    assert index("--prune", "--yes")[1]["pruned"] == 2
    assert set(stored(bundles, capsys)) == {"new-green.png", "new-blue.png", "page"}
    for file in folder.iterdir():
        file.unlink()
    for flags in (["--prune"], ["--prune", "--yes"]):
        status, _, error = index(*flags)
        assert (status, "has no picture" in error) == (2, True)
    assert len(stored(bundles, capsys)) == 3


def test_requests_grow_while_they_are_quick_and_shrink_when_they_are_slow():
    pace, sizes = Pace(), []
    for _ in range(6):
        sizes.append(pace.pictures)
        pace.took(pace.pictures, REQUEST_S / 10)
    assert sizes == [FIRST_PICTURES * 2**n for n in range(5)] + [MOST_PICTURES]
    pace.took(3, 0.0)  # the last pictures of a folder say nothing
    pace.took(MOST_PICTURES, REQUEST_S)
    assert pace.pictures == MOST_PICTURES
    pace.took(MOST_PICTURES, 3 * REQUEST_S)
    assert pace.pictures == MOST_PICTURES // 2
    for _ in range(20):
        pace.took(pace.pictures, 3 * REQUEST_S)
    assert pace.pictures == 1
