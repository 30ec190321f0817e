"""The oracle is transformers itself: its processor, its tokenizer, its model, on a real photograph."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from calmclip.export.layouts._hugging_face import image_preprocess
from calmclip.export.nets.clip import load
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.runner import open_bundle

TEXTS = ["a photo of a cat.", "two red dogs", "a", "green green green green blue photo of two dogs, a cat and a zebra"]


@pytest.fixture(scope="module")
def reference(tiny_hf_clip: Path):
    return transformers.CLIPModel.from_pretrained(tiny_hf_clip).eval()


def test_pictures_come_out_as_transformers_embeds_them(tiny_bundles, tiny_hf_clip, reference, photographs):
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tiny_hf_clip)
    runner = open_bundle(tiny_bundles / "tiny-float")
    for name in ("cat", "astronaut", "rocket", "coffee"):
        pixels = processor(Image.open(photographs[name]).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = reference.get_image_features(pixel_values=pixels)
        want = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
        assert runner.embed(images=[photographs[name]]) == pytest.approx(want, abs=2e-5)


def test_texts_come_out_as_transformers_embeds_them_alone_and_in_a_batch(tiny_bundles, tiny_hf_clip, reference):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf_clip)
    runner = open_bundle(tiny_bundles / "tiny-float")
    together = runner.embed(texts=TEXTS)
    for index, text in enumerate(TEXTS):
        with torch.no_grad():
            found = reference.get_text_features(**tokenizer([text], return_tensors="pt", return_token_type_ids=False))
        want = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
        assert runner.embed(texts=[text]) == pytest.approx(want, abs=2e-5)
        assert together[index] == pytest.approx(want[0], abs=2e-5)


def test_the_temperature_is_the_models(tiny_bundles, reference):
    head = open_bundle(tiny_bundles / "tiny-float").bundle.manifest.head
    assert head.params["scale"] == pytest.approx(float(np.exp(reference.logit_scale.item())))


def test_missing_tensors_are_named(tiny_hf_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_hf_clip, tmp_path / "lame")
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownCheckpoint, match=r"visual_projection\.weight"):
        load(str(copy))


def test_a_checkpoint_without_its_preprocessor_says_so(tiny_hf_clip, tmp_path):
    copy = shutil.copytree(tiny_hf_clip, tmp_path / "lame")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UnknownCheckpoint, match=r"preprocessor_config\.json"):
        load(str(copy))


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({}, r"has no tokenizer; expected tokenizer\.json, or vocab\.json with merges\.txt"),
        ({"vocab.json": '{"a</w>": 0}'}, "has no tokenizer; expected"),  # without its merges
        ({"vocab.txt": "a\nb\n"}, "has no tokenizer; expected"),  # another kind's, for which transformers does not look
        ({"vocab.json": '{"a</w>": 0}', "merges.txt": "#version: 0.2\n"}, "knows 1 words; expected a whole"),
        ({"tokenizer.json": "{}"}, "has no tokenizer that transformers reads"),
    ],
)
def test_a_directory_without_its_tokenizer_says_which_files_it_lacks(
    there: dict[str, str], named: str, tiny_hf_clip, tmp_path
):
    """Of nothing transformers makes a tokenizer that knows two special tokens and no word."""
    copy = shutil.copytree(tiny_hf_clip, tmp_path / "lame")
    for file in copy.glob("*token*"):
        file.unlink()
    for name, text in there.items():
        (copy / name).write_text(text)
    with pytest.raises(UnknownCheckpoint, match=named) as raised:
        load(str(copy))
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_processor_saved_whole_is_read_alike(tiny_hf_clip, tmp_path):
    """transformers 5 writes processor_config.json alone, the image processor a part of it."""
    copy = shutil.copytree(tiny_hf_clip, tmp_path / "whole")
    (copy / "preprocessor_config.json").unlink()
    transformers.CLIPProcessor.from_pretrained(tiny_hf_clip).save_pretrained(copy)
    assert not (copy / "preprocessor_config.json").exists()
    assert load(str(copy)).towers["image"].preprocess == load(str(tiny_hf_clip)).towers["image"].preprocess


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_center_crop": False}, "do_center_crop = False"),
        ({"do_resize": False}, "do_resize = False"),
        ({"do_normalize": False}, "do_normalize = False"),
        ({"do_rescale": False}, "do_rescale = False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        ({"image_mean": None}, "lacks image_mean"),
    ],
)
def test_another_preprocessing_is_refused_by_name(change: dict, named: str):
    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "rescale_factor": 0.00392156862745098}
    image_preprocess(usual | {"do_center_crop": None}, 224)
    with pytest.raises(UnknownCheckpoint, match=named):
        image_preprocess(usual | change, 224)


def test_sizes_as_numbers_and_as_objects_mean_the_same():
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    old = {"size": 224, "crop_size": 224}
    rest = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert image_preprocess(new | rest, 224) == image_preprocess(old | rest, 224)
    with pytest.raises(UnknownCheckpoint, match="longest"):
        image_preprocess({"size": {"longest_edge": 224}} | rest | {"crop_size": 224}, 224)


def test_the_manifest_names_the_weights_it_came_from(tiny_bundles, tiny_hf_clip):
    import hashlib

    want = hashlib.sha256((tiny_hf_clip / "model.safetensors").read_bytes()).hexdigest()
    manifest = json.loads((tiny_bundles / "tiny-int8" / "bundle.json").read_text())
    assert manifest["source"]["weights"] == {"model.safetensors": want}
