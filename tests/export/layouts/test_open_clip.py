"""The configs of open_clip, for every tower. `test_libraries` compares with its transforms, tokenizers and models."""

from pathlib import Path
from typing import Any

import pytest

from calmclip.export.nets.clip import load
from calmclip.models.cli import main
from calmclip.models.errors import UnknownCheckpoint
from tests.tiny import changed

FILE = "open_clip_config.json"


def text(**settings: Any) -> dict[str, Any]:
    return {"model_cfg": {"text_cfg": settings}}


def vision(**settings: Any) -> dict[str, Any]:
    return {"model_cfg": {"vision_cfg": settings}}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("open_clip", {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode 'longest'"),
        ("open_clip", {"model_cfg": None}, "has no model_cfg"),
        ("open_clip", vision(pool_type="avg"), "pool_type is 'avg'"),
        ("open_clip", text(pool_type="eos"), "pool_type is 'eos'"),
        ("open_clip", text(context_length=100), "its context is 100 tokens, but positional_embedding has 77 rows"),
        ("open_clip_timm", vision(timm_model_name="nobodys_net"), "timm_model_name is 'nobodys_net'"),
        ("open_clip_timm", vision(timm_model_name="hf-hub:timm/resnet18.a1_in1k"), "timm_model_name is 'hf-hub:"),
        ("open_clip_timm", vision(timm_model_name="local-dir:/etc"), "timm_model_name is 'local-dir:/etc'"),
        ("open_clip_timm", vision(timm_pool="abs_attn"), "cannot be built"),
        ("open_clip_timm", vision(timm_proj="mlp"), r"lacks 4 tensors|visual\.head\.mlp"),
        ("open_clip_timm", vision(timm_model_name="convnext_atto"), "visual.trunk"),
        ("open_clip_bert", text(hf_pooler_type="max_pooler"), "hf_pooler_type is 'max_pooler'"),
        ("open_clip_bert", text(tokenizer_kwargs={"strip_sep_token": True}), "tokenizer_kwargs"),
        ("open_clip_bert", text(output_tokens=True), "output_tokens is True"),
        ("open_clip_siglip", text(tokenizer_kwargs={"clean": "wash"}), "clean is 'wash'"),
        ("open_clip_siglip", text(tokenizer_kwargs={"strip_sep_token": True}), "strip_sep_token"),
        ("open_clip_siglip", text(tokenizer_mode="clips"), "clips"),
    ],
)
def test_an_unsupported_setting_is_named(name: str, change: dict, message: str, checkpoint, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(changed(checkpoint(name), tmp_path / "other", FILE, **change)))


def test_a_picture_size_that_does_not_fit_the_weights_is_an_error_of_one_line(checkpoint, tmp_path: Path, capsys):
    copy = changed(checkpoint("open_clip"), tmp_path / "other", FILE, **vision(image_size=64))
    assert main(["export", str(copy), "--out", str(tmp_path / "bundles")]) == 2
    error = capsys.readouterr().err
    assert "image: the tower does not run on pixels [1, 3, 64, 64], the shapes of its configs: " in error
    assert error.count("\n") == 1
