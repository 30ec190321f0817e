"""Pictures and texts through a sealed bundle. Oracles: processor, tokenizer and model of the library that defines the
layout (`tests.tiny_layouts.references`), on photographs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image
from torch.nn.functional import normalize
from torchvision import transforms

from calmclip.export.nets.clip import load
from calmclip.models.preprocess.image import ImagePreparer, decode
from tests import tiny
from tests.tiny_layouts import sealed, siglip
from tests.tiny_layouts.references import REFERENCES

PICTURES = ("cat", "astronaut", "rocket", "coffee")  # wide, square, tall
TEXTS = [
    "a photo of a cat.", "Two dogs' toys, they're 12 o'clock!", "naïve café  déjà   vu", "日本語 emoji 🐱 x",
    "don't  STOP\tnow", "一只猫的照片", "x" * 60,
]  # fmt: skip
PLAIN = ["a photo of a cat.", "two red dogs", "a", "green green green green blue photo of two dogs, a cat and a zebra"]


@dataclass(frozen=True)
class Library:
    """``pixels``: an RGB picture -> [3, H, W]; ``ids``: a text -> the inputs of the reference, [1, T] each."""

    pixels: Callable[[Image.Image], torch.Tensor]
    ids: Callable[[str], Mapping[str, torch.Tensor]]
    texts: list[str]


def padded(tokenize: Callable[[list[str]], torch.Tensor]) -> Callable[[str], Mapping[str, torch.Tensor]]:
    return lambda text: {"ids": tokenize([text])}


def hugging_face(processor: Any, texts: list[str]) -> Callable[[Path], Library]:
    def of(checkpoint: Path) -> Library:
        processed, tokenizer = processor.from_pretrained(checkpoint), transformers.AutoTokenizer
        tokenize = tokenizer.from_pretrained(checkpoint)

        def ids(text: str) -> dict[str, torch.Tensor]:
            encoded = tokenize([text], return_tensors="pt")
            return {"ids": encoded["input_ids"], "mask": encoded["attention_mask"]}

        return Library(lambda picture: processed(picture, return_tensors="pt")["pixel_values"][0], ids, texts)

    return of


def hf_siglip(checkpoint: Path) -> Library:
    """The ids of SigLIP are recorded: see `test_siglip`."""
    processor = transformers.SiglipImageProcessorPil.from_pretrained(checkpoint)
    pixels = lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    return Library(pixels, padded(siglip.reference_tokenizer(checkpoint)), siglip.KNOWN["strings"][:8])


def of_open_clip(checkpoint: Path) -> Library:
    where = f"local-dir:{checkpoint}"
    has_tokenizer = (checkpoint / "tokenizer.json").is_file()
    model, _, pixels = open_clip.create_model_and_transforms(where)
    context = model.context_length
    tokenize = open_clip.get_tokenizer(where) if has_tokenizer else SimpleTokenizer(context_length=context)
    return Library(pixels, padded(tokenize), TEXTS if context > len(TEXTS[-1]) else TEXTS[:-1])


def open_clip_bert(checkpoint: Path) -> Library:
    pixels = image_transform(32, is_train=False, mean=tiny.MEAN, std=tiny.STD)
    return Library(pixels, padded(HFTokenizer(str(checkpoint), context_length=77)), TEXTS)


def chinese_clip(checkpoint: Path) -> Library:
    resize = transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BICUBIC)
    pixels = transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(tiny.MEAN, tiny.STD)])
    tokenize = transformers.BertTokenizer(str(checkpoint / "vocab.txt"))
    ids = lambda texts: tokenize(texts, padding="max_length", max_length=52, return_tensors="pt")["input_ids"]  # noqa: E731
    return Library(pixels, padded(ids), TEXTS[:-1])


def mobileclip(checkpoint: Path) -> Library:
    """The transform of the authors."""
    resize = transforms.Resize(256, interpolation=transforms.InterpolationMode.BILINEAR)
    pixels = transforms.Compose([resize, transforms.CenterCrop(256), transforms.ToTensor()])
    return Library(pixels, padded(SimpleTokenizer()), TEXTS)


LIBRARIES: dict[str, Callable[[Path], Library]] = {
    "altclip_resaved": hugging_face(transformers.CLIPImageProcessorPil, TEXTS[:-1]),
    "chinese_clip": chinese_clip,
    "hf_chinese_clip": hugging_face(transformers.ChineseCLIPImageProcessorPil, TEXTS[:-1]),
    "hf_clip": hugging_face(transformers.CLIPImageProcessorPil, PLAIN),
    "hf_siglip": hf_siglip,
    "hf_siglip2": hf_siglip,
    "mobileclip": mobileclip,
    "open_clip": of_open_clip,
    "open_clip_bert": open_clip_bert,
    "open_clip_siglip": of_open_clip,
    "open_clip_timm": of_open_clip,
    "open_clip_timm_custom_text": of_open_clip,
    "pe_core": of_open_clip,
}
FAST = ("hf_clip", "hf_siglip")  # a byte-pair and a unigram tokenizer
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LIBRARIES]


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_pictures_and_texts_embed_as_by_the_library(name: str, checkpoint, photographs, tmp_path: Path):
    directory = checkpoint(name)
    library, reference = LIBRARIES[name](directory), REFERENCES[name.removesuffix("2")](directory)
    runner = sealed.runner(load(str(directory)), tmp_path, "tiny")
    preprocess, wanted = runner.bundle.manifest.graphs["image"].preprocess, []
    for picture, path in photographs.items():
        pixels = library.pixels(Image.open(path).convert("RGB"))[None]
        grey = np.reshape(preprocess.std, (3, 1, 1)) * 255
        prepared = ImagePreparer(preprocess).prepare(decode(path.read_bytes()))[0]
        assert np.abs((prepared - pixels.numpy()) * grey).max() <= 1.001, "pixels differ by more than a grey level"
        if picture in PICTURES:
            wanted.append(normalize(reference.image(pixels), dim=-1).numpy())
            assert runner.embed(images=[path]) == pytest.approx(wanted[-1], abs=2e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2  # the oracle distinguishes pictures
    want = normalize(torch.cat([reference.text(library.ids(text)) for text in library.texts]), dim=-1).numpy()
    assert np.abs(want[0] - want[1]).max() > 1e-2
    assert runner.embed(texts=library.texts) == pytest.approx(want, abs=2e-5)
    assert runner.embed(texts=library.texts[2:3])[0] == pytest.approx(want[2], abs=2e-5)
