"""The public names of gates, read and written. `tests.quantizable` writes them; they come back bit by bit."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calmclip.export.checkpoints import read
from calmclip.export.layouts import LAYOUTS, to_checkpoint, translate
from calmclip.export.nets import NETS, bert, opt, vit
from calmclip.models.errors import UnknownCheckpoint
from tests import quantizable
from tests.quantizable import GATES
from tests.tiny import changed, spread

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**CONFIG, "vocab_size": 60, "max_position_embeddings": 16}
KINDS = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, intermediate_size=48)),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**CONFIG, intermediate_size=48, image_size=32, patch_size=16)
    ),
}
TABLES = {"bert": bert.LAYOUTS[0], "opt": opt.LAYOUTS[0], "vit": vit.LAYOUT}
WORDS = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # stored twice


@pytest.fixture
def directory(tmp_path: Path):
    def of(kind: str, gate: str) -> Path:
        torch.manual_seed(0)
        model = quantizable.change(spread(KINDS[kind]()), gate=gate)
        (tmp_path / "config.json").write_text(model.config.to_json_string())
        return quantizable.save(model, tmp_path, "vanilla")

    return of


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_read_and_written_with_the_same_names(kind: str, gate: str, directory):
    path = directory(kind, gate)
    want = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name != WORDS[1]}
    state = translate(TABLES[kind], read(path))
    assert any(".attn.gate." in name for name in state) == (gate != "none")
    written = to_checkpoint(TABLES[kind], state)
    assert written.keys() == want.keys()
    assert all(torch.equal(written[name], want[name]) for name in want)


def test_an_unknown_name_is_not_written():
    with pytest.raises(KeyError, match=r"text\.nothing"):
        to_checkpoint(LAYOUTS.get("hf_clip"), {"text.nothing": torch.zeros(1)})


ALPHA = "bert.encoder.layer.1.attention.self.alpha"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ALPHA}.0.weight": None}, f"lacks {ALPHA}.0.weight"),
        ({f"{ALPHA}.1.weight": torch.zeros(1, 5)}, "gates of all heads have one shape"),
        ({f"{ALPHA}.0.weight": torch.zeros(2, 16), f"{ALPHA}.1.weight": torch.zeros(2, 16)}, "answers one number"),
        ({f"{ALPHA}.weight": torch.zeros(2, 32)}, "a gate is for each head or for all"),
        (
            {f"{ALPHA}.{h}.2.{p}": torch.zeros(*s) for h in (0, 1) for p, s in (("weight", (1, 4)), ("bias", (1,)))},
            f"linear or an mlp; {ALPHA}.0",
        ),
        ({f"{ALPHA}.{h}.bias": torch.zeros(()) for h in (0, 1)}, f"answers one number; {ALPHA}.0.bias"),
        (
            {f"{ALPHA}.{h}.{p}": None for h in (0, 1) for p in ("weight", "bias")},
            "all blocks have a gate, or none; .*layer.0.attention.self.alpha.0.bias.*, but no gate in block 1",
        ),
    ],
)
def test_gates_that_do_not_fit_together_are_named(change: dict, message: str, directory):
    path = directory("bert", "linear")
    state = load_file(path / "model.safetensors") | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path / "model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=message):
        translate(TABLES["bert"], read(path))


def test_a_clip_configures_attention_for_each_tower(tiny_hf_clip: Path, tmp_path: Path):
    """At the top level, no tower would read the setting, and the softmax would be the plain one."""
    copy = changed(tiny_hf_clip, tmp_path / "changed", attn_softmax="clipped(-0.1:1)")
    with pytest.raises(
        UnknownCheckpoint, match=r"says attn_softmax, but not in vision_config; attention is each tower"
    ):
        NETS.get("clip").load(str(copy))
