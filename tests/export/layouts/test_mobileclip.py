"""The oracles are timm's reading of the authors' names, open_clip's, and their text tower written from the paper."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.models import fastvit, vision_transformer_hybrid
from torch import nn
from torchvision import transforms

from calmclip.export.checkpoints import read
from calmclip.export.nets.clip import load
from calmclip.export.towers.image import Trunk
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.runner import Runner
from tests.tiny_layouts import mobileclip, sealed
from tests.tiny_layouts.mobileclip import DIM, OriginalText, small_fastvit

NAMES = ("cat", "astronaut", "rocket", "coffee")
TEXTS = ["a photo of a cat.", "two dogs", "日本語 emoji 🐱", "a red bus in front of a very old house with a green door"]
WRITERS = {
    "mixed": mobileclip.mobileclip,
    "plain": mobileclip.mobileclip_plain,
    "b": mobileclip.mobileclip_b,
}
SIDES = {"mixed": 256, "plain": 256, "b": 64}  # of B the positions tell it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp("mobileclip"))
        return made[name]

    return of


@pytest.fixture(scope="module")
def runner(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return sealed.runner(load(str(checkpoint("mixed"))), tmp_path_factory.mktemp("bundles"), "mixed")


def image_reference(name: str, state: dict) -> nn.Module:
    if name == "b":
        made = timm.create_model("vit_base_mci_224", depth=1, img_size=64, num_classes=DIM, global_pool="token")
        convert = vision_transformer_hybrid.checkpoint_filter_fn
    else:
        made, convert = small_fastvit(), fastvit.checkpoint_filter_fn
    made.load_state_dict(convert(state, made))
    return made.eval()


def text_reference(name: str, state: dict) -> Callable[[torch.Tensor], torch.Tensor]:
    kinds = ["mix", "attend", "attend", "mix"] if name == "mixed" else ["attend", "attend"]
    made = OriginalText(kinds).eval()
    start = "text_encoder."
    made.load_state_dict({key.removeprefix(start): t for key, t in state.items() if key.startswith(start)})
    mask = torch.full((77, 77), -math.inf).triu(1) if name == "b" else None
    return lambda ids: made(ids, mask)


def transform(side: int) -> transforms.Compose:
    """The authors' own."""
    resize = transforms.Resize(side, interpolation=transforms.InterpolationMode.BILINEAR)
    return transforms.Compose([resize, transforms.CenterCrop(side), transforms.ToTensor()])


def unit(rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("name", list(WRITERS))
def test_towers_answer_as_the_unfolded_ones_do(name: str, checkpoint, photographs):
    state, net = dict(read(checkpoint(name)).tensors), load(str(checkpoint(name)))
    pixels = torch.stack([transform(SIDES[name])(Image.open(photographs[one]).convert("RGB")) for one in NAMES])
    ids = open_clip.tokenizer.SimpleTokenizer()(TEXTS)
    with torch.inference_mode():
        want = unit(image_reference(name, state)(pixels))
        assert torch.allclose(net.towers["image"].module(pixels), want, atol=1e-5)
        assert (want @ want.T).triu(1).max() < 0.9999  # else anything would do
        want = text_reference(name, state)(ids)
        found = net.towers["text"].module(ids)
        assert torch.allclose(found, want, atol=1e-5)
        if name == "b":  # causal: what follows the end changes nothing
            assert torch.allclose(net.towers["text"].module(ids[:, :30]), want, atol=1e-5)


def test_pictures_and_texts_come_out_of_the_bundle_as_from_the_authors_model(runner: Runner, checkpoint, photographs):
    state = dict(read(checkpoint("mixed")).tensors)
    model, texts = image_reference("mixed", state), text_reference("mixed", state)
    with torch.inference_mode():
        for picture in NAMES:
            want = unit(model(transform(256)(Image.open(photographs[picture]).convert("RGB"))[None])).numpy()
            assert runner.embed(images=[photographs[picture]]) == pytest.approx(want, abs=2e-5)
        want = texts(open_clip.tokenizer.SimpleTokenizer()(TEXTS)).numpy()
    assert runner.embed(texts=TEXTS) == pytest.approx(want, abs=2e-5)


def test_pixels_are_the_authors_within_a_grey_level(runner: Runner, photographs):
    preparer = ImagePreparer(runner.bundle.manifest.graphs["image"].preprocess)
    for path in photographs.values():
        want = transform(256)(Image.open(path).convert("RGB"))[None].numpy()
        assert np.abs(preparer.prepare(decode(path.read_bytes()))[0] - want).max() * 255 <= 1.001


def test_the_scale_of_the_logits_is_at_most_100(checkpoint):
    assert math.exp(float(read(checkpoint("plain")).tensors["logit_scale"])) > 130
    head = load(str(checkpoint("plain"))).head
    assert (head.name, head.params["scale"]) == ("cosine", pytest.approx(100.0, abs=1e-4))


@pytest.mark.parametrize("name", list(WRITERS))
def test_of_branches_and_of_norms_behind_convolutions_nothing_is_left(name: str, checkpoint):
    net = load(str(checkpoint(name)))
    trunk = net.towers["image"].module
    assert isinstance(trunk, Trunk)
    assert not [key for key in trunk.state_dict() if "conv_kxk" in key or "conv_scale" in key]
    left = [key for key, one in trunk.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    assert left == ([] if name == "b" else ["trunk.stages.3.blocks.0.norm"])  # that one stands before attention
    assert not any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in net.towers["text"].module.modules())


def test_open_clip_reads_the_same_from_the_authors_names(checkpoint, tmp_path: Path):
    """S1 and S2's kind, by open_clip's own conversion."""
    from tests.tiny_layouts import trunks

    state = dict(read(checkpoint("plain")).tensors)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2, "no_causal_mask": True}
    text |= {"mlp_ratio": 2.0}
    vision = {"image_size": 256, "timm_model_name": "fastvit_mci_2_test", "timm_pool": "avg", "timm_proj": None}
    trunks.register()
    model = open_clip.model.CustomTextCLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=text).eval()
    model.load_state_dict(open_clip.convert.convert_state_dict(model, state), strict=False)
    net, pixels = load(str(checkpoint("plain"))), torch.rand(2, 3, 256, 256)
    ids = open_clip.tokenizer.SimpleTokenizer()(TEXTS)
    with torch.inference_mode():
        assert torch.allclose(net.towers["image"].module(pixels), model.encode_image(pixels, normalize=True), atol=1e-5)
        assert torch.allclose(net.towers["text"].module(ids), model.encode_text(ids, normalize=True), atol=1e-5)
