"""The oracle is transformers, in float32; for the pooling sentence-transformers' definitions, worked out in torch."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from calmclip.export.checkpoints import Weights
from calmclip.export.layouts import to_checkpoint
from calmclip.export.nets import Net, ready
from calmclip.export.nets.decoder import load
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests.tiny import END, START, changed
from tests.tiny_layouts.decoders import (
    CONTEXT,
    KINDS,
    LENGTHS,
    decoder,
    edited,
    padded,
    reference,
    sentence_modules,
    states,
)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(kind: str = "llama", **changes: Any) -> Path:
        return decoder(tmp_path / f"{kind}{len([*tmp_path.iterdir()])}", kind, **changes)

    return write


def module(net: Net) -> Any:
    return net.towers["text"].module


@torch.no_grad()
def check(directory: Path, weights: Weights = Weights()) -> Net:  # noqa: B008 - frozen
    """Hidden states of the unfolded net, and vectors of the folded one, for padding on either side."""
    net, folded = load(str(directory), weights, fold=False), load(str(directory), weights)
    for side in ("right", "left"):
        ids, mask = padded(side)
        want, kept = states(directory, ids, mask), mask.bool()
        assert torch.allclose(module(net).hidden(ids, mask)[kept], want[kept], atol=1e-4)
        rows = [F.normalize(state[row][-1 if module(net).style.causal else slice(None)].reshape(-1, 32).mean(0), dim=0)
                for state, row in zip(want, kept, strict=True)]  # fmt: skip
        assert torch.allclose(module(folded)(ids, mask), torch.stack(rows), atol=1e-5)
        assert torch.allclose(module(net)(ids, mask), torch.stack(rows), atol=1e-5)
    return folded


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_transformers(kind: str, make: Make):
    """Also with the head for words, whose names have a prefix; and a text alone is as in a batch."""
    net = check(make(kind, head=kind in ("qwen3", "gemma2", "phi3")))
    ids, mask = padded("right")
    with torch.no_grad():
        together = module(net)(ids, mask)
        for row, tokens in enumerate(LENGTHS):
            alone = module(net)(ids[row : row + 1, :tokens], mask[row : row + 1, :tokens])
            assert torch.allclose(alone[0], together[row], atol=1e-6)
    preprocess = net.towers["text"].preprocess
    assert (net.tasks, preprocess.context, preprocess.truncate) == (("embed", "raw"), CONTEXT, True)
    assert f"{kind}, causal attention, pooling last, the default because no modules.json" in net.source.notes
    assert net.towers["text"].promises == {"Softmax": 3}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "factor": 8.0}
_LONG = {"short_factor": [1.0, 1.5], "long_factor": [4.0, 8.0], "original_max_position_embeddings": 32}
_HEADS = {"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
_ROPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_type": "linear", "factor": 4.0}, {}),
    ("llama", {"rope_type": "llama3", **_LLAMA3}, {"head_dim": 32}),
    ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"head_dim": 32}),
    ("llama", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, {}),
    ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}, {}),
    ("phi3", {"rope_type": "longrope", **_LONG}, {"original_max_position_embeddings": 32, **_HEADS}),
    ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, {}),
]


@pytest.mark.parametrize(("kind", "rope", "more"), _ROPES, ids=[f"{k}-{r.get('rope_type')}" for k, r, _ in _ROPES])
def test_every_scaling_of_rope_equals_transformers(kind: str, rope: dict[str, Any], more: dict[str, Any], make: Make):
    theta = {} if kind == "gemma3_text" else {"rope_theta": 500.0}
    net = check(make(kind, rope_parameters={**theta, **rope}, **more))
    limit = 32 if rope.get("rope_type") == "longrope" else CONTEXT
    assert net.towers["text"].preprocess.context == limit


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("phi3", {"rope_theta": 300.0, "partial_rotary_factor": 0.5}),
        ("gemma", {"rope_theta": 300.0, "hidden_act": "gelu"}),
        ("gemma2", {"rope_theta": 300.0, "layer_types": None}),
        (
            "gemma3_text",
            {
                "rope_theta": 300.0,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "layer_types": None,
                "sliding_window_pattern": 3,
            },
        ),
        ("qwen2", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    ],
)
def test_keys_of_older_configs_are_read(kind: str, keys: dict[str, Any], make: Make):
    check(edited(make(kind), "rope_parameters", **keys))


def test_a_key_that_is_absent_has_the_default_of_its_class(make: Make):
    absent = ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim", "hidden_act")
    check(edited(make("llama", num_key_value_heads=4), *absent))
    check(edited(make("qwen3", head_dim=128), *absent[:2], "head_dim"))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"is_causal": False}),
        ("llama", {"is_causal": False}),
        ("mistral", {"is_causal": False, "sliding_window": 3}),
    ],
)
def test_attention_in_both_directions(kind: str, keys: dict[str, Any], make: Make):
    """EmbeddingGemma's key, and transformers' own. Without modules.json the mean of all tokens is pooled."""
    net = check(edited(make(kind), **keys))
    assert "bidirectional attention, pooling mean, the default" in net.source.notes


def test_the_classes_of_llm2vec_and_the_recipe_state_the_attention(make: Make):
    want = module(load(str(edited(make(), is_causal=False))))
    ids, mask = padded("right")
    for name in ("LlamaBiModel", "LlamaBiForMNTP", "LlamaEncoderModel"):
        assert torch.equal(module(load(str(edited(make(), architectures=[name]))))(ids, mask), want(ids, mask))
    stated = load(str(make()), Weights(attention="bidirectional", pool="mean"))
    assert torch.equal(module(stated)(ids, mask), want(ids, mask))
    assert "pooling mean, as the recipe states" in stated.source.notes
    causal = load(str(edited(make(), is_causal=False)), Weights(attention="causal"))
    assert torch.equal(module(causal)(ids, mask), module(load(str(make())))(ids, mask))


@torch.no_grad()
def vectors(directory: Path, pool: str, prompt: int) -> Tensor:
    """sentence-transformers' pooling, where the first ``prompt`` tokens of each text are not pooled."""
    ids, mask = padded("right")
    hidden = states(directory, ids, mask)
    pooled = mask * (torch.arange(mask.shape[1]) >= prompt)
    weights = {"mean": pooled, "weightedmean": pooled * torch.arange(1, mask.shape[1] + 1)}.get(pool)
    if weights is not None:
        rows = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    else:
        rows = hidden[range(3), [prompt if pool == "cls" else tokens - 1 for tokens in LENGTHS]]
    for layer in sorted(directory.glob("*_Dense")):
        rows = rows @ load_file(layer / "model.safetensors")["linear.weight"].T
        rows = torch.tanh(rows) if "Tanh" in (layer / "config.json").read_text() else rows
    return F.normalize(rows, dim=-1)


@pytest.mark.parametrize("pool", ["cls", "mean", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("dense", [{}, {"Identity0": 48, "Identity1": 24}, {"Tanh0": 48, "Tanh1": 16, "Identity": 24}])
def test_modules_of_sentence_transformers(pool: str, dense: Mapping[str, int], make: Make):
    directory = sentence_modules(make("qwen3"), pool, dense, include_prompt=False, context=20)
    net = load(str(directory))
    tower = net.towers["text"]
    assert (tower.preprocess.context, [*tower.inputs]) == (20, ["ids", "mask", "pooled"])
    assert tower.outputs["text_embeds"].shape == ("B", [32, *dense.values()][-1])
    for side in ("right", "left"):
        ids, mask = padded(side)
        for prompt in (0, 2):
            pooled = mask * (mask.cumsum(dim=1) > prompt)
            with torch.no_grad():
                answer = tower.module(ids, mask, pooled)
            assert torch.allclose(answer, vectors(directory, pool, prompt), atol=1e-5), (side, prompt)


def test_prompts_and_limits_are_read(make: Make):
    prompts = {"query": "red ", "document": None, "passage": ""}
    directory = sentence_modules(make(), "mean", prompts=prompts, default="query", context=99)
    preprocess = load(str(directory)).towers["text"].preprocess
    assert (preprocess.prompts, preprocess.prompt) == ({"query": "red ", "passage": ""}, "query")
    assert (preprocess.context, preprocess.pooled, preprocess.pad_id) == (CONTEXT, None, 0)
    sentence = {**json.loads((directory / "1_Pooling" / "config.json").read_text())}
    del sentence["pooling_mode"]
    old = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(sentence | old))
    assert "pooling last" in load(str(directory)).source.notes


def test_half_precision_is_read_as_float32(make: Make):
    directory = make("gemma2")
    state = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    edited(directory, dtype="float32")
    check(directory)
    assert all(tensor.dtype == torch.float32 for tensor in module(load(str(directory))).state_dict().values())


def test_tensors_that_are_not_needed_are_dropped_and_the_names_are_kept(make: Make):
    directory = make("phi3", head=True)
    state = load_file(directory / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | more, directory / "model.safetensors", metadata={"format": "pt"})
    net = load(str(directory), fold=False)
    ours = {f"text.{name}": tensor for name, tensor in module(net).state_dict().items()}
    written = to_checkpoint(net.layout, ours)
    assert written.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    llama = make("llama")
    net = load(str(llama), fold=False)
    written = to_checkpoint(net.layout, {f"text.{name}": t for name, t in module(net).state_dict().items()})
    state = load_file(llama / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())


@contextmanager
def gated(model: Any, gates: list[Callable[[Tensor], Tensor]], softmax: Callable[[Tensor], Tensor]) -> Any:
    """``model`` of transformers with each head's answer times gates(x) [B, T, H], and another softmax."""
    from transformers.models.llama import modeling_llama

    hooks, inputs = [], {}
    for index, layer in enumerate(model.layers):
        keep = lambda _, args, kwargs, index=index: inputs.update({index: kwargs["hidden_states"]})  # noqa: E731
        hooks.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))

        def scale(_: Any, args: tuple[Tensor], index: int = index) -> tuple[Tensor]:
            return ((torch.unflatten(args[0], -1, (4, -1)) * gates[index](inputs[index])[..., None]).flatten(-2),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(scale))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.nn.functional, "softmax", lambda x, **_: softmax(x))
        yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["per_head", "all_heads", "linear"])
def test_clipped_softmax_and_gates_of_a_config(kind: str, make: Make):
    """Equation 4 and section 4.2 of arXiv 2306.12929, put into transformers' own model."""
    directory = make()
    state, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    gates: list[Callable[[Tensor], Tensor]] = []
    for layer in range(3):
        stem = f"layers.{layer}.self_attn.alpha"
        weight, bias = torch.randn(4, 32, generator=generator), torch.randn(4, generator=generator)
        if kind == "per_head":
            state[stem] = bias
            gates.append(lambda x, bias=bias: 2 * bias.sigmoid().expand(*x.shape[:2], 4))
        elif kind == "all_heads":
            state |= {f"{stem}.weight": weight, f"{stem}.bias": bias}
            gates.append(lambda x, weight=weight, bias=bias: 2 * (x @ weight.T + bias).sigmoid())
        else:
            weight = weight[:, :8].contiguous()
            for head in range(4):
                state |= {f"{stem}.{head}.weight": weight[head : head + 1].clone()}
                state |= {f"{stem}.{head}.bias": bias[head : head + 1].clone()}
            gates.append(
                lambda x, weight=weight, bias=bias: (
                    2 * ((torch.unflatten(x, -1, (4, 8)) * weight).sum(-1) + bias).sigmoid()
                )
            )
    plain = reference(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    edited(directory, attn_softmax="clipped(-0.1:1.05)", attn_gate_scale=2.0)
    ids, mask = padded("right")
    clipped = lambda x: (x.softmax(-1) * 1.15 - 0.1).clamp(0, 1)  # noqa: E731
    with torch.no_grad(), gated(plain, gates, clipped):
        want = plain(ids, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        net = load(str(directory), fold=False)
        assert torch.allclose(module(net).hidden(ids, mask)[mask.bool()], want[mask.bool()], atol=1e-4)
        rows = F.normalize(want[range(3), [tokens - 1 for tokens in LENGTHS]], dim=-1)
        assert torch.allclose(module(ready(net))(ids, mask), rows, atol=1e-5)


def test_the_tokens_at_the_ends_are_those_of_the_files(make: Make):
    directory = make()
    written = Tokenizer.from_str(load(str(directory)).files["tokenizer.json"].decode())
    assert written.encode("red cat").ids[::3] == [START, END]
    plain = json.loads((directory / "tokenizer.json").read_text()) | {"post_processor": None}
    (directory / "tokenizer.json").write_text(json.dumps(plain))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for first, last in ((True, True), (False, True), (True, None), (None, False)):
        stated = settings | {"add_bos_token": first, "add_eos_token": last}
        (directory / "tokenizer_config.json").write_text(json.dumps(stated))
        written = Tokenizer.from_str(load(str(directory)).files["tokenizer.json"].decode())
        ids = written.encode("red cat").ids
        assert (ids[0] == START, ids[-1] == END) == (first is True, last is True)
        assert len(ids) == 2 + (first is True) + (last is True)


_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the kind of rope_scaling is 'dynamic'"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "'llama3' lacks or misstates 'low_freq_factor'",
    ),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "short_factor with 1 numbers; expected 4"),
    ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'; expected one of silu"),
    ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
    ("llama", {"num_key_value_heads": 3}, "4 heads of 8 numbers read 3 heads of keys"),
    ("qwen3", {"head_dim": 7}, "4 heads of 7 numbers"),
    ("qwen3", {"head_dim": 8}, r"layers.0.self_attn.[a-z]_proj.weight has the shape \[128, 32\]; expected \[64, 32\]"),
    ("llama", {"num_hidden_layers": 5}, "num_hidden_layers is 5; the weights hold 3"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 3 entries"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true, which gemma does not have"),
    ("llama", {"attn_softmax": "clipped(1:0)"}, "attention: softmax is"),
    ("llama", {"attn_gate_type": "unconditional_per_head"}, "attn_gate_type is"),
]


@pytest.mark.parametrize(("kind", "keys", "message"), _ERRORS, ids=[message[:30] for *_, message in _ERRORS])
def test_a_setting_that_is_not_supported_is_named(kind: str, keys: dict[str, Any], message: str, make: Make):
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(edited(make(kind), "rope_parameters", **keys)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pools by max; expected one of cls"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pools by mean and cls"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.ReLU"},
            "activation_function is ReLU; expected one of",
        ),
        ("config_sentence_transformers.json", {"prompts": {"q": 1}}, "expected texts by name"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name is 'q'"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.CNN", "path": "1"}], "module 1 is CNN"),
    ],
)
def test_a_module_that_is_not_supported_is_named(file: str, content: object, message: str, make: Make):
    directory = sentence_modules(make(), dense={"Tanh": 16})
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(directory))


def test_a_recipe_that_contradicts_the_checkpoint_is_refused(make: Make):
    with pytest.raises(BadRequest, match=r"modules\.json states the pooling; leave out pool 'mean'"):
        load(str(sentence_modules(make())), Weights(pool="mean"))
    with pytest.raises(BadRequest, match="states its own activation"):
        load(str(make()), Weights(activation="gelu"))
    state = load_file(make("qwen2") / "model.safetensors")
    directory = changed(make("qwen2"), make("llama").parent / "lacking")
    save_file({n: t for n, t in state.items() if n != "layers.1.mlp.up_proj.weight"}, directory / "model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=r"lacks 1 tensors, for example layers\.1\.mlp\.up_proj\.weight"):
        load(str(directory))
