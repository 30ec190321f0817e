"""The oracle is open_clip's conversion of the authors' names. `tests.tiny_layouts` compares the towers with
timm's, before branches and norms are folded, and the text tower with one written from the paper."""

import math

import open_clip
import pytest
import torch
from torch import nn

from calmclip.export.checkpoints import read
from calmclip.export.nets.clip import load
from calmclip.export.towers.image import Trunk
from tests.tiny_layouts import trunks
from tests.tiny_layouts.mobileclip import DIM

TEXTS = ["a photo of a cat.", "two dogs", "日本語 emoji 🐱", "a red bus in front of a very old house with a green door"]


def test_the_scale_of_the_logits_is_at_most_100(checkpoint):
    plain = checkpoint("mobileclip_plain")
    assert math.exp(float(read(plain).tensors["logit_scale"])) > 130
    head = load(str(plain)).classifier.head
    assert (head.name, head.params["scale"]) == ("cosine", pytest.approx(100.0, abs=1e-4))


@pytest.mark.parametrize("name", ["mobileclip", "mobileclip_plain", "mobileclip_b"])
def test_all_branches_and_all_norms_behind_convolutions_are_folded(name: str, checkpoint):
    net = load(str(checkpoint(name)))
    trunk = net.towers["image"].module
    assert isinstance(trunk, Trunk)
    assert not [key for key in trunk.state_dict() if "conv_kxk" in key or "conv_scale" in key]
    kind = nn.modules.batchnorm._BatchNorm
    norms = [key for key, module in trunk.named_modules() if isinstance(module, kind)]
    assert norms == ([] if name == "mobileclip_b" else ["trunk.stages.3.blocks.0.norm"])  # before attention
    assert not any(isinstance(module, kind) for module in net.towers["text"].module.modules())


def test_open_clip_converts_the_authors_names_alike(checkpoint):
    """MobileCLIP-S1 and S2."""
    state = dict(read(checkpoint("mobileclip_plain")).tensors)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2, "no_causal_mask": True}
    text |= {"mlp_ratio": 2.0}
    vision = {"image_size": 256, "timm_model_name": "fastvit_mci_2_test", "timm_pool": "avg", "timm_proj": None}
    trunks.register()
    model = open_clip.model.CustomTextCLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=text).eval()
    model.load_state_dict(open_clip.convert.convert_state_dict(model, state), strict=False)
    net, pixels = load(str(checkpoint("mobileclip_plain"))), torch.rand(2, 3, 256, 256)
    ids = open_clip.tokenizer.SimpleTokenizer()(TEXTS)
    with torch.inference_mode():
        assert torch.allclose(net.towers["image"].module(pixels), model.encode_image(pixels, normalize=True), atol=1e-5)
        assert torch.allclose(net.towers["text"].module(ids), model.encode_text(ids, normalize=True), atol=1e-5)
