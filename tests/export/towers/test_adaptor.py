"""The adaptor of LLM2CLIP and ProCLIP: its formula, its sizes, what a checkpoint may say of them, and INT8."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calmclip.export import calibrate, parity
from calmclip.export.checkpoints import Weights
from calmclip.export.nets.clip import load
from calmclip.export.quantizers import QUANTIZERS, Goal
from calmclip.export.recipe import Calibration
from calmclip.export.towers import part
from calmclip.export.towers.adaptor import TextAdaptor
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import VectorPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny
from tests.tiny_layouts import llm2clip
from tests.tiny_layouts.llm2clip import WIDTH, adaptor, adaptor_state, vectors


def renamed_by_hand(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names of an adaptor's tensors, by hand."""
    names = {".fn.0.": ".up.", ".fn.3.": ".down.", ".ln.": ".norm."}
    renamed = {}
    for theirs, tensor in state.items():
        ours = theirs.replace(llm2clip.START, "layers.")
        for old, new in names.items():
            ours = ours.replace(old, new)
        renamed[ours] = tensor
    return renamed


def module(state: dict[str, torch.Tensor]) -> TextAdaptor:
    tower = TextAdaptor(part(renamed_by_hand(state), ""))
    tower.load_state_dict(renamed_by_hand(state))
    return tower.eval()


@pytest.mark.parametrize(("blocks", "times"), [(4, 2), (1, 8), (6, 1)])
def test_it_is_its_formula_at_any_depth_and_width(blocks: int, times: int):
    state, rows = adaptor_state(16, blocks=blocks, times=times), torch.from_numpy(vectors(9))
    wanted = F.normalize(adaptor(state, rows, normalize=False), dim=-1)
    with torch.inference_mode():
        assert (module(state)(rows) - wanted).abs().max() < 1e-5
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def test_with_zero_residuals_it_is_the_norm_and_the_linear_layer():
    state, rows = adaptor_state(16), torch.from_numpy(vectors(9))
    for name, tensor in state.items():
        if ".fn.3." in name:
            tensor.zero_()
    last = {name.removeprefix(llm2clip.START): tensor for name, tensor in state.items()}
    with torch.inference_mode():
        normed = F.layer_norm(rows, (WIDTH,), last["4.weight"], last["4.bias"])
        wanted = F.normalize(F.linear(normed, last["5.weight"], last["5.bias"]), dim=-1)
        assert torch.equal(module(state)(rows), wanted)


@pytest.fixture(scope="module")
def traced(checkpoint):
    return to_onnx(load(str(checkpoint("llm2clip"))).towers["text"])


@pytest.mark.parametrize("quantizer", ["dynamic", "search"])
def test_int8_is_near_the_formula(quantizer: str, traced):
    """Through the traced graph, quantized by the default and by a search over vectors."""
    model, plugin = copy.deepcopy(traced), QUANTIZERS.get(quantizer)
    feeds = [{"vectors": F.normalize(torch.from_numpy(row[None]), dim=-1).numpy()} for row in vectors(64)]
    settled, params, ranges = plugin, plugin.params(), {}
    if plugin.search:
        goal = Goal(0.99, 0.95, dims={"B": 1})
        chosen = plugin.search(model, iter(feeds[:48]), iter(feeds[48:]), params, goal)
        settled, params, ranges = QUANTIZERS.get(chosen.quantizer), chosen.params, chosen.ranges
    quantized = settled.quantize(model, ranges, params)
    certificate = vectors(32, seed=5)
    run = parity.onnx_run(quantized)
    unit = certificate / np.linalg.norm(certificate, axis=1, keepdims=True)
    rows = np.concatenate([run({"vectors": row[None]})["text_embeds"] for row in unit])
    state = adaptor_state(16)
    wanted = F.normalize(adaptor(state, torch.from_numpy(certificate)), dim=-1).numpy()
    cosines = (rows * wanted).sum(axis=1) / np.linalg.norm(rows, axis=1)
    assert cosines.mean() >= 0.99
    assert cosines.min() >= 0.95
    assert any("Integer" in node.op_type or node.op_type == "QuantizeLinear" for node in quantized.graph.node)


def changed_config(checkpoint: Path, to: Path, **changes: object) -> Path:
    config = json.loads((checkpoint / "open_clip_config.json").read_text())["model_cfg"]
    text = {**config["text_cfg"], **changes.pop("text_cfg", {})}  # type: ignore[dict-item]
    return tiny.changed(checkpoint, to, "open_clip_config.json", model_cfg={**config, "text_cfg": text, **changes})


def test_proclips_config_states_the_sizes_of_its_weights(checkpoint, tmp_path: Path):
    """One block of eight times the width, 24 numbers in, 16 out."""
    net = load(str(checkpoint("proclip")), Weights(text_model="org/embedder"))
    text = net.towers["text"]
    assert text.preprocess == VectorPreprocess(dim=WIDTH, normalize=True, model="org/embedder")
    assert (text.inputs["vectors"].shape, text.outputs["text_embeds"].shape) == (("B", WIDTH), ("B", 16))
    assert [tuple(layer.up.weight.shape) for layer in text.module.layers[:-2]] == [(8 * WIDTH, WIDTH)]
    assert net.classifier is not None
    assert net.classifier.templates == ()
    assert net.files == {}
    wrong = {
        f"llm_embedding_dim 4096; the weights of the adaptor make it {WIDTH}": {
            "text_cfg": {"llm_embedding_dim": 4096}
        },
        "embed_dim 1280; the weights of the adaptor make it 16": {"embed_dim": 1280},
    }
    for place, (says, change) in enumerate(wrong.items()):
        with pytest.raises(UnknownCheckpoint, match=says):
            load(str(changed_config(checkpoint("proclip"), tmp_path / str(place), **change)))


def test_a_file_without_a_config_needs_the_activation(tmp_path: Path, checkpoint):
    """As OpenAI's own weights. The net is then the same as that of the directory."""
    file = llm2clip._file(tmp_path, llm2clip.llm2clip_state(), "llm2clip.safetensors")
    with pytest.raises(UnknownCheckpoint, match="pass --activation quick_gelu"):
        load(str(file))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nets = load(str(file), Weights(activation="quick_gelu")), load(str(checkpoint("llm2clip")))
    with torch.inference_mode():
        assert torch.equal(*(net.towers["image"].module(pixels) for net in nets))
    with pytest.raises(BadRequest, match="states the activation; leave it out"):
        load(str(checkpoint("llm2clip")), Weights(activation="gelu"))
    with pytest.raises(BadRequest, match="text_model 'x' does not apply"):
        load(str(checkpoint("openai")), Weights(text_model="x"))


def test_towers_of_two_lengths_are_refused(tmp_path: Path):
    state = llm2clip.llm2clip_state() | adaptor_state(20)
    file = llm2clip._file(tmp_path, state, "llm2clip.safetensors")
    says = "visual.proj for 16 and text.text_adaptor.5.weight for 20 numbers in a vector"
    with pytest.raises(UnknownCheckpoint, match=says):
        load(str(file), Weights(activation="quick_gelu"))


def test_calibration_takes_vectors_of_a_file_or_random_ones(checkpoint, tmp_path: Path):
    net = load(str(checkpoint("llm2clip")))
    lines: list[str] = []
    drawn = calibrate.inputs(Calibration(count=40), net, tmp_path, lines.append)
    assert [len(getattr(drawn.texts, name)) for name in calibrate.PARTS] == [30, 10, 64]
    assert drawn.texts.source == "random vectors"
    everything = np.concatenate([np.stack(getattr(drawn.texts, name)) for name in calibrate.PARTS])
    assert len(np.unique(everything, axis=0)) == 104  # none in two parts
    assert "random vectors" in lines[0]
    again = calibrate.inputs(Calibration(count=40), net, tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(drawn.texts.search, again.texts.search, strict=True))
    assert drawn.describe(net.towers["text"]) == "30 vectors, and 10 others to search with (random vectors), seed 0"

    rows = vectors(60)
    np.save(tmp_path / "rows.npy", np.concatenate([rows, rows[:5]]))
    given = calibrate.inputs(Calibration(count=40, texts=tmp_path / "rows.npy"), net, tmp_path).texts
    parts = [np.stack(getattr(given, name)) for name in calibrate.PARTS]
    assert [len(each) for each in parts] == [30, 10, 15]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 55  # none twice
    (feed,) = calibrate.feeds(net.towers["text"], tmp_path, [], [given.search[0]])
    assert np.linalg.norm(feed["vectors"]) == pytest.approx(1, abs=1e-6)
    np.save(tmp_path / "wrong.npy", rows[:, :5])
    with pytest.raises(BadRequest, match=r"wrong.npy: vector 0 has 5 numbers"):
        calibrate.inputs(Calibration(texts=tmp_path / "wrong.npy"), net, tmp_path)
    np.save(tmp_path / "few.npy", rows[:31])
    with pytest.raises(BadRequest, match="at least 32 are needed"):
        calibrate.inputs(Calibration(texts=tmp_path / "few.npy"), net, tmp_path)
