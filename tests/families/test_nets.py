"""The contract of every net, on a checkpoint of each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calmclip.export import parity
from calmclip.export.nets import NETS, Net, ready
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.trace import example
from calmclip.models.bundle.manifest import TextPreprocess

CHECKPOINTS = {
    "mini": "mini", "clip": "tiny_hf_clip", "owl": "tiny_owl", "bert": "tiny_bert", "opt": "tiny_opt",
    "decoder": "tiny_decoder", "ranking": "tiny_ranking", "vit": "tiny_vit", "light_map": "tiny_light_map",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest):
    def of(name: str) -> str:
        fixture = CHECKPOINTS[name]
        return "mini" if fixture == "mini" else str(request.getfixturevalue(fixture))

    return of


@pytest.fixture(scope="module")
def net(checkpoint):
    loaded: dict[str, Net] = {}

    def of(name: str) -> Net:
        if name not in loaded:
            loaded[name] = NETS.get(name).load(checkpoint(name))
        return loaded[name]

    return of


def test_every_net_has_a_test_checkpoint():
    assert sorted(CHECKPOINTS) == NETS.names()


@pytest.mark.parametrize("name", NETS.names())
def test_it_recognises_its_own_checkpoints_and_no_others(name: str, checkpoint, tmp_path: Path):
    assert {other: NETS.get(name).recognise(checkpoint(other)) for other in CHECKPOINTS} == {
        other: other == name for other in CHECKPOINTS
    }
    assert not NETS.get(name).recognise(str(tmp_path))
    assert not NETS.get(name).recognise(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", NETS.names())
@pytest.mark.parametrize("content", [b"[]", b"no JSON", b"\xff", b"[" * 100_000, b'{"model_type": "bert"}'])
def test_the_config_of_another_model_is_not_recognised(name: str, content: bytes, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    assert NETS.get(name).recognise(str(tmp_path)) is False


@pytest.mark.parametrize("name", NETS.names())
def test_towers_answer_in_the_shapes_they_promise(name: str, net):
    for role, tower in net(name).towers.items():
        feeds = {name: tensor.numpy() for name, tensor in zip(tower.inputs, example(tower), strict=True)}
        run = parity.onnx_run(tower.graph) if tower.graph else parity.torch_run(tower)
        outputs = run(feeds)
        assert [*outputs] == [*tower.outputs], role
        sizes = {
            dim: size
            for name_of_input, array in feeds.items()
            for dim, size in zip(tower.inputs[name_of_input].shape, array.shape, strict=True)
            if isinstance(dim, str)
        }
        for name_of_output, promised in tower.outputs.items():
            output = outputs[name_of_output]
            assert list(output.shape) == [sizes.get(d, d) for d in promised.shape], role
            assert np.isfinite(output).all(), role
        if (vectors := outputs.get(f"{role}_embeds")) is not None:
            assert np.allclose(np.linalg.norm(vectors, axis=-1), 1.0, atol=1e-5), role


@pytest.mark.parametrize("name", [name for name in NETS.names() if NETS.get(name).unfolded])
def test_folding_later_gives_the_loaded_net(name: str, net, checkpoint):
    """The towers agree bit by bit. The net that is not folded keeps the tensors of its checkpoint."""
    later = NETS.get(name).unfolded(checkpoint(name))
    before = {
        role: {n: t.clone() for n, t in tower.module.state_dict().items()} for role, tower in later.towers.items()
    }
    folded = ready(later)
    assert (later.folded, folded.folded, ready(folded)) == (False, True, folded)
    for role, tower in net(name).towers.items():
        inputs, state = example(tower), later.towers[role].module.state_dict()
        assert state.keys() == before[role].keys()
        assert all(torch.equal(t, before[role][n]) for n, t in state.items())
        with torch.inference_mode():
            sides = [first.module(*inputs) for first in (tower, folded.towers[role])]
        for first, second in zip(*(side if isinstance(side, tuple) else (side,) for side in sides), strict=True):
            assert torch.equal(first, second), role


@pytest.mark.parametrize("name", NETS.names())
def test_it_has_every_field_that_the_pipeline_needs(name: str, net):
    loaded = net(name)
    assert loaded.name == name
    assert loaded.source.weights, "a bundle must name the weights it was made from"
    assert all(len(digest) == 64 for digest in loaded.source.weights.values())
    assert all(tower.quantizer in QUANTIZERS.names() for tower in loaded.towers.values())
    assert all(path.is_file() for path in loaded.ranges.values())
    if any(isinstance(tower.preprocess, TextPreprocess) for tower in loaded.towers.values()):
        assert "tokenizer.json" in loaded.files
