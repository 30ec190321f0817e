"""The oracle is open_clip with timm's towers as they are: branches and batch norms unfolded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from calmclip.export.nets.clip import load
from calmclip.models.errors import UnknownCheckpoint
from tests.tiny_layouts import sealed, trunks

WRITERS = {"convnext": trunks.open_clip_timm, "mobileclip": trunks.open_clip_timm_custom_text}
TEXTS = ["a photo of a cat.", "two dogs", "日本語 emoji 🐱"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp("timm") / name)
        return made[name]

    return of


@pytest.mark.parametrize("name", [pytest.param("convnext", marks=pytest.mark.slow), "mobileclip"])
def test_pictures_and_texts_come_out_as_open_clip_embeds_them(name: str, checkpoint, photographs, tmp_path: Path):
    runner = sealed.runner(load(str(checkpoint(name))), tmp_path, name)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{checkpoint(name)}")
    model.eval()
    wants = []
    with torch.inference_mode():
        for picture in ("cat", "astronaut", "rocket", "coffee"):
            wants.append(model.encode_image(transform(Image.open(photographs[picture]))[None], normalize=True)[0])
            assert runner.embed(images=[photographs[picture]])[0] == pytest.approx(wants[-1].numpy(), abs=2e-5)
        assert (torch.stack(wants) @ torch.stack(wants).T).triu(1).max() < 0.9999
        want = model.encode_text(open_clip.tokenizer.SimpleTokenizer()(TEXTS), normalize=True).numpy()
    assert runner.embed(texts=TEXTS) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"timm_model_name": "nobodys_net"}, "timm_model_name is 'nobodys_net'"),
        ({"timm_model_name": "hf-hub:timm/resnet18.a1_in1k"}, "timm_model_name is 'hf-hub:"),
        ({"timm_model_name": "local-dir:/etc"}, "timm_model_name is 'local-dir:/etc'"),
        ({"timm_pool": "abs_attn"}, "cannot be built"),
        ({"timm_proj": "mlp"}, r"lacks 4 tensors|visual\.head\.mlp"),
        ({"timm_model_name": "convnext_atto"}, "visual.trunk"),
    ],
)
def test_what_timm_does_not_build_from_the_config_is_named(change: dict, named: str, checkpoint, tmp_path: Path):
    copy = shutil.copytree(checkpoint("convnext"), tmp_path / "other")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= change
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownCheckpoint, match=named):
        load(str(copy))
