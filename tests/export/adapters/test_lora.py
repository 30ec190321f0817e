"""LoRA: the oracle is peft, which merges the same adapter into the same checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmclip.export.adapters import Adapt, Context, adapt, tensors
from calmclip.export.nets import NETS, Net
from calmclip.export.recipe import recognise
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny, tuned
from tests.tiny_layouts import decoders

LINEAR = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]  # of CLIP and OPT; k stays, between two that change
CLIP = {"target_modules": [*LINEAR, "token_embedding", "patch_embedding"]}
PATTERNS = {
    "rank_pattern": {"text_model.*q_proj": 3, "fc2": 2},
    "alpha_pattern": {"c1": 99, "v_proj": 1, r"layers\.1\.mlp\.fc1": 9},
}
DECODER = {"rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {"k_proj|qkv_proj": 3}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha / r": ("CLIPModel", CLIP),
    "patterns and alpha / sqrt(r)": ("CLIPModel", {**CLIP, **PATTERNS, "use_rslora": True}),
    "DoRA, also of a table and a convolution": ("CLIPModel", {**CLIP, "use_dora": True}),
    "biases of its layers": ("CLIPModel", {**CLIP, "bias": "lora_only"}),
    "all biases": ("CLIPModel", {**CLIP, "bias": "all"}),
    "a bias of B": ("CLIPModel", {"target_modules": LINEAR, "lora_bias": True, "use_rslora": True}),
    "whole modules": ("CLIPModel", {**CLIP, "modules_to_save": ["text_projection", "visual_projection"]}),
    "fan_in_fan_out": ("CLIPModel", {**CLIP, "fan_in_fan_out": True}),
    "a tower with its projection": ("CLIPTextModelWithProjection", {"target_modules": [*LINEAR, "text_projection"]}),
    "sentences": ("BertModel", {"target_modules": ["query", "value", "dense", "word_embeddings"]}),
    "masked words": ("BertForMaskedLM", {"target_modules": ["key", "dense"], "modules_to_save": ["transform"]}),
    "a decoder with its head": (
        "LlamaForCausalLM",
        {"target_modules": ["k_proj", "up_proj", "embed_tokens", "lm_head"], **DECODER},
    ),
    "a decoder without its head, DoRA": ("LlamaModel", {"target_modules": "all-linear", "use_dora": True}),
    "a decoder with joined q, k, v": (
        "Phi3Model",
        {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], **DECODER},
    ),
    "a decoder with norms of q and k": (
        "Qwen3Model",
        {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "norm"]},
    ),
    "a decoder with scaled embeddings": ("GemmaModel", {"target_modules": ["v_proj", "down_proj", "embed_tokens"]}),
    "next words": ("OPTForCausalLM", {"target_modules": [*LINEAR, "embed_tokens"], "bias": "all"}),
}
MAKERS: dict[str, Callable[[Path], Path]] = {  # beginning of a class's name -> a checkpoint
    "CLIP": tiny.hf_clip,
    "BertM": lambda path: tiny.sentences(path, "mean_tokens", {"Tanh": 24}),
    "BertF": tiny.bert,
    "OPT": tiny.opt,
    "LlamaF": lambda path: decoders.decoder(path, "llama", head=True),
    "LlamaM": lambda path: decoders.decoder(path, "llama"),
    "Phi3M": lambda path: decoders.decoder(path, "phi3", num_key_value_heads=2),
    "Qwen3M": lambda path: decoders.decoder(path, "qwen3"),
    "GemmaM": lambda path: decoders.decoder(path, "gemma"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {start: make(tmp_path_factory.mktemp(start) / "base") for start, make in MAKERS.items()}


def base_of(kind: str, bases: dict[str, Path]) -> Path:
    return next(path for start, path in bases.items() if kind.startswith(start))


def opened(checkpoint: Path, *adapters: Path, **params: Any) -> Net:
    net = NETS.get(recognise(str(checkpoint))[0]).unfolded(str(checkpoint))  # type: ignore[misc]
    listed = [Adapt(name="lora", params={"checkpoint": str(path), **params}) for path in adapters]
    return adapt(net, listed, Context(lambda net, tower: []))


def farthest(net: Net, other: Net) -> float:
    state, wanted = tensors(net), tensors(other)
    assert state.keys() == wanted.keys()
    return max(float((state[name] - wanted[name]).abs().max()) for name in wanted)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_that_peft_merges(case: str, bases: dict[str, Path], tmp_path: Path):
    kind, config = CASES[case]
    base = base_of(kind, bases)
    adapter = tuned.lora(base, tmp_path / "adapter", kind, **config)
    net, wanted = opened(base, adapter), opened(tuned.merged(base, [adapter], tmp_path / "merged", kind))
    assert farthest(net, opened(base)) > 0.05
    assert farthest(net, wanted) < 1e-6


def test_with_b_0_every_bit_stays(bases: dict[str, Path], tmp_path: Path):
    adapter = tuned.lora(bases["CLIP"], tmp_path / "adapter", "CLIPModel", trained=False, **CLIP)
    before, after = (tensors(opened(bases["CLIP"], *adapters)) for adapters in ((), (adapter,)))
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()


def test_adapters_are_merged_in_their_order_and_named_in_the_source(bases: dict[str, Path], tmp_path: Path):
    """The second replaces a matrix that the first changes; in the other order the first changes it again."""
    base = bases["CLIP"]
    pair = [
        tuned.lora(base, tmp_path / "first", "CLIPModel", target_modules=["text_projection"]),
        tuned.lora(
            base, tmp_path / "second", "CLIPModel", seed=1, target_modules=["fc1"], modules_to_save=["text_projection"]
        ),
    ]
    states = []
    for number, order in enumerate((pair, pair[::-1])):
        net = opened(base, *order)
        assert farthest(net, opened(tuned.merged(base, order, tmp_path / f"merged{number}", "CLIPModel"))) < 1e-6
        states.append(tensors(net)["text.projection.weight"])
    assert not torch.allclose(*states, atol=1e-2)
    assert net.source.notes.endswith("; LoRA second over base; LoRA first over base")
    files = {
        f"{key}/{name}" for key in ("lora", "lora-2") for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    assert net.source.weights.keys() == files | {"model.safetensors"}


def test_pickled_weights_of_older_releases_are_read(bases: dict[str, Path], tmp_path: Path):
    adapter = tuned.lora(bases["CLIP"], tmp_path / "adapter", "CLIPModel", **CLIP)
    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert farthest(opened(bases["CLIP"], old), opened(bases["CLIP"], adapter)) == 0


def test_names_that_begin_otherwise_than_those_of_the_checkpoint(bases: dict[str, Path], tmp_path: Path):
    """A `BertForMaskedLM` has the prefix ``bert.``, a `BertModel` has none. Neither pooler nor logits make a vector."""
    change: dict[str, dict[str, torch.Tensor]] = {}
    adapter = tuned.lora(bases["BertF"], tmp_path / "masked", "BertForMaskedLM", target_modules=["query", "decoder"])
    for start in ("BertF", "BertM"):
        before, after = (tensors(opened(bases[start], *adapters)) for adapters in ((), (adapter,)))
        change[start] = {name: after[name] - before[name] for name in before if ".qkv." in name}
    for name, tensor in change["BertF"].items():
        assert torch.allclose(tensor, change["BertM"][name], atol=1e-6)
    lines: list[str] = []
    adapt(
        NETS.get("bert").unfolded(str(bases["BertM"])),  # type: ignore[misc]
        [Adapt(name="lora", params={"checkpoint": str(adapter)})],
        Context(lambda net, tower: [], say=lines.append),
    )
    assert lines == [
        "lora: 1 tensors of layers that this net does not have are left out: cls.predictions.decoder.weight"
    ]


def test_a_trained_tensor_that_the_net_keeps_in_another_shape(tmp_path: Path):
    """ViT's class token is [1, 1, W] in a checkpoint and [W] here. The directory is written by hand."""
    token = torch.randn(1, 1, 32)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file({"base_model.model.vit.embeddings.cls_token": token}, tmp_path / "adapter_model.safetensors")
    net = opened(tiny.vit(tmp_path / "vit"), tmp_path)
    assert torch.equal(tensors(net)["image.cls"], token[0, 0])


def test_one_tower_whose_names_fit_both_is_named_by_the_caller(bases: dict[str, Path], tmp_path: Path):
    """A `CLIPTextModel` has no beginning of its own."""
    base = bases["CLIP"]
    adapter = tuned.lora(base, tmp_path / "adapter", "CLIPTextModel", target_modules=["q_proj", "fc1"])
    with pytest.raises(
        UnknownCheckpoint, match=r"fit text_model\.encoder.* and vision_model\.encoder.*--lora-tower text"
    ):
        opened(base, adapter)
    wanted = opened(tuned.merged(base, [adapter], tmp_path / "merged", "CLIPTextModel", "text_model."))
    assert farthest(opened(base, adapter, tower="text"), wanted) < 1e-6
    both = tuned.lora(base, tmp_path / "both", "CLIPModel", target_modules=["fc1"])
    with pytest.raises(UnknownCheckpoint, match=r"2 of its 4 tensors have no place: vision_model\.encoder"):
        opened(base, both, tower="text")
    with pytest.raises(BadRequest, match="no tower 'txt'; expected image or text"):
        opened(base, adapter, tower="txt")


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"target_modules": ["q_proj", "text_projection"], "use_dora": True}
    return tuned.lora(bases["CLIP"], tmp_path_factory.mktemp("lora") / "adapter", "CLIPModel", **config)


FIRST = "text_model.encoder.layers.0.self_attn.q_proj"
Q = f"base_model.model.{FIRST}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; expected LORA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected LORA"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            r"init_lora_weights is 'pissa_niter_16', which is not supported; merge",
        ),
        ({"loftq_config": {"loftq_bits": 4}}, r"loftq_config is \{'loftq_bits': 4\}, which is not supported"),
        ({"use_qalora": True}, "use_qalora is True, which is not supported"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is .*, which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*, which is not supported"),
        ({"of_a_later_release": 1}, "of_a_later_release is 1, which is not supported"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"rank_pattern": {"(": 3}}, r"the pattern \( is no regular expression"),
        ({"rank_pattern": {"q_proj": 3}}, rf"{FIRST} has A \[4, 32\] and B \[32, 4\]; expected the rank 3"),
        ({"use_dora": False}, rf"holds {FIRST}.lora_magnitude_vector, which its adapter_config.json does not mention"),
    ],
)
def test_a_config_that_is_not_supported(
    config: dict[str, Any], message: str, adapter: Path, bases: dict[str, Path], tmp_path: Path
):
    with pytest.raises(UnknownCheckpoint, match=message):
        opened(bases["CLIP"], tiny.changed(adapter, tmp_path / "changed", "adapter_config.json", **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_B.weight": None}, rf"lacks {FIRST}\.lora_B"),
        ({f"{Q}.lora_magnitude_vector": None}, rf"lacks {FIRST}\.lora_magnitude_vector"),
        (
            {f"{Q}.lora_A.weight": torch.ones(4, 31)},
            r"A \[4, 31\] and B \[32, 4\] make no change of a weight \[32, 32\]",
        ),
        ({f"{Q}.lora_B.weight": torch.ones(32, 5)}, r"A \[4, 32\] and B \[32, 5\] make no change"),
        ({f"{Q}.lora_A.weight": torch.ones(4)}, r"has A \[4\] and B \[32, 4\]; expected the rank 4"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(31)}, r"q_proj has the shape \[31\]; expected \[32\]"),
        ({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, r"q_proj\.lora_A\.weight holds infinities or NaN"),
        ({f"{Q}.bias": torch.ones(31)}, r"q_proj\.bias has the shape \[31\]; expected \[32\]"),
        (
            {f"base_model.model.text_model.head.{i}.weight": torch.ones(1) for i in range(9)},
            r"9 of its 14 tensors have no place: text_model\.head\.0\.weight, .*head\.7\.weight, …; .* Is it base\?",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: dict[str, torch.Tensor | None], message: str, adapter: Path, bases: dict[str, Path], tmp_path: Path
):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    state = {**load_file(other / "adapter_model.safetensors"), **change}
    save_file({n: t for n, t in state.items() if t is not None}, other / "adapter_model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=message):
        opened(bases["CLIP"], other)


def test_an_adapter_of_another_model_lists_its_tensors(bases: dict[str, Path], adapter: Path):
    with pytest.raises(
        UnknownCheckpoint, match=rf"5 of its 5 tensors have no place: {FIRST}\.weight, .*; the checkpoint's"
    ):
        opened(bases["OPT"], adapter)


def test_directories_that_peft_did_not_write(bases: dict[str, Path], adapter: Path, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=r"has no adapter_config\.json; expected a directory that peft wrote"):
        opened(bases["CLIP"], bases["OPT"])
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(UnknownCheckpoint, match=r"holds no weights; expected adapter_model\.safetensors or"):
        opened(bases["CLIP"], tmp_path)
