"""The oracle is the module with its batch norms, in evaluation mode and float64."""

import copy
from functools import partial

import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from timm.models.fastvit import FastVit, LayerScale2d, RepConditionalPosEnc
from torch import nn

from calmclip.export.towers.fold import fold, take_apart


def seeded(module: nn.Module) -> nn.Module:
    """Norms with random statistics; new norms do nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.3, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def resnet() -> nn.Module:
    return ModifiedResNet([1, 1, 1, 1], 16, heads=4, image_size=64, width=8)


def fastvit() -> nn.Module:
    return FastVit(
        layers=(1, 1), embed_dims=(16, 32), mlp_ratios=(2, 2), token_mixers=("repmixer", "attention"), num_classes=4,
        pos_embs=(None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))), downsamples=(False, True),
    )  # fmt: skip


def reparameterized() -> nn.Module:
    return timm.utils.model.reparameterize_model(seeded(fastvit()))


@pytest.mark.parametrize(("make", "side", "left"), [(resnet, 64, 0), (reparameterized, 64, None)])
def test_what_is_folded_answers_alike(make, side: int, left: int | None):
    torch.manual_seed(0)
    module = seeded(make()).double()
    folded = copy.deepcopy(module)
    fold(folded)
    pixels = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        assert folded(pixels) == pytest.approx(module(pixels), abs=1e-9, rel=1e-9)
    assert norms(folded) < norms(module)
    if left is not None:
        assert norms(folded) == left


class Shared(nn.Module):
    """One convolution read by a norm and by a sum; one norm after an activation; one before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read_twice = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act, self.alone = nn.ReLU(), nn.BatchNorm2d(4)
        self.second, self.goes = nn.Conv2d(4, 5, 3, groups=1, bias=False), nn.BatchNorm2d(5, affine=False)
        self.flat, self.goes_too = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.read_twice(x)
        x = self.goes(self.second(self.alone(self.act(x))))
        return self.goes_too(self.flat(x.mean(dim=(2, 3))))


def test_only_a_norm_that_alone_reads_a_layer_is_folded():
    torch.manual_seed(0)
    module = Shared()
    module.goes.running_mean.normal_()
    module.goes.running_var.uniform_(0.5, 2)
    module.eval().double()
    for norm in (module.read_twice, module.alone, module.goes_too):
        seeded(norm)
    folded = copy.deepcopy(module)
    fold(folded)
    pixels = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert folded(pixels).detach() == pytest.approx(module(pixels).detach(), abs=1e-12)
    kinds = {name: type(getattr(folded, name)) for name in ("read_twice", "alone", "goes", "goes_too")}
    assert kinds == {
        "read_twice": nn.BatchNorm2d, "alone": nn.BatchNorm2d, "goes": nn.Identity, "goes_too": nn.Identity,
    }  # fmt: skip


def test_a_norm_with_an_activation_leaves_it():
    module = seeded(nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4))).double()
    folded = copy.deepcopy(module)
    fold(folded)
    pixels = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert folded(pixels).detach() == pytest.approx(module(pixels).detach(), abs=1e-12)
    assert norms(folded) == 0
    assert (folded(pixels) >= 0).all()


class Scaled(nn.Module):
    """Layer scales behind a norm, dropping and a linear layer; one that reads a sum; one along another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), LayerScale2d(4)
        self.drop, self.of_sum = nn.Dropout(0.5), LayerScale2d(4)
        self.square, self.across = nn.Conv2d(4, 4, 1), timm.layers.LayerScale(4)
        self.flat, self.last = nn.Linear(4, 5), timm.layers.LayerScale(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(self.drop(self.norm(self.conv(x))))
        x = self.of_sum(x + 1)
        x = self.across(self.square(x))  # its four columns, not its four channels
        return self.last(self.flat(x.mean(dim=(2, 3))))


def test_a_layer_scale_goes_into_the_layer_it_reads():
    module = seeded(Scaled()).double()
    scales = [part for part in module.modules() if isinstance(part, LayerScale2d | timm.layers.LayerScale)]
    for scale in scales:
        scale.gamma.data.uniform_(-2, 2)
    folded = copy.deepcopy(module)
    fold(folded)
    pixels = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    assert folded(pixels).detach() == pytest.approx(module(pixels).detach(), abs=1e-12)
    left = [name for name, part in folded.named_modules() if "LayerScale" in type(part).__name__]
    assert left == ["of_sum", "across"]
    assert norms(folded) == 0


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "parts"),
    [(6, 12, 6, 2), (4, 12, 4, 3), (6, 6, 6, 0), (6, 12, 3, 0), (1, 2, 1, 0), (2, 10, 2, 0)],
)
def test_a_depthwise_convolution_of_several_channels_is_taken_apart(channels, outputs, groups, parts):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, 5, stride=2, padding=2, groups=groups, bias=channels != 4).double().eval()
    module = nn.Sequential(conv)
    pixels = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    expected = module(pixels)
    take_apart(module)
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d) and part is not conv]
    assert len(convs) == parts
    assert all(part.groups == part.in_channels == part.out_channels for part in convs)
    assert module(pixels).detach() == pytest.approx(expected.detach(), abs=1e-12)
