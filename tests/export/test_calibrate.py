from pathlib import Path

import numpy as np
import pytest

from calmclip.export import calibrate
from calmclip.export.nets import NETS, Net
from calmclip.export.recipe import Calibration, Quantize
from calmclip.models.errors import BadImage, BadRequest


@pytest.fixture
def net(tiny_hf_clip: Path, tmp_path: Path) -> Net:
    """A net. Its tokenizer is in ``tmp_path``."""
    net = NETS.get("clip").load(str(tiny_hf_clip))
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    return net


def test_pictures_are_drawn_by_seed_up_to_the_count(photographs: dict[str, Path]):
    folder = photographs["cat"].parent
    draw = [calibrate.inputs(Calibration(images=folder, count=3, seed=seed))[0] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert all(len(set(pictures)) == 3 for pictures in draw)


def test_an_input_without_pictures_or_texts_is_an_error(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"holds no pictures; expected files ending in \.jpg"):
        calibrate.inputs(Calibration(images=tmp_path))
    (tmp_path / "t.txt").write_text("\n\n")
    with pytest.raises(BadRequest, match="holds no texts"):
        calibrate.inputs(Calibration(texts=tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(BadRequest, match=r"t\.txt is no text in UTF-8 .*; expected one text per line"):
        calibrate.inputs(Calibration(texts=tmp_path / "t.txt"))


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
