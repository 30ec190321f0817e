from pathlib import Path

import numpy as np
import pytest
import torch

from calmclip.export.nets.mini.parameters import HEAD_SHAPES
from calmclip.export.nets.mini.towers import DenseTower, Heads, ImageHead, ImageTower, TextTower
from calmclip.models.errors import WeightsMissing


@pytest.fixture
def heads() -> Heads:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in HEAD_SHAPES.items()}
    tensors["feature_std"] += 0.5
    return Heads(**tensors)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_image_head_is_the_formula_of_its_docstring(heads: Heads):
    classifier = torch.nn.Linear(1280, 1000)
    features = torch.rand(2, 3, 1280)
    with torch.inference_mode():
        embeds = ImageHead(heads, classifier)(features)
    f, w, b, A, a, mean, std, table = (  # noqa: N806 - A as in the formula
        t.detach().double().numpy()
        for t in (
            features, classifier.weight, classifier.bias, heads.image_weight, heads.image_bias, heads.feature_mean,
            heads.feature_std, heads.class_table,
        )
    )  # fmt: skip
    z = 6 * unit((f - mean) / std)
    logits = f @ w.T + b
    p = np.exp(logits - logits.max(-1, keepdims=True))
    c = unit(p / p.sum(-1, keepdims=True) @ table)
    expected = unit(np.concatenate([z, c], axis=-1) @ A.T + a)
    assert embeds.shape == (2, 3, 384)
    assert np.allclose(embeds, expected, atol=1e-5)


def test_a_patch_is_the_image_heads_vector_of_a_cell(heads: Heads):
    features = torch.rand(2, 1280, 2, 3, generator=torch.Generator().manual_seed(1))
    backbone = torch.nn.Module()
    backbone.classifier = torch.nn.Linear(1280, 1000)
    map16 = torch.rand(2, 120, 4, 6)
    backbone.forward = lambda pixels: (map16, features)
    image = ImageTower(backbone, heads)  # type: ignore[arg-type]
    with torch.inference_mode():
        patches, fine = DenseTower(image)(torch.zeros(2, 3, 8, 8))
        assert torch.equal(fine[1, 3, 5], map16[1, :, 3, 5])
        assert patches.shape == (2, 2, 3, 384)
        for b, y, x in np.ndindex(2, 2, 3):
            assert torch.allclose(patches[b, y, x], image.head(features[b, :, y, x][None])[0], atol=1e-6)


def test_text_tower_centres_the_states_of_the_encoder(heads: Heads):
    class Encoder(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return states

    states = torch.rand(2, 384)
    with torch.inference_mode():
        embeds = TextTower(Encoder(), heads.text_weight, heads.text_centre)(torch.ones(2, 3), None)
    t, centre, B = (x.double().numpy() for x in (states, heads.text_centre, heads.text_weight))  # noqa: N806
    assert np.allclose(embeds, unit((unit(t) - centre) @ B.T), atol=1e-5)


def test_heads_are_saved_in_float16_and_loaded(heads: Heads, tmp_path: Path):
    heads.save(tmp_path / "heads.safetensors", {"net": "mini"})
    loaded = Heads.load(tmp_path / "heads.safetensors")
    assert torch.equal(loaded.image_weight, heads.image_weight.half().float())
    assert loaded.class_table.dtype == torch.float32


def test_other_tensors_are_refused(heads: Heads, tmp_path: Path):
    file = tmp_path / "heads.safetensors"
    with pytest.raises(WeightsMissing, match=r"heads\.safetensors cannot be read: .*`calmclip align` writes"):
        Heads.load(file)
    Heads(**{**vars(heads), "text_centre": torch.zeros(5)}).save(file, {})
    with pytest.raises(WeightsMissing, match=r"'text_centre': \(5,\)"):
        Heads.load(file)
