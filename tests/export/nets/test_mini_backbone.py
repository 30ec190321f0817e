from pathlib import Path

import numpy as np
import pytest
import torch

from calmclip.export.nets.mini import backbone, parameters
from calmclip.export.nets.mini.facts import PIXELS
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.preprocess.image import ImagePreparer, decode


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        # TensorFlow's SAME, stride 2, kernel of ones 3x3: an even side is padded below and right only
        (4, [[9, 6], [6, 4]]),
        # an odd side is padded by one on every side
        (5, [[4, 6, 4], [6, 9, 6], [4, 6, 4]]),
    ],
)
def test_same_padding_counts_the_pixels_under_the_kernel(side: int, expected: list[list[int]]):
    conv = backbone.SameConv(1, 1, 3, 2, bias=False)
    conv.weight.data.fill_(1.0)
    assert conv(torch.ones(1, 1, side, side))[0, 0].tolist() == expected


def test_folding_the_norms_changes_nothing():
    torch.manual_seed(0)
    net = backbone.Backbone().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as after training, not 0 and 1
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    pixels = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        before = net(pixels)
        after = backbone.fold(net)(pixels)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    for unfolded, folded in zip(before, after, strict=True):
        assert torch.allclose(unfolded, folded, atol=1e-4)


def test_numpy_folds_the_published_norms_as_torch_does():
    """To the same bits: both in float64, rounded once."""
    folded = backbone.frozen(tensors(backbone_state())).state_dict()
    arrays = parameters.backbone(backbone_state())
    assert arrays.keys() == folded.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, folded[name].numpy(), err_msg=name)


@pytest.mark.parametrize(("side", "cells16", "cells32"), [(260, 17, 9), (640, 40, 20)])
def test_maps_have_the_strides_of_their_names(side: int, cells16: int, cells32: int):
    with torch.inference_mode():
        map16, map32 = backbone.Backbone().eval()(torch.zeros(1, 3, side, side))
    assert map16.shape == (1, 120, cells16, cells16)
    assert map32.shape == (1, 1280, cells32, cells32)


@pytest.mark.parametrize(
    ("photograph", "classes"), [("cat", range(281, 286)), ("clock", (409, 892)), ("coffee", (504, 967, 968))]
)
def test_published_weights_classify_photographs(
    photographs: dict[str, Path], photograph: str, classes: tuple[int, ...]
):
    # ImageNet's numbers: 281-285 cats; 409 analog clock, 892 wall clock; 504 coffee mug, 967 espresso, 968 cup
    net = backbone.frozen(tensors(backbone_state()))
    pixels, _ = ImagePreparer(PIXELS).prepare(decode(photographs[photograph].read_bytes()))
    with torch.inference_mode():
        scores = net.classifier(net(torch.from_numpy(pixels))[1].mean((2, 3)))
    assert int(scores.argmax()) in classes


def test_an_unexpected_key_is_an_error():
    state = tensors(backbone_state())
    state["_blocks.99._bn1.weight"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        backbone.from_state(state)
