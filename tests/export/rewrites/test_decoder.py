"""Graphs of decoders: `rows` quantizes them, three rules put our ops in. The oracle is the graph before the rules, and
torch for the float graph."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch

from calmclip.export import parity, rewrites
from calmclip.export.graph import tap
from calmclip.export.nets import Tower
from calmclip.export.quantizers import Goal, rows, search
from calmclip.export.towers.attention import AttentionSpec, Softmax
from calmclip.export.towers.decoder import DecoderStyle, DecoderText, Layer, Rope
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.library import find

WIDTH, DIMS, WORDS, HIDDEN, BLOCKS = 64, 16, 99, 96, 2


def module(*, heads=4, kv_heads=2, norms=True, bias=False, post=False, window=None, seed=0, **style):
    """A decoder with random weights, folded."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(outputs, inputs):
        return torch.randn(outputs, inputs, generator=rng) * inputs**-0.5

    def weight(size):
        return 1 + 0.2 * torch.randn(size, generator=rng)

    state = {"tokens.weight": matrix(WORDS, WIDTH), "norm_post.weight": weight(WIDTH)}
    for i in range(BLOCKS):
        part = {
            "attn.qkv.weight": matrix((heads + 2 * kv_heads) * DIMS, WIDTH),
            "attn.out.weight": matrix(WIDTH, heads * DIMS), "mlp.up.weight": matrix(2 * HIDDEN, WIDTH),
            "mlp.down.weight": matrix(WIDTH, HIDDEN), "norm1.weight": weight(WIDTH), "norm2.weight": weight(WIDTH),
        }  # fmt: skip
        if norms:
            part |= {"attn.q_norm.weight": weight(DIMS), "attn.k_norm.weight": weight(DIMS)}
        if bias:
            part |= {"attn.qkv.bias": torch.randn((heads + 2 * kv_heads) * DIMS, generator=rng)}
        if post:
            part |= {"post1.weight": weight(WIDTH), "post2.weight": weight(WIDTH)}
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in part.items()}
    rope = Rope(tuple(10_000 ** (-2 * j / DIMS) for j in range(DIMS // 2)))
    settings = {"heads": heads, "kv_heads": kv_heads, "head_width": DIMS, "scale": DIMS**-0.5, **style}
    tower = DecoderText(state, DecoderStyle(layers=(Layer(rope, window),) * BLOCKS, **settings))
    tower.load_state_dict(state)
    tower.eval().fold()
    return tower


def tower(**settings) -> Tower:
    ids = Tensor(dtype="int64", shape=("B", "T"))
    return Tower(
        module(**settings), {"ids": ids, "mask": ids}, {"y": Tensor(dtype="float32", shape=("B", WIDTH))}, None, "rows"
    )


def feeds(count, seed=0, batch=3):
    """Texts padded on the right, on the left, and not."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = int(rng.integers(4, 20))
        mask = np.ones((batch, tokens), np.int64)
        mask[0, tokens // 2 :] = 0
        mask[1:2, : tokens // 3] = 0
        yield {"ids": rng.integers(0, WORDS, (batch, tokens)), "mask": mask}


KINDS = {
    "grouped, last token": {},
    "one head of keys, window, cap": {
        "kv_heads": 1, "norms": False, "bias": True, "window": 4, "cap": 5.0, "activation": "gelu_tanh", "post": True,
    },
    "a head for each, clipped": {
        "kv_heads": 4, "pool": "mean", "causal": False, "activation": "gelu",
        "attention": AttentionSpec(softmax=Softmax(gamma=-0.02, zeta=1.02)),
    },
}  # fmt: skip
DEFAULT = "grouped, last token"
RULES = ("quant_rows", "quant_rows_linear", "rotary_attention", "clipped_softmax")


@cache
def traced(name=DEFAULT) -> tuple[Tower, onnx.ModelProto]:
    part = tower(**KINDS[name])
    return part, to_onnx(part)


@cache
def in_int8() -> onnx.ModelProto:
    return rewrites.apply(rows.quantize(traced()[1], {}, rows.Params()), RULES).model


def with_outliers(model, times):
    """Two columns of what each norm answers are ``times`` larger, and the weights that read them smaller."""
    model = copied(model)
    held = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale(name, factor):
        values = onnx.numpy_helper.to_array(held[name]).copy()
        values[:2] *= np.float32(factor)
        held[name].CopyFrom(onnx.numpy_helper.from_array(values, name))

    normed = {
        node.output[0]: node.input[1] for node in model.graph.node
        if len(node.input) > 1 and node.input[1].endswith(("norm1.weight", "norm2.weight"))
    }  # fmt: skip
    for weight in normed.values():
        scale(weight, times)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[0] in normed:
            scale(node.input[1], 1 / times)
    return model


def copied(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize("name", [DEFAULT, *(pytest.param(n, marks=pytest.mark.slow) for n in KINDS if n != DEFAULT)])
def test_the_rules_keep_the_answers_of_a_decoder_in_float_and_in_int8(name):
    part, model = traced(name)
    quantized = rows.quantize(model, {}, rows.Params())
    given = [*feeds(3)]
    exact = parity.stored(parity.torch_run(part), given)
    products = 4 * BLOCKS + (KINDS[name].get("pool", "last") == "last")  # q and kv apart in the last block
    for graph, expected in ((model, {}), (quantized, {"QuantRowsLinear": products, "QuantRows": products})):
        done = rewrites.apply(graph, RULES)
        assert done.ops() == {**expected, "RotaryAttention": BLOCKS}, done.missed
        assert not any(done.missed.values())
        onnx.checker.check_model(done.model, full_check=True)
        before = parity.stored(parity.onnx_run(graph), given)
        for library in (None, find()):
            agreement = parity.compare(before, parity.onnx_run(done.model, library=library), given)["y"]
            assert agreement["cosine_min"] > 1 - 1e-5
            true = parity.compare(exact, parity.onnx_run(done.model, library=library), given)["y"]
            assert true["max_abs"] < 1e-5 if graph is model else true["cosine_min"] > 0.995


@pytest.mark.slow
def test_padding_and_other_rows_do_not_change_an_answer_in_int8():
    run = parity.onnx_run(in_int8(), library=find())
    ids = np.random.default_rng(1).integers(0, WORDS, (1, 7))
    alone = run({"ids": ids, "mask": np.ones_like(ids)})["y"]
    for left, right in ((0, 4), (4, 0)):
        wide = np.pad(ids, ((0, 1), (left, right)), mode="wrap")
        mask = np.pad(np.ones_like(ids), ((0, 1), (left, right)))
        mask[1] = 1
        assert np.abs(run({"ids": wide, "mask": mask})["y"][0] - alone[0]).max() < 5e-3  # a byte next to a tie


def test_columns_that_are_large_in_every_row_are_divided_first():
    """The search takes the plain form where it suffices, and the first alpha that reaches the goal otherwise."""
    goal = Goal(dims={"B": 1, "T": 77})
    for outliers, alpha in ((1.0, None), (100.0, 0.5)):
        model = with_outliers(traced()[1], outliers)
        settled = search.search(model, [*feeds(8, 1)], [*feeds(8, 2)], search.Params(), goal)
        assert settled.quantizer == "rows"
        assert settled.params == rows.Params(alpha=alpha)
        assert settled.history["reached"]
        assert bool(settled.ranges) == (alpha is not None)
        quantized = rows.quantize(model, settled.ranges, settled.params)
        done = rewrites.apply(quantized, RULES)
        assert done.ops() == {"QuantRows": 9, "QuantRowsLinear": 9, "RotaryAttention": BLOCKS}, done.missed
        given = [*feeds(3, 5)]
        for library in (None, find()):
            agreement = parity.compare(parity.onnx_run(model), parity.onnx_run(done.model, library=library), given)
            assert agreement["y"]["cosine_min"] > 0.99


def test_rows_are_steps_of_the_largest_number_of_each_row():
    model = traced()[1]
    quantized = rows.quantize(model, {}, rows.Params())
    (feed,) = feeds(1)
    source = next(node.input[0] for node in model.graph.node if node.op_type == "MatMul")
    values = tap(quantized, [source, f"{source}_scale", f"{source}_around"])(feed)
    x, scale, around = values[source], values[f"{source}_scale"], values[f"{source}_around"]
    assert np.allclose(scale, np.abs(x).max(-1, keepdims=True) / 127, rtol=1e-6)
    assert np.abs((around - 128) * scale - x).max() <= 0.51 * scale.max()
    assert {around.min(), around.max()} <= {*range(1, 256)}


def test_kept_products_stay_in_float_and_other_nodes_of_the_op_are_named():
    model = traced()[1]
    name = next(node.name for node in model.graph.node if node.op_type == "MatMul")
    kept = rows.quantize(model, {}, rows.Params(keep=(name,)))
    kinds = {node.name: node.op_type for node in kept.graph.node}
    assert kinds[name] == "MatMul"
    assert sum(kind == "MatMulInteger" for kind in kinds.values()) == 8


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda node: node.op_type == "Tanh" and setattr(node, "op_type", "Sinh"), None),
        (lambda node: node.op_type == "Softmax" and setattr(node.attribute[0], "i", 2), "not over the last axis"),
    ],
)
def test_attention_of_another_form_is_left_alone(change, why):
    model = copied(traced("one head of keys, window, cap")[1])
    for node in model.graph.node:
        change(node)
    done = rewrites.apply(model, ["rotary_attention"])
    assert done.counts == {"rotary_attention": 0}
    missed = [reason for reasons in done.missed.values() for reason in reasons.values()]
    assert missed == [] if why is None else all(why in reason for reason in missed) and len(missed) == BLOCKS


def test_a_norm_that_is_read_in_float_too_stays():
    """The last block picks one token of its norm."""
    nodes = [node for node in in_int8().graph.node if node.op_type == "QuantRows"]
    normalized = [next(a.i for a in node.attribute if a.name == "normalize") for node in nodes]
    assert sum(normalized) == 2 * BLOCKS - 1
