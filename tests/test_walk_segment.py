"""All steps of segmentation: transformers writes a CLIP, one command exports it with its dense map, `calmclip check`
accepts both bundles, and the masks are those of MaskCLIP's definition, computed with the modules of transformers and
torch. The weights are random."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from calmclip.models.cli import main
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner, open_bundle
from tests import tiny

LABELS, BACKGROUND, TEMPLATE = ("red", "cat", "two"), ("blue", "dog"), "a photo of a {}"


def texts(clip: transformers.CLIPModel, words: Sequence[str]) -> torch.Tensor:
    """Unit rows."""
    rows = []
    for word in words:
        ids = torch.tensor([tiny.tokenizer().encode(TEMPLATE.format(word)).ids])
        outputs = clip.text_model(input_ids=ids)
        rows.append(clip.text_projection(outputs.pooler_output)[0])
    return F.normalize(torch.stack(rows), dim=-1)


def defined(clip: transformers.CLIPModel, runner: Runner, picture: Path, size: tuple[int, int]) -> tuple[Array, Array]:
    """-> the index of each pixel's best text on a plane of ``size`` rows and columns, and which pixels are clear."""
    pixels, frame = runner.bundle.image("dense").prepare(decode(picture.read_bytes()))
    x = clip.vision_model(pixel_values=torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2]
    last = clip.vision_model.encoder.layers[-1]
    v = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
    v = clip.vision_model.post_layernorm(v + last.mlp(last.layer_norm2(v)))
    patches = F.normalize(clip.visual_projection(v)[0, 1:], dim=-1).reshape(4, 4, 16)
    cosines = torch.einsum("yxd,cd->cyx", patches, texts(clip, [*LABELS, *BACKGROUND]))
    logits = torch.cat([cosines[:3], cosines[3:].amax(dim=0, keepdim=True)])
    # the picture fills the input from the top left, of which a cell has 8 x 8 pixels
    wide, high = (side * scale / 8 for side, scale in zip((frame.width, frame.height), frame.scale, strict=True))
    logits = logits[:, : int(np.ceil(high - 1e-6)), : int(np.ceil(wide - 1e-6))]
    y, x = ((torch.arange(n) + 0.5) * cells / n for n, cells in zip(size, (high, wide), strict=True))
    grid = torch.stack(torch.broadcast_tensors(2 * x[None] / logits.shape[2] - 1, 2 * y[:, None] / logits.shape[1] - 1))
    planes = F.grid_sample(logits[None], grid.permute(1, 2, 0)[None], padding_mode="border", align_corners=False)[0]
    top = planes.sort(dim=0).values
    return planes.argmax(dim=0).numpy(), (top[-1] - top[-2] > 1e-4).numpy()


def names(runner: Runner, picture: Path, **asked: object) -> Array:
    """The index of each pixel's label; the background has the next one."""
    segments = runner.segment(picture, LABELS, templates=[TEMPLATE], background=BACKGROUND, **asked)  # type: ignore[arg-type]
    plane = np.full((segments.height, segments.width), len(LABELS))
    for part in segments:
        plane[part.mask.pixels()] = part.index
    return plane


@pytest.mark.slow
@torch.inference_mode()
def test_masks_are_those_of_the_definition(tiny_hf_clip: Path, photographs: dict[str, Path], tmp_path: Path):
    command = ["export", str(tiny_hf_clip), "--out", str(tmp_path), "--name", "dense", "--keep-float"]
    assert main([*command, "--dense", "values"]) == 0
    for kind in ("int8", "float"):
        assert main(["check", f"dense-{kind}", "--bundles", str(tmp_path)]) == 0
    clip = transformers.CLIPModel.from_pretrained(tiny_hf_clip).eval()
    runners = {kind: open_bundle(tmp_path / f"dense-{kind}", threads=1) for kind in ("int8", "float")}
    labels, same = set(), []
    for picture in photographs.values():
        ours = names(runners["float"], picture)
        height, width = ours.shape
        assert max(height, width) <= 512  # so that the plane is the picture
        wanted, clear = defined(clip, runners["float"], picture, (height, width))
        assert clear.mean() > 0.98
        assert np.array_equal(ours[clear], wanted[clear])
        labels |= {*np.unique(ours)}
        same.append((names(runners["int8"], picture) == ours).mean())
    assert len(labels) >= 3
    assert np.mean(same) > 0.9
