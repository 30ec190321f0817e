"""Keys, objectness and guided attention. Oracles: torch from the definitions, and identities."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers.guided import guided, resized
from calmclip.export.towers.keys import ObjectKeys, Objectness, OwnKeys, dinoiser

GRID = (3, 4)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MIDDLE = drawn(2, 13, 6)  # a class token and 3 x 4 patches of two pictures
# what extras read of a tower
TOWER: Any = SimpleNamespace(grid=GRID, patches=lambda x: x[:, -12:])
STEPS: Sequence[Any] = [*(SimpleNamespace(middle=x) for x in (MIDDLE, MIDDLE + 1, MIDDLE * 2))]
PLANE = MIDDLE[:, 1:].transpose(1, 2).reshape(2, 6, *GRID)


def test_dinoisers_convolutions_are_the_definition():
    """obj_proj repeats the border; bkg_decoder reads unit features."""
    tensors = {"obj_proj.weight": drawn(5, 6, 3, 3), "obj_proj.bias": drawn(5),
               "bkg_decoder.weight": drawn(1, 6, 1, 1), "bkg_decoder.bias": drawn(1)}  # fmt: skip
    extras = dinoiser(tensors)
    assert [(name, extra.shape) for name, extra in extras.items()] == [("keys", (5,)), ("objectness", ())]
    project = nn.Conv2d(6, 5, 3, padding=1, padding_mode="replicate")
    project.weight.data, project.bias.data = tensors["obj_proj.weight"], tensors["obj_proj.bias"]
    keys = project(PLANE)
    keys = (keys / keys.norm(dim=1, keepdim=True)).permute(0, 2, 3, 1)
    assert (extras["keys"](TOWER, STEPS) - keys).abs().max() < 1e-5
    unit = PLANE / PLANE.norm(dim=1, keepdim=True)
    logits = torch.einsum("bchw,c->bhw", unit, tensors["bkg_decoder.weight"][0, :, 0, 0]) + tensors["bkg_decoder.bias"]
    assert (extras["objectness"](TOWER, STEPS) - torch.sigmoid(logits)).abs().max() < 1e-5


def test_they_read_the_third_block_from_the_end():
    five = [SimpleNamespace(middle=drawn(2, 13, 6) * i) for i in range(2)] + [*STEPS]
    for extra in (OwnKeys(6), ObjectKeys(drawn(5, 6, 3, 3), drawn(5)), Objectness(drawn(1, 6, 1, 1), drawn(1))):
        assert (extra(TOWER, five) == extra(TOWER, STEPS)).all()


def test_own_keys_are_unit_differences_from_the_mean_of_the_picture():
    keys = OwnKeys(6)(TOWER, STEPS)
    patches = MIDDLE[:, 1:] - MIDDLE[:, 1:].mean(dim=1, keepdim=True)
    want = (patches / patches.norm(dim=-1, keepdim=True)).reshape(2, 3, 4, 6)
    assert (keys - want).abs().max() < 1e-6
    shifted = [SimpleNamespace(middle=MIDDLE + 100), *STEPS[1:]]
    assert (OwnKeys(6)(TOWER, shifted) - keys).abs().max() < 1e-3


def test_guided_attention_is_the_definition():
    features, values = F.normalize(drawn(2, 12, 5), dim=-1), drawn(2, 12, 7)
    for picture in range(2):
        alike = features[picture] @ features[picture].T
        alike = (alike - alike.mean() * 1.2) * 3.0
        alike[alike < 0] = -torch.inf
        assert alike.isinf().any()
        want = alike.softmax(-1) @ values[picture]
        assert (guided(values, features)[picture] - want).abs().max() < 1e-5


def test_guided_attention_mixes_patches_that_differ_in_nothing():
    """1 - 1.2 is negative for every pair: no pair is left, so all count alike."""
    values = drawn(1, 12, 7)
    answer = guided(values, F.normalize(torch.ones(1, 12, 5), dim=-1))
    assert (answer - values.mean(dim=1, keepdim=True)).abs().max() < 1e-6
    constant = torch.full((1, 12, 7), 3.5)
    assert (guided(constant, F.normalize(drawn(1, 12, 5), dim=-1)) - constant).abs().max() < 1e-5


def test_a_picture_does_not_depend_on_those_beside_it():
    features, values = F.normalize(drawn(2, 12, 5), dim=-1), drawn(2, 12, 7)
    alone = guided(values[:1], features[:1])
    assert (guided(values, features)[:1] - alone).abs().max() < 1e-6


@pytest.mark.parametrize("new", [(3, 4), (6, 8), (2, 5)])
def test_values_are_resized_bilinearly(new: tuple[int, int]):
    rows = drawn(2, 12, 7)
    plane = rows.transpose(1, 2).reshape(2, 7, 3, 4)
    want = F.interpolate(plane, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    assert (resized(rows, GRID, new) - want).abs().max() < 1e-6
    constant = torch.full((1, 12, 7), 2.0)
    assert (resized(constant, GRID, new) - 2).abs().max() < 1e-6
