"""The oracle is open_clip itself: its transforms, its tokenizer, its model, on a real photograph."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from calmclip.export.layouts._clip_bpe import tokenizer_json
from calmclip.export.nets.clip import load
from calmclip.models.cli import main
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.runner import Runner
from tests.tiny_layouts import sealed

TEXTS = [
    "a photo of a cat.",
    "Two dogs' toys, they're 12 o'clock!",
    "naïve café  déjà   vu",
    "日本語 emoji 🐱 x",
    "don't  STOP\tnow",
    "x" * 60,
]


@pytest.fixture(scope="module")
def runner(tiny_open_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return sealed.runner(load(str(tiny_open_clip)), tmp_path_factory.mktemp("bundles"), "oc")


@pytest.fixture(scope="module")
def reference(tiny_open_clip: Path):
    return open_clip.create_model_and_transforms(f"local-dir:{tiny_open_clip}")


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_open_clips(text: str):
    want = open_clip.tokenizer.SimpleTokenizer()([text])[0].tolist()
    assert Tokenizer.from_str(tokenizer_json().decode()).encode(text).ids == want[: want.index(49407) + 1]


def test_pictures_come_out_as_open_clip_embeds_them(runner: Runner, reference, photographs):
    model, _, transform = reference
    for name in ("cat", "astronaut", "rocket", "coffee"):
        pixels = transform(Image.open(photographs[name]))[None]
        with torch.no_grad():
            want = model.eval().encode_image(pixels, normalize=True).numpy()
        assert runner.embed(images=[photographs[name]]) == pytest.approx(want, abs=2e-5)


def test_texts_come_out_as_open_clip_embeds_them(runner: Runner, reference):
    model = reference[0].eval()
    tokenize = open_clip.tokenizer.SimpleTokenizer()
    with torch.no_grad():
        want = model.encode_text(tokenize(TEXTS), normalize=True).numpy()
    assert runner.embed(texts=TEXTS) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode 'longest'"),
        ({"model_cfg": None}, "has no model_cfg"),
        ({"model_cfg": {"embed_dim": 16, "text_cfg": {}, "vision_cfg": {"pool_type": "avg"}}}, "pool_type is 'avg'"),
        ({"model_cfg": {"embed_dim": 16, "text_cfg": {"pool_type": "eos"}, "vision_cfg": {}}}, "pool_type is 'eos'"),
    ],
)
def test_what_is_not_supported_is_named(tiny_open_clip: Path, tmp_path: Path, change: dict, what: str):
    copy = shutil.copytree(tiny_open_clip, tmp_path / "other")
    config = json.loads((copy / "open_clip_config.json").read_text())
    (copy / "open_clip_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnknownCheckpoint, match=what):
        load(str(copy))


def configured(checkpoint: Path, to: Path, tower: str, **change: int) -> Path:
    """A copy whose config says something else of a tower."""
    copy = shutil.copytree(checkpoint, to)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"][tower] |= change
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    return copy


def test_a_context_longer_than_the_table_of_positions_is_refused(tiny_open_clip: Path, tmp_path: Path):
    copy = configured(tiny_open_clip, tmp_path / "other", "text_cfg", context_length=100)
    with pytest.raises(UnknownCheckpoint, match="its context is 100 tokens, but positional_embedding has 77 rows"):
        load(str(copy))


def test_pictures_of_a_size_that_the_weights_cannot_see_are_one_line(tiny_open_clip: Path, tmp_path: Path, capsys):
    copy = configured(tiny_open_clip, tmp_path / "other", "vision_cfg", image_size=64)
    assert main(["export", str(copy), "--out", str(tmp_path / "bundles")]) == 2
    error = capsys.readouterr().err
    assert "image: the tower does not run on pixels [1, 3, 64, 64], which its configs ask for: " in error
    assert error.count("\n") == 1
