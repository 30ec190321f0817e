"""What every layout promises, on a checkpoint of each: `CHECKPOINTS` and `REFERENCES` grow with the family."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calmclip.export import layouts
from calmclip.export.calibrate import feeds
from calmclip.export.checkpoints import Checkpoint, read
from calmclip.export.layouts import LAYOUTS, _clip_bpe
from calmclip.export.nets import Net, Tower
from calmclip.export.nets.clip import load, recognise
from calmclip.export.parity import onnx_run, torch_run
from calmclip.export.trace import to_onnx
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.flow import Arrays
from tests.tiny_layouts.checkpoints import CHECKPOINTS
from tests.tiny_layouts.references import REFERENCES

ALL = pytest.mark.parametrize("name", LAYOUTS.names())
GRAPHS = (("slip", "image"), ("grain", "image"), ("long_clip", "text"))


def test_every_layout_has_a_checkpoint_to_be_tested_with():
    assert sorted(CHECKPOINTS) == LAYOUTS.names()


@ALL
def test_its_checkpoint_fits_it_alone(name: str, checkpoint):
    found = read(checkpoint(name))
    assert [other for other in LAYOUTS.names() if LAYOUTS.get(other).fits(found)] == [name]
    assert LAYOUTS.get(name).title


def shown(net: Net, tower: Tower, folder: Path, photographs: dict[str, Path]) -> list[Arrays]:
    """What the service would feed it of two photographs, or of texts of three lengths."""
    for file, data in net.files.items():
        (folder / file).write_bytes(data)
    return list(feeds(tower, folder, [photographs["cat"], photographs["rocket"]], ["a photo of a cat.", "red", "dogs"]))


@ALL
def test_towers_answer_as_the_layouts_reference_does(name: str, checkpoint, photographs, tmp_path: Path):
    """Unit rows. That graphs do too, the walk tells (`test_layouts_walk`), and of what no other layout has this one."""
    net, reference = load(str(checkpoint(name))), REFERENCES[name](checkpoint(name))
    for role, tower in net.towers.items():
        runs = [torch_run(tower)]
        if (name, role) in GRAPHS:
            runs.append(onnx_run(to_onnx(tower), threads=1))
        wanted = []
        for feed in shown(net, tower, tmp_path, photographs):
            given = {key: torch.from_numpy(array) for key, array in feed.items()}
            with torch.inference_mode():
                want = reference.image(*given.values()) if role == "image" else reference.text(given)
            wanted.append(torch.nn.functional.normalize(want, dim=-1).numpy())
            for run in runs:
                assert np.abs(run(feed)[f"{role}_embeds"] - wanted[-1]).max() <= 2e-5
        assert np.abs(wanted[0] - wanted[1]).max() > 1e-2  # else anything would do


IDLE = {  # what changes no answer, whatever it is
    "*k_norm.bias": "adds the same to all logits of a token",
    "*.at.k.bias": "the same",
    "*.among.[qk].bias": "the same where queries are alike, as GRAIN's first are",
    "image.layers.0.norm1.weight": "GRAIN's first queries are zeros",
    "*.experts.*": "no token may be sent to an expert",
    "*stages.0.blocks.0.norm.*": "timm's own, nearly scaled away",
}


@pytest.mark.slow
@ALL
def test_no_norm_or_bias_of_its_checkpoint_could_go_unnoticed(name: str, checkpoint, photographs, tmp_path: Path):
    net = load(str(checkpoint(name)))
    for role, tower in net.towers.items():
        run, fed = torch_run(tower), shown(net, tower, tmp_path, photographs)
        before = [run(feed)[f"{role}_embeds"] for feed in fed]
        for key, parameter in tower.module.named_parameters():
            if parameter.ndim == 1 and not any(fnmatch(f"{role}.{key}", pattern) for pattern in IDLE):
                own, parameter.data = parameter.data, torch.full_like(parameter, float(key.endswith("weight")))
                after = [run(feed)[f"{role}_embeds"] for feed in fed]
                assert max(np.abs(one - other).max() for one, other in zip(before, after, strict=True)) > 1e-4, key
                parameter.data = own


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(read(path).tensors)


def _damaged(path: Path, tensors: dict[str, torch.Tensor], target: Path) -> Path:
    """The checkpoint at ``path`` with other tensors: its configs stay."""
    if path.is_dir():
        shutil.copytree(path, target)
        for file in (*target.glob("*.safetensors"), *target.glob("*.bin"), *target.glob("*.pt")):
            file.unlink()
        file = target / "model.safetensors"
    else:
        file = target = target.with_suffix(".safetensors")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return target


def _needed(name: str, checkpoint: Checkpoint) -> list[str]:
    """Some of its tensors, by the checkpoint's names, that are translated."""
    rules = LAYOUTS.get(name).rules
    return [key for key in sorted(checkpoint.tensors) if (rule := layouts._apply(rules, key)[0]) and rule.ours]


@ALL
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_tensor_that_is_missing_is_named(name: str, place: float, checkpoint, tmp_path: Path):
    path = checkpoint(name)
    needed = _needed(name, read(path))
    tensors = _tensors(path)
    decisive = [key for key in needed if any(layouts._match(one, key) for one in LAYOUTS.get(name).keys)]
    others = [key for key in needed if key not in decisive]
    gone = others[int(place * len(others))]
    del tensors[gone]
    lame = _damaged(path, tensors, tmp_path / "lame")
    with pytest.raises(UnknownCheckpoint, match=gone.replace(".", r"\.")):
        load(str(lame))


@ALL
def test_where_what_decides_is_missing_the_nearest_layout_is_named(name: str, checkpoint, tmp_path: Path):
    tensors = _tensors(checkpoint(name))
    gone = next(key for key in tensors if layouts._match(LAYOUTS.get(name).keys[0], key))
    lame = _damaged(checkpoint(name), {k: t for k, t in tensors.items() if k != gone}, tmp_path / "lame")
    with pytest.raises(UnknownCheckpoint, match=gone.replace(".", r"\.")):
        recognise(str(lame))


@ALL
def test_a_tensor_that_is_unexpected_is_named(name: str, checkpoint, tmp_path: Path):
    tensors = _tensors(checkpoint(name)) | {"somewhere.else.weight": torch.zeros(3)}
    with pytest.raises(UnknownCheckpoint, match=r"somewhere\.else\.weight"):
        load(str(_damaged(checkpoint(name), tensors, tmp_path / "more")))


def test_a_tensor_under_both_of_its_names_is_refused(checkpoint, tmp_path: Path):
    """A projection of texts is [W, D] without a suffix and [D, W] with one; of both nobody knows which is meant."""
    tensors = _tensors(path := checkpoint("openai"))
    tensors |= {"text_projection.weight": 2 * tensors["text_projection"].T.contiguous()}
    with pytest.raises(UnknownCheckpoint, match=r"text_projection.* and text_projection.* are two names of one tensor"):
        load(str(_damaged(path, tensors, tmp_path / "both")))


@ALL
@pytest.mark.parametrize("place", [0.35, 0.65])
def test_a_tensor_of_another_shape_is_named(name: str, place: float, checkpoint, tmp_path: Path):
    path = checkpoint(name)
    tensors = _tensors(path)
    matrices = [key for key in _needed(name, read(path)) if tensors[key].ndim == 2]
    bent = matrices[int(place * len(matrices))]
    tensors[bent] = torch.cat([tensors[bent], tensors[bent][:, :1]], dim=1)
    with pytest.raises(UnknownCheckpoint) as raised:
        load(str(_damaged(path, tensors, tmp_path / "bent")))
    assert "shape" in str(raised.value)
    assert path.name in str(raised.value) or "bent" in str(raised.value)


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not numbers": lambda t: torch.full_like(t, torch.nan),
    "integers": lambda t: torch.ones(t.shape, dtype=torch.int8),
    "empty": lambda t: t.reshape(-1)[:0],
    "one axis more": lambda t: t[None, None],
    "a number": lambda t: torch.tensor(1.0) if t.ndim else torch.ones(3),
}


@ALL
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_tensor_that_can_be_no_weight_is_refused_in_one_line(name: str, kind: str, checkpoint, monkeypatch):
    found = read(checkpoint(name))
    # a temperature may be [1] as well as [], and steps are counted in integers
    needed = [key for key in _needed(name, found) if not key.startswith("logit") and not key.endswith("_tracked")]
    for place in (0.05, 0.4, 0.75):
        bad = needed[int(place * len(needed))]
        spoiled = dict(found.tensors) | {bad: DAMAGE[kind](found.tensors[bad])}
        monkeypatch.setattr(
            "calmclip.export.nets.clip.read", lambda *_, tensors=spoiled: replace(found, tensors=tensors)
        )
        with pytest.raises(UnknownCheckpoint) as raised:
            load(str(checkpoint(name)))
        assert "\n" not in str(raised.value)
        assert found.path.name in str(raised.value)
        if kind in ("not numbers", "integers"):
            assert bad in str(raised.value)


@ALL
def test_a_file_cut_short_is_named(name: str, checkpoint, tmp_path: Path):
    path = _damaged(checkpoint(name), _tensors(checkpoint(name)), tmp_path / "cut")
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnknownCheckpoint, match=file.name.replace(".", r"\.")):
        load(str(path))


@ALL
def test_float16_weights_come_out_as_float32_towers(name: str, checkpoint, tmp_path: Path):
    halves = {n: t.half() if t.is_floating_point() else t for n, t in _tensors(checkpoint(name)).items()}
    net = load(str(_damaged(checkpoint(name), halves, tmp_path / "half")))
    assert {p.dtype for tower in net.towers.values() for p in tower.module.parameters()} <= {torch.float32}


@ALL
def test_clips_own_tokenizer_comes_with_its_cleaning(name: str, checkpoint):
    net = load(str(checkpoint(name)))
    if net.files["tokenizer.json"] == _clip_bpe.tokenizer_json():
        assert net.towers["text"].preprocess.clean == _clip_bpe.CLEAN


def test_no_two_rules_of_a_layout_read_the_same_name(checkpoint):
    for name in LAYOUTS.names():
        rules = LAYOUTS.get(name).rules
        for key in read(checkpoint(name)).names:
            fitting = [rule for rule in rules if layouts._match(rule.theirs, key)]
            assert len(fitting) <= 1, f"{name}: {key} is read by {[rule.theirs for rule in fitting]}"
