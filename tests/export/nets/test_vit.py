"""The oracle is transformers' model and processor on photographs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from calmclip.export.nets.vit import load
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.preprocess.image import ImagePreparer, decode
from tests.tiny import changed


@torch.no_grad()
def test_photographs_are_prepared_and_scored_as_transformers_does(tiny_vit: Path, photographs: dict[str, Path]):
    processor = transformers.ViTImageProcessorPil.from_pretrained(tiny_vit)
    reference = transformers.ViTForImageClassification.from_pretrained(tiny_vit).eval()
    tower = load(str(tiny_vit)).towers["logits"]
    for name in ("cat", "rocket"):
        pixels = processor(Image.open(photographs[name]).convert("RGB"), return_tensors="pt")["pixel_values"]
        ours = torch.from_numpy(ImagePreparer(tower.preprocess).prepare(decode(photographs[name].read_bytes()))[0])
        assert torch.allclose(ours, pixels, atol=2.1 / 255)  # a grey level
        assert torch.allclose(tower.module(pixels), reference(pixels).logits, atol=1e-5)


def test_classes_have_their_names(tiny_vit: Path, tmp_path: Path):
    net = load(str(tiny_vit))
    assert json.loads(net.files[net.classifier.labels]) == ["cat", "dog", "naïve café"]
    copy = changed(tiny_vit, tmp_path / "changed", id2label={"3": "bird"})
    with pytest.raises(UnknownCheckpoint, match="id2label names 4 classes; the weights have 3"):
        load(str(copy))


@torch.no_grad()
def test_a_norm_of_the_embeddings_is_read(tiny_vit: Path, tmp_path: Path):
    reference = transformers.ViTForImageClassification.from_pretrained(tiny_vit).eval()
    pixels, plain = torch.randn(2, 3, 32, 32), load(str(tiny_vit)).towers["logits"].module
    norm = torch.nn.LayerNorm(32, eps=1e-12)
    norm.weight.uniform_(0.5, 2)
    norm.bias.normal_()
    reference.vit.embeddings.dropout = norm  # the last layer of the embeddings
    directory = shutil.copytree(tiny_vit, tmp_path / "normed")
    state = load_file(directory / "model.safetensors")
    more = {f"vit.embeddings.layernorm.{name}": tensor.clone() for name, tensor in norm.state_dict().items()}
    save_file(state | more, directory / "model.safetensors")
    logits = load(str(directory)).towers["logits"].module(pixels)
    assert torch.allclose(logits, reference(pixels).logits, atol=1e-5)
    assert not torch.allclose(logits, plain(pixels), atol=1e-2)


@pytest.mark.parametrize(
    ("config", "size", "resize"),
    [
        ({"size": 32}, (32, 32), "exact"),
        ({"size": {"height": 32, "width": 32}, "image_mean": None, "resample": 3}, (32, 32), "exact"),
        ({"size": {"shortest_edge": 36}, "crop_size": 32, "do_center_crop": True}, (32, 32), "shortest"),
    ],
)
def test_the_preprocessing_is_that_of_the_processor_config(
    config: dict, size: tuple[int, int], resize: str, tiny_vit: Path, tmp_path: Path
):
    directory = shutil.copytree(tiny_vit, tmp_path / "other")
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    spec = load(str(directory)).towers["logits"].preprocess
    assert (spec.size, spec.resize, spec.mean) == (size, resize, (0.5, 0.5, 0.5))
    assert spec.resample == ("bicubic" if config.get("resample") == 3 else "bilinear")


def test_positions_of_another_size_and_a_missing_processor_are_refused(tiny_vit: Path, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match="17 positions are not those of a class token and the patches of 8"):
        load(str(changed(tiny_vit, tmp_path / "changed", image_size=40)))
    directory = shutil.copytree(tiny_vit, tmp_path / "unprepared")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(UnknownCheckpoint, match=r"preprocessor_config\.json"):
        load(str(directory))
