"""The changes that make graphs fast do not change answers. Oracles: torch's layers, float64; counts by hand."""

from functools import partial

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.coverage import count
from calmclip.export.nets import Tower
from calmclip.export.towers import Style
from calmclip.export.towers.image import AttentionPool, VisionTransformer
from calmclip.export.towers.text import TextTransformer, TokenAt
from calmclip.export.towers.transformer import Block, LastBlock, causal
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor as Spec
from tests import towers
from tests.towers import HEADS, HIDDEN, OUT, WIDTH, WORDS, drawn

TOKENS, LAYERS = 7, 3
EACH = WIDTH // HEADS
STYLE = Style(heads=HEADS)


def block(prefix: str = "", *, qk_norm: bool = False) -> dict[str, Tensor]:
    normed = {f"attn.{part}_norm.{p}": (EACH,) for part in "qk" for p in ("weight", "bias")}
    return {prefix + name: tensor for name, tensor in (towers.block() | drawn(normed if qk_norm else {})).items()}


def tower_state(first: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state = drawn(
        {**first, "norm_post.weight": (WIDTH,), "norm_post.bias": (WIDTH,), "projection.weight": (OUT, WIDTH)}
    )
    for i in range(LAYERS):
        state |= block(f"blocks.{i}.")
    return state


def filled(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    module.double().requires_grad_(False)
    module.fold()
    return module.eval()


def layer(state: dict[str, Tensor]) -> nn.Module:
    """torch's layer, with weights by its names."""
    theirs = {
        "self_attn.in_proj_weight": "attn.qkv.weight", "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.out.weight", "self_attn.out_proj.bias": "attn.out.bias",
        "linear1.weight": "mlp.up.weight", "linear1.bias": "mlp.up.bias",
        "linear2.weight": "mlp.down.weight", "linear2.bias": "mlp.down.bias",
        **{f"{norm}.{p}": f"{norm}.{p}" for norm in ("norm1", "norm2") for p in ("weight", "bias")},
    }  # fmt: skip
    made = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, F.gelu, batch_first=True, norm_first=True)
    made.load_state_dict({name: state[ours] for name, ours in theirs.items()})
    return made.double().train()  # its fast path of evaluation is another sum


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("masked", [False, True])
def test_one_product_for_q_k_and_v_with_the_scale_in_its_weights_is_torchs_layer(masked: bool):
    state, x = block(), torch.randn(2, TOKENS, WIDTH).double()
    mask = causal(TOKENS).double() if masked else None
    want = layer(state)(x, src_mask=None if mask is None else mask[0, 0])
    assert torch.allclose(filled(Block(state, STYLE, WIDTH), state)(x, mask), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_block_for_one_token_is_the_whole_block_and_then_that_token(qk_norm: bool, masked: bool):
    state, x = block(qk_norm=qk_norm), torch.randn(3, TOKENS, WIDTH).double()
    mask = causal(TOKENS).double() if masked else None
    whole = filled(Block(state, STYLE, WIDTH), state)(x, mask)
    last = filled(LastBlock(state, STYLE, WIDTH), state)
    at = torch.tensor([0, 3, TOKENS - 1])
    row = None if mask is None else mask[0, 0][at][:, None, None]
    answers = last(x, row, TokenAt(at))
    assert torch.allclose(answers[:, 0], whole[torch.arange(3), at], atol=1e-12, rtol=0)


def test_norms_of_q_and_k_come_before_the_scale():
    state, x = block(qk_norm=True), torch.randn(2, TOKENS, WIDTH).double()
    plain = {name: tensor.double() for name, tensor in state.items()}
    answers = filled(Block(state, STYLE, WIDTH), state)(x)
    normed = F.layer_norm(x, (WIDTH,), plain["norm1.weight"], plain["norm1.bias"], STYLE.eps)
    q, k, v = F.linear(normed, plain["attn.qkv.weight"], plain["attn.qkv.bias"]).unflatten(-1, (3, HEADS, -1)).unbind(2)
    q, k = (
        F.layer_norm(rows, (EACH,), plain[f"attn.{n}_norm.weight"], plain[f"attn.{n}_norm.bias"], STYLE.qk_eps)
        for n, rows in (("q", q), ("k", k))
    )
    mixed = F.scaled_dot_product_attention(*(rows.transpose(1, 2) for rows in (q, k, v))).transpose(1, 2).flatten(2)
    y = x + F.linear(mixed, plain["attn.out.weight"], plain["attn.out.bias"])
    normed = F.layer_norm(y, (WIDTH,), plain["norm2.weight"], plain["norm2.bias"], STYLE.eps)
    hidden = F.gelu(F.linear(normed, plain["mlp.up.weight"], plain["mlp.up.bias"]))
    assert torch.allclose(answers, y + F.linear(hidden, plain["mlp.down.weight"], plain["mlp.down.bias"]), atol=1e-12)


def test_a_learned_query_worked_out_once_is_torchs_attention():
    state = {name.removeprefix("attn."): tensor for name, tensor in block().items() if not name.startswith("norm")}
    state |= drawn({"probe": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)})
    x = torch.randn(3, TOKENS, WIDTH).double()
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": state["qkv.weight"], "in_proj_bias": state["qkv.bias"],
            "out_proj.weight": state["out.weight"], "out_proj.bias": state["out.bias"],
        }
    )  # fmt: skip
    probe = state["probe"].double().expand(3, 1, WIDTH)
    y = attention.double()(probe, x, x, need_weights=False)[0]
    plain = {name: tensor.double() for name, tensor in state.items()}
    normed = F.layer_norm(y, (WIDTH,), plain["norm.weight"], plain["norm.bias"], STYLE.eps)
    hidden = F.gelu(F.linear(normed, plain["mlp.up.weight"], plain["mlp.up.bias"]))
    want = (y + F.linear(hidden, plain["mlp.down.weight"], plain["mlp.down.bias"]))[:, 0]
    assert torch.allclose(filled(AttentionPool(state, STYLE, WIDTH), state)(x), want, atol=1e-12, rtol=0)


TEXT = {"tokens.weight": (WORDS, WIDTH), "positions": (77, WIDTH)}


def test_a_causal_text_cut_behind_its_end_is_the_text_at_full_length():
    state = tower_state(TEXT)
    tower = filled(TextTransformer(state, Style(heads=HEADS, pool="eot", end=WORDS - 1, causal=True)), state)
    whole = torch.randint(WORDS - 1, (4, 77))
    for row, end in enumerate((3, 5, 9, 11)):
        whole[row, end] = WORDS - 1
    assert torch.allclose(tower(whole[:, :12]), tower(whole), atol=1e-13, rtol=0)
    # without its mask a tower would look behind the end
    open_ = filled(TextTransformer(state, Style(heads=HEADS, pool="eot", end=WORDS - 1)), state)
    assert (open_(whole[:, :12]) - open_(whole)).abs().max() > 1e-3


def graph(tower: nn.Module, kind: str) -> onnx.ModelProto:
    inputs = {
        "text": {"ids": Spec(dtype="int64", shape=("B", "T"))},
        "image": {"pixels": Spec(dtype="float32", shape=("B", 3, 16, 16))},
    }[kind]
    outputs = {f"{kind}_embeds": Spec(dtype="float32", shape=("B", OUT))}
    return to_onnx(Tower(tower.float(), inputs, outputs, None, quantizer="none"))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_graph_has_one_product_for_q_k_and_v_and_a_last_block_for_one_token(kind: str):
    """A block of T tokens: 3 W^2 for q, k and v, W^2, 2 W H, each T times, and 2 T^2 W of attention. The last: k and v
    of all tokens, everything else of one. Nothing is left that constants alone decide."""
    if kind == "text":
        state, tokens, first = tower_state(TEXT), 8, 0
        make = partial(TextTransformer, style=Style(heads=HEADS, pool="eot", end=WORDS - 1, causal=True))
    else:
        state = tower_state({"patch.weight": (WIDTH, 3, 8, 8), "cls": (WIDTH,), "positions": (5, WIDTH)})
        make, tokens, first = partial(VisionTransformer, style=STYLE), 5, 4 * 3 * 64 * WIDTH
    model = graph(filled(make(state), state), kind)
    block_ = tokens * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 2 * tokens**2 * WIDTH
    last = tokens * 2 * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * HIDDEN + 2 * tokens * WIDTH
    macs = [product.macs for product in count(model, {"T": tokens})]
    assert sum(macs) == first + (LAYERS - 1) * block_ + last + WIDTH * OUT
    assert len(macs) == bool(first) + (LAYERS - 1) * 6 + 7 + 1
    fixed = {constant.name for constant in model.graph.initializer}
    idle = [n.op_type for n in model.graph.node if n.input and {*n.input} - {""} <= fixed]
    assert not idle
