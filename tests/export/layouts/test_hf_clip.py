"""The files of a Hugging Face CLIP. `test_libraries` compares with transformers' processor, tokenizer and model."""

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from calmclip.export.checkpoints import hugging_face
from calmclip.export.layouts import hf_siglip
from calmclip.export.nets.clip import load
from calmclip.models.errors import UnknownCheckpoint
from tests import tiny


def test_the_temperature_is_the_models(tiny_hf_clip):
    reference = transformers.CLIPModel.from_pretrained(tiny_hf_clip)
    scale = load(str(tiny_hf_clip)).classifier.head.params["scale"]
    assert scale == pytest.approx(float(np.exp(reference.logit_scale.item())))


@pytest.mark.parametrize("end", [2, 6])
@torch.inference_mode()
def test_a_text_is_pooled_where_transformers_pools_it(end: int, tiny_hf_clip, tmp_path):
    """The first configs say eos_token_id 2 for every vocabulary, and mean the highest id; any other id means itself."""
    copy = tiny.changed(tiny_hf_clip, tmp_path / "changed", text_config={"eos_token_id": end})
    ids = torch.tensor([[598, 2, 0, 6, 5, 599, 0, 0]])
    want = transformers.CLIPModel.from_pretrained(copy).eval().get_text_features(input_ids=ids).pooler_output
    answer = load(str(copy)).towers["text"].module(ids)
    assert answer.numpy() == pytest.approx(torch.nn.functional.normalize(want, dim=-1).numpy(), abs=1e-5)


def test_a_checkpoint_without_a_preprocessor_is_an_error(tiny_hf_clip, tmp_path):
    copy = shutil.copytree(tiny_hf_clip, tmp_path / "changed")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UnknownCheckpoint, match=r"preprocessor_config\.json"):
        load(str(copy))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("hf_clip", {}, r"expected tokenizer\.json, or vocab\.json with merges\.txt"),
        ("hf_clip", {"vocab.json": '{"a</w>": 0}'}, "has no tokenizer; expected"),  # no merges
        # the file of another tokenizer; transformers does not read it
        ("hf_clip", {"vocab.txt": "a\nb\n"}, "has no tokenizer; expected"),
        ("hf_clip", {"vocab.json": '{"a</w>": 0}', "merges.txt": "#version: 0.2\n"}, "knows 1 words; expected"),
        ("hf_clip", {"tokenizer.json": "{}"}, "has no tokenizer that transformers reads"),
        ("hf_siglip", {}, r"has no tokenizer; expected tokenizer\.json, or spiece\.model"),
        ("hf_siglip2", {}, r"has no tokenizer; expected tokenizer\.json, or spiece\.model"),
        ("open_clip_siglip", {}, r"json, or vocab\.json with merges\.txt, or vocab\.txt, or spiece\.model"),
        ("chinese_clip", {}, r"has no tokenizer; put the .*vocab\.txt"),
    ],
)
def test_a_directory_without_a_tokenizer_is_an_error_that_names_the_files(
    name: str, files: dict[str, str], message: str, checkpoint, tmp_path
):
    """Without these files, transformers would make a tokenizer of two special tokens and no word."""
    copy = shutil.copytree(checkpoint(name), tmp_path / "changed")
    for file in (*copy.glob("*token*"), *copy.glob("spiece.model"), *copy.glob("vocab.txt")):
        file.unlink()
    for file, text in files.items():
        (copy / file).write_text(text)
    with pytest.raises(UnknownCheckpoint, match=message) as raised:
        load(str(copy))
    assert copy.name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_processor_in_one_file_is_read_alike(tiny_hf_clip, tmp_path):
    """transformers 5 writes only processor_config.json, which contains the image processor."""
    copy = shutil.copytree(tiny_hf_clip, tmp_path / "processor")
    (copy / "preprocessor_config.json").unlink()
    transformers.CLIPProcessor.from_pretrained(tiny_hf_clip).save_pretrained(copy)
    assert not (copy / "preprocessor_config.json").exists()
    assert load(str(copy)).towers["image"].preprocess == load(str(tiny_hf_clip)).towers["image"].preprocess


USUAL = {
    hugging_face.image_preprocess: {
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "rescale_factor": 0.00392156862745098,
    },
    hf_siglip.image_preprocess: {"size": {"height": 224, "width": 224}},
}  # fmt: skip
CLIP, SIGLIP = USUAL


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (CLIP, {"do_center_crop": False}, "do_center_crop = False"),
        (CLIP, {"do_resize": False}, "do_resize = False"),
        (CLIP, {"do_normalize": False}, "do_normalize = False"),
        (CLIP, {"do_rescale": False}, "do_rescale = False"),
        (CLIP, {"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        (CLIP, {"image_mean": None}, "lacks image_mean"),
        (SIGLIP, {"do_center_crop": True}, "do_center_crop = True"),
        (SIGLIP, {"do_resize": False}, "do_resize = False"),
        (SIGLIP, {"size": {"height": 64, "width": 64}}, "64 x 64|'height': 64"),
        (SIGLIP, {"size": {"shortest_edge": 32}}, "shortest_edge"),
        (SIGLIP, {"resample": 1}, "resample = 1"),
    ],
)
def test_another_preprocessing_is_refused_by_name(read: Callable, change: dict, message: str):
    assert read(USUAL[read] | {"do_center_crop": None}, 224).resample == "bicubic"
    with pytest.raises(UnknownCheckpoint, match=message):
        read(USUAL[read] | change, 224)


def test_sizes_as_numbers_and_as_objects_mean_the_same():
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    old = {"size": 224, "crop_size": 224}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert CLIP(new | norm, 224) == CLIP(old | norm, 224)
    with pytest.raises(UnknownCheckpoint, match="longest"):
        CLIP({"size": {"longest_edge": 224}} | norm | {"crop_size": 224}, 224)
