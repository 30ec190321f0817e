from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calmclip.export import calibrate, samples
from calmclip.export.nets import NETS, Net
from calmclip.export.recipe import Calibration, Quantize
from calmclip.models.errors import BadImage, BadRequest


@pytest.fixture
def net(tiny_hf_clip: Path, tmp_path: Path) -> Net:
    """A net. Its tokenizer is in ``tmp_path``."""
    net = NETS.get("clip").load(str(tiny_hf_clip))
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    return net


def files(folder: Path, contents: list[bytes]) -> Path:
    """A folder of pictures that are never decoded."""
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.jpg").write_bytes(content)
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_a_users_inputs_are_drawn_into_three_parts_without_common_content(net: Net, tmp_path: Path, seed: int):
    """40 contents, each in two files; 40 texts, each in two spellings: 10 + 7 + 23, as 40 / 4 and 30 / 4."""
    folder = files(tmp_path / "p", [f"{number // 2}".encode() for number in range(80)])
    lines = [spelling for number in range(40) for spelling in (f"{number} cats", f" {number}  CATS ")]
    (tmp_path / "t.txt").write_text("\n".join([*lines, "too long " * 40]))
    said: list[str] = []
    how = Calibration(images=folder, texts=tmp_path / "t.txt", seed=seed)
    drawn = calibrate.inputs(how, net, tmp_path, said.append)
    assert drawn == calibrate.inputs(how, net, tmp_path)
    assert drawn != calibrate.inputs(how.model_copy(update={"seed": seed + 1}), net, tmp_path)
    contents = {part: {path.read_bytes() for path in drawn.part(part)[0]} for part in calibrate.PARTS}
    words = {part: {text.strip().split()[0] for text in drawn.part(part)[1]} for part in calibrate.PARTS}
    for sets in (contents, words):
        assert {part: len(rows) for part, rows in sets.items()} == {"calibration": 23, "search": 7, "certificate": 10}
        assert len(set.union(*sets.values())) == 40
    counts = {"calibration": 23, "search": 7, "certificate": 10}
    assert drawn.facts() == {
        "seed": seed, "pictures": {"source": "p", **counts}, "texts": {"source": "t.txt", **counts}
    }  # fmt: skip
    assert drawn.describe(net.towers["image"]) == f"23 pictures, and 7 others to search with (p), seed {seed}"
    assert said == ["1 calibration texts are longer than the context and left out"]


def test_the_parts_have_a_largest_size(net: Net, tmp_path: Path):
    folder = files(tmp_path / "p", [f"{number}".encode() for number in range(300)])
    counts = calibrate.inputs(Calibration(images=folder, count=40), net, tmp_path).facts()["pictures"]
    assert counts == {"source": "p", "calibration": 30, "search": 10, "certificate": 104 // 4}
    counts = calibrate.inputs(Calibration(images=folder), net, tmp_path).facts()["pictures"]
    assert counts == {"source": "p", "calibration": 160, "search": 32, "certificate": 256 // 4}


@pytest.mark.parametrize("number", [31, 32])
def test_too_few_different_inputs_are_an_error_that_says_how_many_are_needed(net: Net, tmp_path: Path, number: int):
    folder = files(tmp_path / "p", [f"{place % number}".encode() for place in range(60)])
    (tmp_path / "t.txt").write_text("\n".join(f"{place % number} cats" for place in range(60)))
    for how in (Calibration(images=folder), Calibration(texts=tmp_path / "t.txt")):
        if number >= 32:
            counts = calibrate.inputs(how, net, tmp_path).facts()["pictures" if how.images else "texts"]
            assert (counts["calibration"], counts["search"], counts["certificate"]) == (18, 6, 8)
            continue
        with pytest.raises(BadRequest, match=r"(p|t\.txt) has 31 different inputs that fit; .* at least 32 are needed"):
            calibrate.inputs(how, net, tmp_path)


def test_the_samples_that_ship_are_divided_too(net: Net, tmp_path: Path):
    drawn = calibrate.inputs(Calibration(), net, tmp_path)
    assert [*drawn.pictures.certificate] == samples.pictures()
    assert [*drawn.texts.certificate] == calibrate.fitting(net, tmp_path, samples.texts())
    rows = *drawn.pictures.calibration, *drawn.pictures.search
    assert sorted(rows) == samples.calibration_pictures()
    assert len(drawn.pictures.search) == len(rows) // 4
    images = replace(net, towers={"image": net.towers["image"]})
    assert "texts" not in calibrate.inputs(Calibration(), images, tmp_path).facts()


def test_an_input_without_pictures_or_texts_is_an_error(net: Net, tmp_path: Path):
    with pytest.raises(BadRequest, match=r"holds no pictures; expected files ending in \.jpg"):
        calibrate.inputs(Calibration(images=tmp_path), net, tmp_path)
    (tmp_path / "t.txt").write_text("\n\n")
    with pytest.raises(BadRequest, match="holds no texts"):
        calibrate.inputs(Calibration(texts=tmp_path / "t.txt"), net, tmp_path)
    (tmp_path / "t.txt").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(BadRequest, match=r"t\.txt is no text in UTF-8 .*; expected one text per line"):
        calibrate.inputs(Calibration(texts=tmp_path / "t.txt"), net, tmp_path)


def test_feeds_are_those_of_the_service(net: Net, tmp_path: Path, photographs: dict[str, Path]):
    (image,) = calibrate.feeds(net.towers["image"], tmp_path, [photographs["cat"]], [])
    assert image["pixels"].shape == (1, 3, 32, 32)
    (text,) = calibrate.feeds(net.towers["text"], tmp_path, [], ["a cat"])
    assert text["ids"].tolist() == [[598, 0, 6, 599]]
    assert calibrate.fitting(net, tmp_path, ["a cat", "z" * 50]) == ["a cat"]
    with pytest.raises(BadRequest, match="all 1 calibration texts have more than 40 tokens"):
        calibrate.fitting(net, tmp_path, ["z" * 90])


def test_recorded_ranges_are_valid_for_their_graph_weights_and_quantizer_alone(tmp_path: Path):
    file, how, weights = tmp_path / "ranges.json", Quantize(name="static", params={"percentile": 99.9}), {"w": "12"}
    entry = {"fingerprint": "abc", "quantizer": "static", "params": how.params}
    graphs = {
        "image": entry | {"ranges": {"x": (-1.5, 0.1234567891)}},
        "text": entry | {"ranges": {"y": ([0.0, -1.0], [1.0, 2.0])}},
    }
    calibrate.record(file, "three pictures", ["a.jpg"], weights, graphs)
    recorded = calibrate.recorded(file, "image", "abc", how, weights)
    assert recorded is not None
    assert recorded.source == "three pictures"
    assert np.allclose(recorded.ranges["x"], (-1.5, 0.1234567891), rtol=1e-5)
    assert calibrate.recorded(file, "text", "abc", how, weights).ranges["y"] == ([0.0, -1.0], [1.0, 2.0])
    assert calibrate.recorded(file, "image", "abd", how, weights) is None
    assert calibrate.recorded(file, "image", "abc", Quantize(name="static"), weights) is None
    assert calibrate.recorded(file, "image", "abc", how, {"w": "13"}) is None
    assert calibrate.recorded(file, "regions", "abc", how, weights) is None


def test_a_broken_calibration_picture_is_named(net: Net, tmp_path: Path):
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(BadImage, match=r"half\.jpg: "):
        list(calibrate.feeds(net.towers["image"], tmp_path, [tmp_path / "half.jpg"], []))
