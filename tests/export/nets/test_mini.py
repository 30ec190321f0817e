import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from calmclip.export import parity
from calmclip.export.graph import fingerprint
from calmclip.export.nets import NETS, Net
from calmclip.export.nets.mini import DETECTOR, MASKS, RANGES, SHIPPED, trained
from calmclip.models.preprocess.image import ImagePreparer, decode


@pytest.fixture(scope="module")
def net() -> Net:
    return NETS.get("mini").load("mini")


@pytest.fixture(scope="module")
def runs(net: Net) -> Mapping[str, parity.Run]:
    return {role: parity.onnx_run(net.towers[role].graph) for role in net.towers}


@pytest.mark.parametrize("file", [SHIPPED, DETECTOR, MASKS])
def test_recognises_its_name_and_a_directory_with_a_trained_file(tmp_path: Path, file: Path):
    plugin = NETS.get("mini")
    assert plugin.recognise("mini")
    assert not plugin.recognise(str(tmp_path))
    shutil.copy(file, tmp_path)
    assert plugin.recognise(str(tmp_path))
    assert trained(tmp_path, file) == tmp_path / file.name
    assert all(trained(tmp_path, other) == other for other in {SHIPPED, DETECTOR, MASKS} - {file})


@pytest.mark.parametrize(
    ("photograph", "best"), [("cat", "a cat"), ("coffee", "a cup of coffee"), ("flower", "a flower")]
)
def test_photographs_match_their_sentence(
    net: Net, runs: Mapping[str, parity.Run], photographs: dict[str, Path], photograph: str, best: str
):
    sentences = ["a cat", "a cup of coffee", "a flower", "a car in the street", "a man on a horse"]
    tokenizer = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(sentences)
    pixels, _ = ImagePreparer(net.towers["image"].preprocess).prepare(decode(photographs[photograph].read_bytes()))
    words = {"ids": np.array([r.ids for r in rows]), "mask": np.array([r.attention_mask for r in rows])}
    cosines = runs["image"]({"pixels": pixels})["image_embeds"] @ runs["text"](words)["text_embeds"].T
    assert sentences[int(cosines.argmax())] == best


def test_pictures_of_a_batch_are_independent(net: Net, runs: Mapping[str, parity.Run], photographs: dict[str, Path]):
    tower = net.towers["regions"]
    prepare = ImagePreparer(tower.preprocess).prepare
    cat, dogs = (prepare(decode(photographs[name].read_bytes()))[0] for name in ("cat", "dogs"))
    together = tower.summary(runs["regions"]({"pixels": np.concatenate((cat, dogs))}))
    for row, pixels in enumerate((cat, dogs)):
        alone = tower.summary(runs["regions"]({"pixels": pixels}))
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][row], array[0], atol=1e-3, err_msg=name)
    assert np.abs(together["class_embeds"][0] - together["class_embeds"][1]).max() > 0.1


def test_the_tokenizer_neither_pads_nor_truncates(net: Net):
    tokenizer = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    assert tokenizer.encode("a cat").ids == [101, 1037, 4937, 102]  # [CLS] a cat [SEP] of the BERT vocabulary
    assert len(tokenizer.encode("cat " * 300).ids) == 302


def test_recorded_ranges_fit_the_graphs(net: Net):
    recorded = json.loads(RANGES.read_text())
    assert recorded["pictures"]
    for role, tower in net.towers.items():
        assert recorded["graphs"][role]["fingerprint"] == fingerprint(tower.graph), (
            "run calmclip.export.nets.mini.record"
        )
        assert recorded["graphs"][role]["quantizer"] == tower.quantizer


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from calmclip.models.cli import main
sys.exit(main(["export", "mini", "--no-keep-float", "--json", "--out", sys.argv[1]]))
"""


@pytest.mark.slow  # an export
def test_an_export_needs_no_package_of_the_other_extras(tmp_path: Path):
    absent = {"torch", "torchvision", "transformers", "timm", "open_clip", "matplotlib", "scipy", "tqdm"}
    script = WITHOUT.format(names=absent)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (sealed,) = json.loads(done.stdout)["sealed"]
    assert (Path(sealed["directory"]) / "bundle.json").is_file()
