import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from calmclip.export.nets import NETS, Net
from calmclip.export.nets.mini import RANGES
from calmclip.export.nets.mini.regions import BACKGROUND, embed
from calmclip.export.nets.mini.towers import SHIPPED
from calmclip.export.trace import fingerprint, to_onnx
from calmclip.models.preprocess.image import ImagePreparer, decode


@pytest.fixture(scope="module")
def net() -> Net:
    return NETS.get("mini").load("mini")


def test_recognises_its_name_and_a_directory_with_heads(tmp_path: Path):
    plugin = NETS.get("mini")
    assert plugin.recognise("mini")
    assert not plugin.recognise(str(tmp_path))
    shutil.copy(SHIPPED, tmp_path)
    assert plugin.recognise(str(tmp_path))
    assert plugin.load(str(tmp_path)).source.weights["heads.safetensors"]


@pytest.mark.parametrize(
    ("photograph", "best"), [("cat", "a cat"), ("coffee", "a cup of coffee"), ("flower", "a flower")]
)
def test_photographs_match_their_sentence(net: Net, photographs: dict[str, Path], photograph: str, best: str):
    sentences = ["a cat", "a cup of coffee", "a flower", "a car in the street", "a man on a horse"]
    tokenizer = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(sentences)
    image, text = net.towers["image"], net.towers["text"]
    pixels, _ = ImagePreparer(image.preprocess).prepare(decode(photographs[photograph].read_bytes()))
    with torch.inference_mode():
        words = text.module(torch.tensor([r.ids for r in rows]), torch.tensor([r.attention_mask for r in rows]))
        cosines = image.module(torch.from_numpy(pixels)) @ words.T
    assert sentences[int(cosines.argmax())] == best


def test_constants_of_the_detect_graph_do_not_depend_on_torchs_threads(net: Net):
    """Else two machines would export two bundles."""
    threads, rows = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rows.append(embed(net.towers["text"].module, net.files["tokenizer.json"], BACKGROUND))
    finally:
        torch.set_num_threads(threads)
    assert rows[0].dtype == np.float32
    assert rows[0].tobytes() == rows[1].tobytes()


def test_the_tokenizer_neither_pads_nor_truncates(net: Net):
    tokenizer = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    assert tokenizer.encode("a cat").ids == [101, 1037, 4937, 102]  # [CLS] a cat [SEP] of the BERT vocabulary
    assert len(tokenizer.encode("cat " * 300).ids) == 302


def test_recorded_ranges_fit_the_graphs(net: Net):
    recorded = json.loads(RANGES.read_text())
    assert recorded["pictures"]
    for role, tower in net.towers.items():
        assert recorded["graphs"][role]["fingerprint"] == fingerprint(to_onnx(tower)), (
            "run calmclip.export.nets.mini.record"
        )
        assert recorded["graphs"][role]["quantizer"] == tower.quantizer
