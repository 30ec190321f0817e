"""Text towers like BERT. Oracles: modules of open_clip and transformers. `test_libraries` tests their bundles."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import normalize

from calmclip.export.checkpoints import read
from calmclip.export.nets.clip import load
from calmclip.export.recipe import recognise
from calmclip.models.errors import UnknownCheckpoint
from tests import tiny
from tests.tiny import changed
from tests.tiny_layouts import bert


@pytest.mark.parametrize(
    ("kind", "pooler", "projection", "config_beside"),
    [
        ("roberta", "mean_pooler", "mlp", False),
        ("roberta", "mean_pooler", "linear", True),
        ("bert", "cls_pooler", "linear", False),
        ("bert", "cls_last_hidden_state_pooler", "mlp", False),
        ("bert", "cls_last_hidden_state_pooler", None, True),
        ("xlm-roberta", "cls_pooler", "mlp", True),
    ],
)
def test_every_pooler_and_projection_of_open_clip(kind, pooler, projection, config_beside, tmp_path: Path):
    width = 32 if config_beside else 64  # only a config can give heads another width than 64
    clip, config = bert.open_clip_bert_module(tmp_path / "text", kind, pooler, projection, width=width)
    if config_beside:
        shutil.copytree(tmp_path / "text", tmp_path / "oc")
    bert.xlmr_tokenizer(tmp_path / "oc")
    text = load(str(bert.save_open_clip(tmp_path / "oc", clip, config))).towers["text"].module
    pad = 0 if kind == "bert" else 1
    ids = torch.randint(5, 300, (3, 12))
    ids[0, 7:], ids[1, 11:] = pad, pad
    with torch.no_grad():  # float64: no difference by rounding
        want = clip.double().encode_text(ids, normalize=True)
        assert torch.allclose(text.double()(ids, (ids != pad).double()), want, atol=1e-6)


def test_padding_changes_nothing(checkpoint):
    """The ids of the padding do not matter: the mask hides them."""
    text = load(str(checkpoint("open_clip_bert"))).towers["text"].module
    ids, mask = torch.randint(5, 300, (4, 9)), torch.ones(4, 9, dtype=torch.int64)
    with torch.no_grad():
        want = text(ids, mask)
        for more in (1, 7, 40):
            longer = torch.cat([ids, torch.randint(0, 300, (4, more))], dim=1)
            embeds = text(longer, torch.cat([mask, torch.zeros(4, more, dtype=torch.int64)], dim=1))
            assert torch.allclose(embeds, want, atol=1e-6)


@pytest.mark.parametrize(("layers", "width"), [(1, 64), (3, 192)])
def test_any_depth_and_width_is_read(layers: int, width: int, tmp_path: Path):
    """For example of distilled models. Without a config, heads are 64 wide."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    config = transformers.BertConfig(**bert.TOWER | sizes, vocab_size=len(bert.WORDPIECE))
    clip = bert.chinese_clip_module()
    clip.bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    tiny.spread(clip.bert)
    clip.text_projection = torch.nn.Parameter(torch.randn(width, 16))
    bert.vocab_txt(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "clip_cn.pt")
    text = load(str(tmp_path)).towers["text"].module
    ids = torch.randint(5, 60, (2, 6))
    with torch.no_grad():
        assert torch.allclose(text(ids, torch.ones_like(ids)), normalize(clip.encode_text(ids), dim=-1), atol=2e-6)


def test_a_vocabulary_larger_than_the_weights_is_refused(checkpoint, tmp_path: Path):
    copy = shutil.copytree(checkpoint("chinese_clip"), tmp_path / "other")
    with (copy / "vocab.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"word{i}\n" for i in range(40))
    with pytest.raises(UnknownCheckpoint, match=r"tokenizer has \d+ tokens, but \S+ has \d+ rows"):
        load(str(copy))


@pytest.mark.parametrize("name", ["google/mt5-base", "facebook/nllb-200-distilled-600M"])
def test_unsupported_text_towers_are_refused_by_name(checkpoint, tmp_path: Path, name: str):
    config = {"model_cfg": {"text_cfg": {"hf_model_name": name}}}
    copy = changed(checkpoint("open_clip_bert"), tmp_path / "other", "open_clip_config.json", **config)
    tensors = {
        n.replace("text.transformer.embeddings", "text.transformer.shared"): t for n, t in read(copy).tensors.items()
    }
    save_file(tensors, copy / "open_clip_model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=f"its text tower is {name}"):
        recognise(str(copy))
