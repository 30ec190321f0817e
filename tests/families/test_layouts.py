"""The contract of every layout, on a checkpoint of each: `CHECKPOINTS` and `REFERENCES` grow with the family."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from calmclip.export import layouts
from calmclip.export.calibrate import feeds
from calmclip.export.checkpoints import Checkpoint, read
from calmclip.export.layouts import LAYOUTS
from calmclip.export.layouts.common import clip_bpe
from calmclip.export.nets import Net, Tower
from calmclip.export.nets.clip import load, recognise
from calmclip.export.parity import onnx_run, torch_run
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import VectorPreprocess
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.flow import Arrays
from tests.tiny_layouts import llm2clip
from tests.tiny_layouts.checkpoints import CHECKPOINTS
from tests.tiny_layouts.references import REFERENCES

ALL = pytest.mark.parametrize("name", LAYOUTS.names())
GRAPHS = (("slip", "image"), ("long_clip", "text"))


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_are_parsed_once() -> Iterator[None]:
    """Most checkpoints here have CLIP's vocabulary, which takes 0.1 s to parse: a third of this file's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "Tokenizer", SimpleNamespace(from_str=cache(Tokenizer.from_str)))
        yield


def test_every_layout_has_a_test_checkpoint():
    assert sorted(CHECKPOINTS) == LAYOUTS.names()


@ALL
def test_its_checkpoint_fits_no_other_layout(name: str, checkpoint):
    opened = read(checkpoint(name))
    assert [other for other in LAYOUTS.names() if LAYOUTS.get(other).fits(opened)] == [name]
    assert LAYOUTS.get(name).title


def shown(net: Net, tower: Tower, folder: Path, photographs: dict[str, Path]) -> list[Arrays]:
    """The service's feeds for two photographs, for texts of three lengths, or for three vectors."""
    for file, data in net.files.items():
        (folder / file).write_bytes(data)
    reads_vectors = isinstance(tower.preprocess, VectorPreprocess)
    texts = [*llm2clip.vectors(3)] if reads_vectors else ["a photo of a cat.", "red", "dogs"]
    return list(feeds(tower, folder, [photographs["cat"], photographs["rocket"]], texts))


# their tiny towers take seconds to trace; `test_layouts_walk` compares them, too
LONGEST = {"long_clip", "mobileclip", "mobileclip_b", "open_clip_resnet", "slip"}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each in LONGEST else each for each in LAYOUTS.names()]
)
def test_towers_answer_as_the_layouts_reference_does(name: str, checkpoint, photographs, tmp_path: Path):
    """The rows are unit vectors. `GRAPHS`: towers whose graphs are compared here; `test_layouts_walk` compares all."""
    net, reference = load(str(checkpoint(name))), REFERENCES[name](checkpoint(name))
    for role in ("image", "text"):
        tower = net.towers[role]
        runs = [torch_run(tower)]
        if (name, role) in GRAPHS:
            runs.append(onnx_run(to_onnx(tower), threads=1))
        wanted = []
        for feed in shown(net, tower, tmp_path, photographs):
            tensors = {key: torch.from_numpy(array) for key, array in feed.items()}
            with torch.inference_mode():
                want = reference.image(*tensors.values()) if role == "image" else reference.text(tensors)
            wanted.append(torch.nn.functional.normalize(want, dim=-1).numpy())
            for run in runs:
                assert np.abs(run(feed)[f"{role}_embeds"] - wanted[-1]).max() <= 2e-5
        assert np.abs(wanted[0] - wanted[1]).max() > 2e-3  # or the comparison means nothing


VISIBLE = 2.5e-5  # more than the comparison with the reference allows
IDLE = {  # parameters that change no answer
    "*k_norm.bias": "adds the same to all logits of a token",
    "*.at.k.bias": "adds the same to all logits of a token",
    "*.among.[qk].bias": "adds the same if all queries are equal, as in GRAIN's first layer",
    "*layers.0.norm1.weight": "GRAIN's first queries are zeros",
    "image.box.*": "is of GRAIN's graph `regions`",
    "*.experts.*": "the router may send no token to an expert",
    "*stages.0.blocks.0.norm.*": "timm's layer scale makes its effect tiny",
}


@pytest.mark.slow
@ALL
def test_every_norm_and_bias_of_its_checkpoint_changes_the_answers(name: str, checkpoint, photographs, tmp_path: Path):
    net = load(str(checkpoint(name)))
    for role, tower in net.towers.items():
        run, fed = torch_run(tower), shown(net, tower, tmp_path, photographs)
        before = [run(feed) for feed in fed]
        for key, parameter in tower.module.named_parameters():
            if parameter.ndim == 1 and not any(fnmatch(f"{role}.{key}", pattern) for pattern in IDLE):
                original, parameter.data = parameter.data, torch.full_like(parameter, float(key.endswith("weight")))
                pairs = zip(before, map(run, fed), strict=True)
                assert max(np.abs(old[name] - new[name]).max() for old, new in pairs for name in old) > VISIBLE, key
                parameter.data = original


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(read(path).tensors)


def _damaged(path: Path, tensors: dict[str, torch.Tensor], target: Path) -> Path:
    """The checkpoint at ``path`` with other tensors and the same configs."""
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
    """The checkpoint's names of the tensors that a rule translates."""
    rules = LAYOUTS.get(name).rules
    return [key for key in sorted(checkpoint.tensors) if (rule := layouts._apply(rules, key)[0]) and rule.ours]


@ALL
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_tensor_that_is_missing_is_named(name: str, fraction: float, checkpoint, tmp_path: Path):
    path = checkpoint(name)
    needed = _needed(name, read(path))
    tensors = _tensors(path)
    decisive = [key for key in needed if any(layouts._match(pattern, key) for pattern in LAYOUTS.get(name).keys)]
    others = [key for key in needed if key not in decisive]
    gone = others[int(fraction * len(others))]
    del tensors[gone]
    damaged = _damaged(path, tensors, tmp_path / "damaged")
    with pytest.raises(UnknownCheckpoint, match=gone.replace(".", r"\.")):
        load(str(damaged))


@ALL
def test_without_its_decisive_tensor_the_nearest_layout_is_named(name: str, checkpoint, tmp_path: Path):
    tensors = _tensors(checkpoint(name))
    gone = next(key for key in tensors if layouts._match(LAYOUTS.get(name).keys[0], key))
    damaged = _damaged(checkpoint(name), {k: t for k, t in tensors.items() if k != gone}, tmp_path / "damaged")
    with pytest.raises(UnknownCheckpoint, match=gone.replace(".", r"\.")):
        recognise(str(damaged))


@ALL
def test_a_tensor_that_is_unexpected_is_named(name: str, checkpoint, tmp_path: Path):
    tensors = _tensors(checkpoint(name)) | {"somewhere.else.weight": torch.zeros(3)}
    with pytest.raises(UnknownCheckpoint, match=r"somewhere\.else\.weight"):
        load(str(_damaged(checkpoint(name), tensors, tmp_path / "more")))


def test_a_tensor_under_both_of_its_names_is_refused(checkpoint, tmp_path: Path):
    """A text projection is [W, D] without a suffix and [D, W] with one. With both, the layout is ambiguous."""
    tensors = _tensors(path := checkpoint("openai"))
    tensors |= {"text_projection.weight": 2 * tensors["text_projection"].T.contiguous()}
    with pytest.raises(UnknownCheckpoint, match=r"text_projection.* and text_projection.* are two names of one tensor"):
        load(str(_damaged(path, tensors, tmp_path / "both")))


@ALL
@pytest.mark.parametrize("fraction", [0.35, 0.65])
def test_a_tensor_of_another_shape_is_named(name: str, fraction: float, checkpoint, tmp_path: Path):
    path = checkpoint(name)
    tensors = _tensors(path)
    matrices = [key for key in _needed(name, read(path)) if tensors[key].ndim == 2]
    bent = matrices[int(fraction * len(matrices))]
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
def test_a_tensor_that_cannot_be_a_weight_is_refused_in_one_line(name: str, kind: str, checkpoint, monkeypatch):
    opened = read(checkpoint(name))
    # a temperature may be [1] as well as [], and steps are counted in integers
    needed = [key for key in _needed(name, opened) if not key.startswith("logit") and not key.endswith("_tracked")]
    for fraction in (0.05, 0.4, 0.75):
        bad = needed[int(fraction * len(needed))]
        spoiled = dict(opened.tensors) | {bad: DAMAGE[kind](opened.tensors[bad])}
        monkeypatch.setattr(
            "calmclip.export.nets.clip.read", lambda *_, tensors=spoiled: replace(opened, tensors=tensors)
        )
        with pytest.raises(UnknownCheckpoint) as raised:
            load(str(checkpoint(name)))
        assert "\n" not in str(raised.value)
        assert opened.path.name in str(raised.value)
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
def test_clips_tokenizer_comes_with_its_cleaning(name: str, checkpoint):
    net = load(str(checkpoint(name)))
    if net.files.get("tokenizer.json") == clip_bpe.tokenizer_json():
        assert net.towers["text"].preprocess.clean == clip_bpe.CLEAN


def test_no_two_rules_of_a_layout_read_the_same_name(checkpoint):
    for name in LAYOUTS.names():
        rules = LAYOUTS.get(name).rules
        for key in read(checkpoint(name)).names:
            fitting = [rule for rule in rules if layouts._match(rule.theirs, key)]
            assert len(fitting) <= 1, f"{name}: {key} is read by {[rule.theirs for rule in fitting]}"
