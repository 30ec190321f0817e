"""Pictures in better light. Oracle: CLIP-LIT's network in torch, from its definition, on the whole picture; weights are
random."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from calmclip.export.nets.light_map import load
from calmclip.export.parity import one_thread, torch_run
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import open_bundle
from calmclip.models.tasks import enhance
from calmclip.models.tasks.enhance import averages, between, divide, light_map, scaled, strips
from tests import tiny
from tests.test_walk import serving


def reference(state: Mapping[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """[1, 3, H, W] in [0, 1] -> the map."""

    def conv(x: torch.Tensor, name: str, mode: str = "reflect") -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), state[f"{name}.weight"], state.get(f"{name}.bias"))

    def block(x: torch.Tensor, number: int) -> torch.Tensor:
        name = f"ResidualBlock{number}"
        return F.leaky_relu(x + conv(F.leaky_relu(conv(x, f"{name}.conv1"), 0.2), f"{name}.conv2"), 0.2)

    x = block(block(F.leaky_relu(conv(pixels, "cond1"), 0.2), 1), 2)
    levels = [x]
    for i, size in enumerate((1, 2, 3, 6)):
        pooled = F.conv2d(F.adaptive_avg_pool2d(x, size), state[f"PPM1.features.{i}.1.weight"])
        level = F.prelu(pooled, state[f"PPM1.features.{i}.2.weight"])
        levels.append(F.interpolate(level, x.shape[2:], mode="bilinear", align_corners=True))
    x = F.prelu(conv(torch.cat(levels, 1), "PPM1.fuse.0", "constant"), state["PPM1.fuse.1.weight"])
    x = conv(block(block(conv(x, "condx"), 3), 4), "condy")
    return F.relu(conv(block(block(x, 5), 6), "cond_add1"))


def picture(width: int, height: int) -> Array:
    """Noise over a gradient, uint8 [height, width, 3]."""
    noise = np.random.default_rng(0).integers(0, 120, (height, width, 3))
    return (noise + np.linspace(0, 130, width)[None, :, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.light_map(tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Any:
    """Runs the net's modules in place of graphs."""
    runs = {role: torch_run(tower) for role, tower in load(str(checkpoint)).towers.items()}
    return lambda call: runs[call.graph](call.feeds)


def wanted(checkpoint: Path, pixels: Array) -> Array:
    state = {name.removeprefix("module."): t for name, t in torch.load(checkpoint).items()}
    with torch.no_grad():
        light: Array = reference(state, torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0].numpy()
    return light


@pytest.mark.parametrize(
    ("size", "strip"),
    [((20, 15), None), ((2, 2), None), ((2, 60), None), ((11, 80), 11 * 55), ((13, 41), 13 * 10), ((9, 18), 9)],
)
def test_strips_together_are_the_map_of_the_whole_picture(
    size: tuple[int, int], strip: int | None, checkpoint: Path, run: Any, monkeypatch: pytest.MonkeyPatch
):
    pixels, calls = picture(*size), []

    def counted(call: Call) -> Arrays:
        calls.append(call.feeds["pixels"].shape[2])
        return run(call)  # type: ignore[no-any-return]

    if strip:
        monkeypatch.setattr(enhance, "STRIP", strip)
    with one_thread():
        light, exact = drive(light_map(pixels), counted), wanted(checkpoint, pixels)
    assert np.abs(light - exact).max() <= 1e-4
    assert exact.std() > 0.05  # or the comparison means nothing
    assert light.min() >= 0
    assert (len(calls) > 2) == bool(strip)
    assert max(calls) <= size[1] if not strip else max(calls) <= max(3 * enhance.HALO, strip // size[0])


def test_the_halo_is_what_a_row_of_the_map_depends_on(checkpoint: Path):
    """By the gradient, with positive weights so that nothing cancels: the farthest rows count too little to be seen in
    a map."""
    module = load(str(checkpoint)).towers["enhance"].module
    for parameter in module.parameters():
        parameter.data = parameter.data.abs()
    pixels = torch.ones(1, 3, 60, 4, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.zeros(60, 12, dtype=torch.float64), torch.zeros(12, 4, dtype=torch.float64)
    levels = torch.zeros(1, 32, 12, 12, dtype=torch.float64)
    module.double()(pixels, levels, rows, columns)[0, 0, 30].sum().backward()
    assert pixels.grad is not None
    depends = pixels.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert depends == [*range(30 - enhance.HALO, 30 + enhance.HALO + 1)]


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 12, 31])
def test_an_axis_is_cut_and_joined_as_torch_does(size: int):
    row = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(size))
    first = 0
    for number in (1, 2, 3, 6):
        part = slice(first, first + number)
        pooled = F.adaptive_avg_pool1d(row, number)
        assert averages(size)[part] @ row[0, 0].numpy() == pytest.approx(pooled[0, 0].numpy(), abs=1e-6)
        joined = F.interpolate(pooled, size, mode="linear", align_corners=True)[0, 0].numpy()
        assert pooled[0, 0].numpy() @ between(size)[part] == pytest.approx(joined, abs=1e-5)
        first += number


@pytest.mark.parametrize("light", [np.ones((1, 31, 23)), np.ones((3, 31, 23)), np.ones((1, 4, 3))])
def test_a_map_of_ones_gives_the_picture_bit_for_bit(light: Array):
    image = Image.fromarray(picture(23, 31))
    assert np.array_equal(np.asarray(divide(image, light.astype(np.float32))), np.asarray(image))


def test_a_picture_is_divided_clipped_and_rounded(monkeypatch: pytest.MonkeyPatch):
    """100 / 0.5 = 200; 100 / 0.3 = 333 -> 255; 100 / 1.6 = 62.5 -> 63; 0 / 0 = 0; 100 / 0 -> 255."""
    monkeypatch.setattr(enhance, "_BAND", 5)  # a row at a time
    image = Image.fromarray(np.array([[[100] * 3] * 4 + [[0] * 3]] * 2, np.uint8))
    light = np.array([[0.5, 0.3, 1.6, 0, 0]] * 2, np.float32)[None]
    assert np.asarray(divide(image, light))[:, :, 1].tolist() == [[200, 255, 63, 255, 0]] * 2


def test_the_map_of_a_smaller_picture_is_enlarged_without_a_seam(monkeypatch: pytest.MonkeyPatch):
    """Bands give the bits of one enlargement of the whole map."""
    light = np.random.default_rng(0).uniform(0.5, 1, (1, 9, 7)).astype(np.float32)
    image = Image.fromarray(picture(61, 83))
    monkeypatch.setattr(enhance, "_BAND", 61 * 13)
    whole = np.asarray(Image.fromarray(light[0]).resize((61, 83), Image.Resampling.BILINEAR))
    exact = np.clip(np.asarray(image, np.float64) / whole[:, :, None], 0, 255)
    assert np.abs(np.asarray(divide(image, light)) - exact).max() <= 0.51


def test_a_large_picture_is_scaled_for_its_map_and_a_thin_one_gets_two_rows():
    assert scaled(Image.new("RGB", (1000, 400)), 1000).shape == (20, 50, 3)
    assert scaled(Image.new("RGB", (30, 20)), 1000).shape == (20, 30, 3)
    assert scaled(Image.new("RGB", (1, 1)), 1024).shape == (2, 2, 3)
    assert scaled(Image.new("RGB", (100_000, 1)), 1024).shape[0] == 2


def test_strips_cover_each_row_once():
    for height, width in ((1000, 1000), (3, 200_000), (200_000, 3), (512, 512), (777, 4001)):
        cut = strips(height, width)
        assert [row for strip in cut for row in range(strip.top, strip.bottom)] == [*range(height)]
        assert all((s.last - s.first) * width <= max(enhance.STRIP, 3 * enhance.HALO * width) for s in cut)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with light-int8 and light-float, exported by the command that a user types."""
    out = tmp_path_factory.mktemp("bundles")
    assert main(["export", str(checkpoint), "--out", str(out), "--keep-float"]) == 0
    assert all(main(["check", f"light-{kind}", "--bundles", str(out)]) == 0 for kind in ("int8", "float"))
    return out


@pytest.fixture(scope="module")
def runner(bundles: Path) -> Any:
    return open_bundle(bundles / "light-float")


@pytest.mark.slow
def test_a_bundle_enhances_a_picture_of_its_own_size(
    runner: Any, bundles: Path, checkpoint: Path, photographs: dict[str, Path]
):
    image = Image.open(photographs["cat"]).convert("RGB").resize((90, 61))
    enhanced = runner.enhance(image)
    pixels = np.array(image)
    exact = np.clip(pixels / np.maximum(wanted(checkpoint, pixels), 1e-9).transpose(1, 2, 0), 0, 255)
    assert enhanced.size == (90, 61)
    assert np.abs(np.asarray(enhanced) - exact).max() <= 0.51
    int8 = np.asarray(open_bundle(bundles / "light-int8").enhance(image), np.float64)
    assert 20 * np.log10(255 / np.sqrt(((int8 - exact) ** 2).mean())) > 40  # dB
    small = np.asarray(runner.enhance(image, map_pixels=1024), np.float64)
    assert 0.5 < np.abs(small - exact).mean() < 60  # another map, of the picture scaled to 1024 pixels
    assert runner.enhance(np.zeros((1, 1, 3), np.uint8)).size == (1, 1)
    with pytest.raises(BadRequest, match="map_pixels is 1023; expected at least 1024"):
        runner.enhance(image, map_pixels=1023)


@pytest.mark.slow
def test_an_upright_picture_is_answered_over_http_as_in_python(runner: Any, bundles: Path, tmp_path: Path):
    """The tag says that the stored picture lies on its side. The folder serves no other task."""
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(60, 40)).save(file, "PNG", exif=exif)
    enhanced = runner.enhance(file.getvalue())
    assert enhanced.size == (40, 60)
    with serving(bundles, tmp_path) as client:
        answer = client.post(
            "/v1/enhance?model=light-float", content=file.getvalue(), headers={"content-type": "image/png"}
        )
        assert np.array_equal(np.asarray(Image.open(BytesIO(answer.content))), np.asarray(enhanced))
        refused = client.post("/v1/embed", json={"inputs": [{"text": "a"}]})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/task-not-served")
