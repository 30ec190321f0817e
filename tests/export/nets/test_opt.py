"""The oracle is transformers' OPTForCausalLM; `tests/export/test_attention.py` compares every kind of attention."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calmclip.export.nets.opt import load
from calmclip.models.errors import UnknownCheckpoint
from tests import tiny
from tests.tiny import changed


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(tiny_opt: Path):
    reference = transformers.OPTForCausalLM.from_pretrained(tiny_opt).eval()
    module = load(str(tiny_opt)).towers["lm"].module
    ids = torch.tensor([[598, 3, 6, 7, 599], [598, 1, 599, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want = reference(ids, attention_mask=mask).logits
    assert torch.allclose(module(ids)[mask.bool()], want[mask.bool()], atol=1e-5)


@torch.no_grad()
def test_names_without_the_prefix_are_read(tiny_opt: Path, tmp_path: Path):
    bare = shutil.copytree(tiny_opt, tmp_path / "bare")
    state = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, bare / "model.safetensors")
    ids = torch.tensor([[598, 3, 6]])
    prefixed, plain = (load(str(directory)).towers["lm"].module(ids) for directory in (tiny_opt, bare))
    assert torch.equal(prefixed, plain)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"do_layer_norm_before": False},
            "do_layer_norm_before is False, as in OPT-350m; only OPT with its norms before",
        ),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16 and hidden_size 32, as in OPT-350m"),
    ],
)
def test_opt_350m_is_refused(more: dict, message: str, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(tiny.opt(tmp_path / "opt", **more)))


def test_an_unknown_activation_is_named(tiny_opt: Path, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match="activation_function is 'swish'; expected one of"):
        load(str(changed(tiny_opt, tmp_path / "changed", activation_function="swish")))
