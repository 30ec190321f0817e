"""A checkpoint of real size, with random weights: CLIP ViT-B/32, 151 million numbers. Slow: minutes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from calmclip.export.nets import NETS
from calmclip.export.pipeline import build
from calmclip.export.recipe import load_recipe
from calmclip.models.runner import open_bundle
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "vit-b-32"
    small = tiny.hf_clip(directory.with_name("small"))
    torch.manual_seed(0)
    config = transformers.CLIPConfig()  # transformers' defaults are ViT-B/32
    transformers.CLIPModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, directory)
    preprocessor = json.loads((small / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.mark.slow
def test_vit_b_32_becomes_an_int8_bundle_of_a_third_of_its_size(checkpoint: Path, tmp_path: Path, photographs):
    net = NETS.get("clip").load(str(checkpoint))
    # random towers map everything to nearly one point, which flatters the cosine; size and walk are under test
    recipe = load_recipe(str(checkpoint), "clip", net, name="vit-b-32", keep_float=True)
    int8, whole = build(recipe, tmp_path, net=net)
    sizes = [sum(file.bytes for file in sealed.manifest.files.values()) for sealed in (int8, whole)]
    assert sizes[1] > 590e6  # 151 million numbers in float32
    assert sizes[0] < 0.35 * sizes[1]
    ranked = list(open_bundle(int8.directory).classify(photographs["cat"], ["a cat", "two dogs", "red"]))
    assert sum(match.score for match in ranked) == pytest.approx(1.0, abs=1e-5)
