"""The contract of every adapter, on a net that it fits and on a net that it does not fit."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calmclip.export import adapters, pipeline
from calmclip.export.adapters import ADAPTERS, Adapt, Adapter, Context, adapt
from calmclip.export.adapters._tensors import token_ids
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import NETS, Net, Tower, ready
from calmclip.export.recipe import load_recipe
from calmclip.export.trace import example
from calmclip.models.errors import BadRequest, UnknownCheckpoint, UnknownName
from tests import tiny, tuned
from tests.tiny_layouts import decoders, llm2clip

# The params of each adapter on the tiny Hugging Face CLIP, or on the net in `BASES`; OTHER stands for a checkpoint of
# the same shapes, KIN for one that differs in its MLPs alone, LEARNT and STATES for prompts that were tuned over it,
# NAMES for class names, DECODER for a language model, TUNED for LoRA over the CLIP, ROWS for learnt rows.
OTHER, KIN, LEARNT, NAMES, STATES, DECODER = "OTHER", "KIN", "LEARNT", "NAMES", "STATES", "DECODER"
TUNED, ROWS = "TUNED", "ROWS"
PARAMS: dict[str, dict[str, Any]] = {
    "anomaly": {"checkpoint": STATES, "size": 40},
    "attribution": {"on": True, "layers": 2},
    "dense": {"method": "values"},
    "lora": {"checkpoint": TUNED},
    "mocoop": {"checkpoint": LEARNT, "classes": NAMES},
    "mix": {"checkpoint": OTHER, "alpha": 0.5},
    "over": {"checkpoint": OTHER},
    "prefix": {"checkpoint": ROWS},
    "prune": {"keep": 0.5},
    "softmax": {"kind": "clipped(-0.04:1.01)", "force": True},
    "stretch": {"tokens": 60},
    "svd-scale": {"by": 0.9},
    "text_encoder": {"checkpoint": DECODER},
    "upcycle": {"checkpoints": KIN},
}
BASES = {"text_encoder": "llm2clip"}  # the layouts of other checkpoints that adapters fit
OFFERED = {"languages"}  # fits only a net that ships its tower; see test_mini_languages.py


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_clip(tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_clip_kin(tmp_path_factory.mktemp("kin") / "kin")


@pytest.fixture(scope="module")
def mini() -> Net:
    return NETS.get("mini").load("mini")


@pytest.fixture(params=[name for name in ADAPTERS.names() if name not in OFFERED])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of MoCoOp, saved without the base."""
    file, width, dim = tmp_path_factory.mktemp("learnt") / "prompts.safetensors", 32, 16
    contexts = {f"ctx_{place}_{i}": torch.randn(i + 1, width) for place in ("before", "after") for i in (0, 1)}
    save_file({**contexts, "gate.weight": torch.randn(2, dim), "gate.bias": torch.randn(2)}, file)
    (file.parent / "names.txt").write_text("cat\nred dog\n")
    return file


@pytest.fixture
def states(tiny_hf_clip: Path, tmp_path: Path) -> Path:
    """Prompts of AnomalyCLIP: two learnt tokens, then the end of a text."""
    net, width = opened(tiny_hf_clip), 32
    ends = net.towers["text"].module.tokens.weight[token_ids(net, ["object"])[0][-1]].detach()
    rows = {"token_prefix": torch.randn(1, 1, 1, width), "ctx": torch.randn(1, 1, 2, width)}
    rows["token_suffix"] = ends.clone()[None, None, None]
    save_file(
        {f"{part}_{side}": tensor.clone() for side in ("pos", "neg") for part, tensor in rows.items()},
        tmp_path / "states.safetensors",
    )
    return tmp_path / "states.safetensors"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.decoder(tmp_path_factory.mktemp("decoder") / "decoder", hidden_size=llm2clip.WIDTH)


@pytest.fixture
def base(name: str, tiny_hf_clip: Path, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(BASES[name]) if name in BASES else tiny_hf_clip


@pytest.fixture(scope="module")
def tuned_files(tiny_hf_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tuned")
    save_file({"ctx": torch.randn(2, 32)}, folder / "rows.safetensors")
    lora = tuned.lora(tiny_hf_clip, folder / "lora", "CLIPModel", target_modules=["q_proj", "fc1"])
    return {TUNED: str(lora), ROWS: str(folder / "rows.safetensors")}


@pytest.fixture
def adaptation(
    name: str, other: Path, kin: Path, learnt: Path, states: Path, decoder: Path, tuned_files: dict[str, str]
) -> Adapt:
    paths = {OTHER: str(other), KIN: str(kin), LEARNT: str(learnt), NAMES: str(learnt.parent / "names.txt"),
             STATES: str(states), DECODER: str(decoder), **tuned_files}  # fmt: skip
    return Adapt(name=name, params={k: paths.get(v, v) for k, v in PARAMS[name].items()})


def feeds(net: Net | None, tower: Tower) -> list[dict[str, np.ndarray]]:
    return [{key: t.numpy() for key, t in zip(tower.inputs, example(tower), strict=True)}]


def opened(checkpoint: Path) -> Net:
    return NETS.get("clip").unfolded(str(checkpoint))  # type: ignore[misc]


def test_the_example_of_the_page_runs(tiny_hf_clip: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(adapters.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ADAPTERS.load()
    monkeypatch.setattr(ADAPTERS, "_plugins", {**ADAPTERS._plugins})
    exec(block, {**vars(adapters)})
    net = opened(tiny_hf_clip)
    before = net.towers["image"].module.projection.weight.clone()
    louder = adapt(net, [Adapt(name="louder", params={"factor": 3})], Context(feeds))
    assert torch.equal(louder.towers["image"].module.projection.weight, 3 * before)
    assert louder.source.notes.endswith("projection times 3")


def test_the_adapted_net_has_the_promised_shapes_and_names_the_adapter(adaptation: Adapt, base: Path):
    net = replace(opened(base), ranges={"image": Path("ranges.json")})  # of the net before the change
    adapted = adapt(net, [adaptation], Context(feeds))
    assert adapted.adapters == (adaptation.name,)
    assert not adapted.ranges
    assert adapted.source.notes.startswith(f"{net.source.notes}; ")
    assert net.source.weights.items() <= adapted.source.weights.items()
    assert any(key.startswith(f"{adaptation.name}/") for key in adapted.source.weights) == (
        not {OTHER, KIN, LEARNT, STATES, DECODER, TUNED, ROWS}.isdisjoint(PARAMS[adaptation.name].values())
    )
    for tower in ready(adapted).towers.values():
        inputs = example(tower)
        with torch.inference_mode():
            result = tower.module(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        for output, promised in zip(outputs, tower.outputs.values(), strict=True):
            assert list(output.shape) == [{"B": 2, "T": 7}.get(str(dim), dim) for dim in promised.shape]
            assert output.isfinite().all()


def test_two_runs_give_the_same_bits(adaptation: Adapt, base: Path):
    for role in opened(base).towers:
        first, second = (ready(adapt(opened(base), [adaptation], Context(feeds))).towers[role] for _ in range(2))
        inputs = example(first)
        with torch.inference_mode():
            assert torch.equal(first.module(*inputs), second.module(*inputs))


def test_a_net_that_it_does_not_fit_is_refused_by_name(adaptation: Adapt, mini: Net):
    """The built-in model ships its graphs, and offers one of them to the adapter of its name."""
    if adaptation.name in mini.offers:
        return
    with pytest.raises(BadRequest, match=rf"{adaptation.name}.*EfficientNet.*without modules"):
        adapt(mini, [adaptation], Context(feeds))


def test_the_built_in_model_offers_the_graph_and_keeps_its_ranges(mini: Net):
    assert "attribution" not in mini.towers
    more = adapt(mini, [Adapt(name="attribution", params={"on": True})], Context(feeds))
    assert more.towers["attribution"].graph is not None
    assert more.ranges == mini.ranges
    assert more.source.notes.endswith("attribution of the last 1 layers of the text tower")
    with pytest.raises(BadRequest, match=r"layers is 2; the graph of .* has 1"):
        adapt(mini, [Adapt(name="attribution", params={"on": True, "layers": 2})], Context(feeds))


@pytest.mark.parametrize("params", [{"no_such": 1}, {}])
def test_unknown_or_missing_params_are_named_before_a_checkpoint_is_read(name: str, params: dict):
    with pytest.raises(
        BadRequest, match=rf"adapter {name}: \w+( \(--[\w-]+\))?: (there is no such param|Field required)"
    ):
        pipeline.load("clip", "nowhere", Weights(), [Adapt(name=name, params=params)])


def test_options_have_a_description(name: str):
    adapter = ADAPTERS.get(name)
    assert all(adapter.params.model_fields[param].description for param in adapter.flags.values())


def test_an_unknown_name_is_a_bad_request_and_an_option_for_an_unknown_param_a_defect():
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        pipeline.load("clip", "nowhere", Weights(), [Adapt(name="sofmax")])
    with pytest.raises(ValueError, match="a flag sets 'tokns'"):
        Adapter(ADAPTERS.get("stretch").params, lambda net, params, context: net, {"--x": "tokns"})


def test_adapters_run_in_the_order_of_the_recipe(tiny_hf_clip: Path, other: Path):
    """40 positions become 60, then 100. A checkpoint with 40 positions cannot be mixed with a net of 60."""
    stretched = [Adapt(name="stretch", params={"tokens": tokens}) for tokens in (60, 100)]
    net = adapt(opened(tiny_hf_clip), stretched, Context(feeds))
    assert net.source.notes.endswith("positions stretched from 40 to 60; positions stretched from 60 to 100")
    mixed = Adapt(name="mix", params={"checkpoint": str(other), "alpha": 0.5})
    adapt(opened(tiny_hf_clip), [mixed, stretched[0]], Context(feeds))
    with pytest.raises(
        UnknownCheckpoint, match=r"position_embedding\.weight has the shape \[40, 32\]; the base's is \[60, 32\]"
    ):
        adapt(opened(tiny_hf_clip), [stretched[0], mixed], Context(feeds))


def test_a_net_that_lacks_the_recipes_adapters_is_not_built(tiny_hf_clip: Path, tmp_path: Path):
    net = NETS.get("clip").load(str(tiny_hf_clip))
    recipe = load_recipe(str(tiny_hf_clip), "clip", net, adapters=[{"name": "stretch", "params": {"tokens": 60}}])
    with pytest.raises(BadRequest, match=r"the net has the adapters \[\], the recipe \['stretch'\]"):
        pipeline.build(recipe, tmp_path, net=net)
