"""Flipped bits, and the numbers of a graph that they hit. The oracles are numpy's views, popcounts, and two's
complement and IEEE 754 by hand."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calmclip.export.resilience.bounds import insert, stored
from calmclip.export.resilience.faults import KINDS, Faults, Store, Tensor, draw, flipped, kinds, number
from calmclip.export.resilience.forms import FORMS, Bound
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.errors import BadRequest, BundleInvalid, TaskNotServed
from calmclip.models.ops.spec import DOMAIN
from tests.export.graphs import parse


def bit_of(data, bit, place=0):
    return flipped(np.asarray(data), np.array([place]), np.array([bit]))


def popcount(before, after):
    return sum(
        int(byte).bit_count()
        for byte in np.bitwise_xor(*(np.frombuffer(a.tobytes(), np.uint8) for a in (before, after)))
    )


def test_one_bit_does_what_the_number_format_says():
    every = np.arange(-128, 128, dtype=np.int8)
    for place, q in enumerate(every.tolist()):
        after = int(bit_of(every, 7, place)[place])
        assert after - q == (128 if q < 0 else -128)
    assert bit_of(np.float32(1.5), 31) == -1.5
    assert bit_of(np.float32(1), 23) == 0.5  # exponent 127 -> 126
    assert bit_of(np.float32(1), 30) == np.inf
    assert np.isnan(bit_of(np.float32(1.5), 30))
    assert bit_of(np.float32(1), 0) == np.nextafter(np.float32(1), np.float32(2))
    assert bit_of(np.int32(5), 31) == 5 - 2**31
    assert bit_of(np.uint8(200), 7) == 72
    assert bit_of(np.arange(6, dtype=np.int32).reshape(2, 3), 8, 4).tolist() == [[0, 1, 2], [3, 260, 5]]


def tensors(*shapes):
    rng = np.random.default_rng(3)
    drawn = [rng.integers(0, 100, shape).astype(dtype) for dtype, shape in shapes]
    return [Tensor("weight", data, (("image", f"w{i}"),)) for i, data in enumerate(drawn)]


MIXED = (("int8", (3, 5)), ("float32", ()), ("int32", (4,)), ("uint8", (1,)), ("float32", (2, 2)))


def test_as_many_bits_change_as_faults_were_drawn_and_twice_restores_all():
    group = tensors(*MIXED)
    bits = 8 * 15 + 32 + 32 * 4 + 8 + 32 * 4
    for count in (0, 1, 7, 200, bits):
        faults = draw(group, count, np.random.default_rng(count))
        assert len({*zip(faults.tensor, faults.place, faults.bit, strict=True)}) == len(faults) == count
        sizes = np.array([tensor.data.size for tensor in group])[faults.tensor]
        assert ((faults.place >= 0) & (faults.place < sizes)).all()
        changed = 0
        for index, tensor in enumerate(group):
            hit = faults.tensor == index
            after = flipped(tensor.data, faults.place[hit], faults.bit[hit])
            changed += popcount(tensor.data, after)
            assert flipped(after, faults.place[hit], faults.bit[hit]).tobytes() == tensor.data.tobytes()
        assert changed == count
    with pytest.raises(BadRequest, match=f"{bits + 1} faults were asked for; the chosen tensors have {bits} bits"):
        draw(group, bits + 1, np.random.default_rng(0))


def test_every_bit_is_equally_likely_and_the_seed_decides():
    group = tensors(*MIXED)
    bits = 416
    hits = np.zeros((5, 15, 32), int)
    for seed in range(2000):
        faults = draw(group, 40, np.random.default_rng(seed))
        np.add.at(hits, (faults.tensor, faults.place, faults.bit), 1)
    expected = 2000 * 40 / bits
    assert np.count_nonzero(hits) == bits
    assert np.abs(hits[hits > 0] - expected).max() < 5 * np.sqrt(expected)
    again, other = (draw(group, 40, np.random.default_rng(seed)) for seed in (1999, 7))
    assert (again.place == faults.place).all()
    assert not (other.place == faults.place).all()


def test_only_the_allowed_bits_flip():
    group = tensors(*MIXED)
    faults = draw(group, 10, np.random.default_rng(0), {0: (7,), 4: (30, 31)})
    assert {*zip(faults.tensor.tolist(), faults.bit.tolist(), strict=True)} <= {(0, 7), (4, 30), (4, 31)}
    every = draw(group, 15 + 8, np.random.default_rng(0), {0: (7,), 4: (30, 31)})
    assert len(every) == 23
    assert every.of([4]).bit.tolist() == [30, 31] * 4


def test_the_number_of_faults_follows_the_rate():
    rng = np.random.default_rng(0)
    assert [number(226_846_208, rate, "exact", rng) for rate in (0, 1e-9, 1e-7, 3e-7)] == [0, 0, 22, 68]
    assert number(10_000_000, 3e-7, "exact", rng) == 3  # 2.9999999999999996 in floats
    drawn = [number(1000, 1e-3, "binomial", rng) for _ in range(4000)]
    assert abs(np.mean(drawn) - 1) < 5 / np.sqrt(4000)


def test_pairs_of_quantizers_name_the_kinds():
    model = parse(
        """g (float[B, 3, 8, 8] x) => (float[B, 4] y) {
            q = QuantizeLinear (x, x_s, x_z)
            d = DequantizeLinear (q, x_s, x_z)
            steps = Clip (w_s, low, high)
            wf = DequantizeLinear <axis = 0> (w, steps, w_z)
            bf = DequantizeLinear (b, b_s)
            c = Conv (d, wf, bf)
            r = Clip (c, low, high)
            m = ReduceMean <keepdims = 0> (r, area)
            g = Mul (m, gain)
            n = LayerNormalization (g, nw, nb)
            h = Mul (n, half)
            p = Add (h, shift)
            nan = IsNaN (gw)
            numbers = Where (nan, half, gw)
            z = Gemm (p, numbers, gb)
            inside = Less (z, high)
            kept = Where (inside, z, fill)
            y = Add (kept, shift)
        }""",
        {"fill": (4,), "gain": (4,), "nw": (4,), "nb": (4,), "shift": (4,), "gw": (4, 4), "gb": (4,), "w_s": (4,)},
        x_s=np.float32(1), x_z=np.uint8(0), w=np.ones((4, 3, 8, 8), np.int8), w_z=np.zeros(4, np.int8),
        b=np.ones(4, np.int32), b_s=np.float32(1), low=np.float32(0), high=np.float32(6), area=np.array([2, 3]),
        half=np.float32(0.5),
    )  # fmt: skip
    of = {"scale": {"x_s", "w_s", "b_s"}, "zero": {"x_z", "w_z"}, "weight": {"w", "gain", "nw", "gw"},
          "bias": {"b", "nb", "shift", "gb"}}  # fmt: skip
    assert kinds(model) == {name: kind for kind, names in of.items() for name in names}


def test_tables_of_integers_have_scales():
    """As `packing.pack` and ONNX Runtime's dynamic quantization write them."""
    model = parse(
        """g (int64[T] ids, float[T, T] p) => (float[T, 4] y) {
            rows = Gather (table, ids)
            steps = Gather (table_s, ids)
            whole = Cast <to = 1> (rows)
            words = Mul (whole, steps)
            some = Slice (places, zero, one)
            sum = Add (words, some)
            mixed = Cast <to = 1> (mixer)
            out = MatMul (p, mixed)
            scaled = Mul (out, mixer_s)
            q, q_s, q_z = DynamicQuantizeLinear (sum)
            ints = MatMulInteger (q, w, q_z, w_z)
            floats = Cast <to = 1> (ints)
            both = Mul (q_s, w_s)
            real = Mul (floats, both)
            y = Add (scaled, real)
        }""",
        {"table_s": (9, 1), "places": (5, 4), "mixer_s": (1, 4), "w_s": (4,)},
        table=np.ones((9, 4), np.int8), zero=np.array([0]), one=np.array([1]), mixer=np.ones((4, 4), np.int8),
        w=np.ones((4, 4), np.int8), w_z=np.zeros(4, np.int8),
    )  # fmt: skip
    of = {"weight": {"table", "places", "mixer", "w"}, "scale": {"table_s", "mixer_s", "w_s"}, "zero": {"w_z"}}
    assert kinds(model) == {name: kind for kind, names in of.items() for name in names}


def test_our_operators_name_the_kinds_of_their_inputs():
    x = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["B", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B", 4])
    names = ["x", "x_s", "x_z", "turned", "w_s", "b", "none"]
    nodes = [
        helper.make_node("Reshape", ["w", "shape"], ["turned"]),
        helper.make_node("QuantLinearToFloat", names, ["y"], domain=DOMAIN),
    ]
    arrays = {
        "x_s": np.float32(1), "x_z": np.uint8(3), "w": np.ones((2, 8), np.int8), "shape": np.array([4, 4]),
        "w_s": np.ones(4, np.float32), "b": np.ones(4, np.float32), "none": np.zeros(1, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, name) for name, a in arrays.items()])
    named = kinds(helper.make_model(graph))
    assert named == {"x_s": "scale", "x_z": "zero", "w": "weight", "w_s": "scale", "b": "bias"}


@pytest.mark.parametrize("form", [*FORMS, "stored"])
def test_bounds_change_no_kind(form: str):
    """Else a bundle with bounds would have other faults. One bound for each neuron: constants of several numbers."""
    model = parse(
        "g (float[B, 4] x) => (float[B, 4] y) { h = Gemm (x, w, b)  r = Relu (h)  y = Gemm (r, v, c) }",
        {"w": (4, 4), "b": (4,), "v": (4, 4), "c": (4,)},
    )
    before = kinds(model)
    assert before == {"w": "weight", "b": "bias", "v": "weight", "c": "bias"}
    bounds = {"r": Bound(np.zeros(4, np.float32), np.ones(4, np.float32))}
    assert kinds(stored(model)[0] if form == "stored" else insert(model, bounds, {"r": form})) == before


def test_without_faults_the_store_holds_the_bytes_of_the_files(bundle: Bundle):
    store = Store(bundle, ["image", "text"])
    assert [(tensor.name, tensor.kind, tensor.holders) for tensor in store.tensors] == [
        ("image/matrix", "weight", (("image", "matrix"), ("text", "matrix"))),
        ("text/words", "weight", (("text", "words"),)),
    ]
    assert store.bits == 32 * (9 + 15)
    for role in ("image", "text"):
        model = onnx.load(bundle.directory / f"{role}.onnx")
        memory = store.memory(role, store.changed(draw(store.tensors, 0, np.random.default_rng(0))).get(role, {}))
        for tensor in model.graph.initializer:
            if tensor.name in memory.tensors:
                assert memory.tensors[tensor.name].tobytes() == tensor.raw_data
        assert {*memory.tensors} == {"image": {"matrix"}, "text": {"matrix", "words"}}[role]


def test_a_fault_in_a_shared_file_reaches_every_graph_of_it(bundle: Bundle):
    both = Store(bundle, ["image", "text"])
    assert both.shared() == {}
    first = Faults(np.array([0]), np.array([4]), np.array([31]))
    changed = both.changed(first)
    assert {role: {*names} for role, names in changed.items()} == {"image": {"matrix"}, "text": {"matrix"}}
    assert changed["image"]["matrix"][1, 1] == changed["text"]["matrix"][1, 1] == -1
    alone = Store(bundle, ["image"])
    assert {*alone.changed(first)} == {"image"}
    assert alone.shared() == {"text": ["matrix"]}


def test_the_file_is_the_same_after_two_flips(bundle: Bundle):
    """A copy of the graph's file on disk, changed in place."""
    store = Store(bundle, ["text"], ["weight"])
    path = bundle.directory / "text.onnx"
    before = path.read_bytes()
    faults = draw(store.tensors, 17, np.random.default_rng(1))

    def flip(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        for index, tensor in enumerate(store.tensors):
            hit = faults.tensor == index
            of = next(t for t in model.graph.initializer if t.name == tensor.holders[0][1])
            if of.HasField("raw_data"):
                data = np.frombuffer(of.raw_data, tensor.data.dtype)
                of.raw_data = flipped(data, faults.place[hit], faults.bit[hit]).tobytes()
        return model.SerializeToString()

    once = flip(before)
    assert hashlib.sha256(once).digest() != hashlib.sha256(before).digest()
    assert flip(once) == before == path.read_bytes()


def test_what_a_store_cannot_be_made_of_is_said(bundle: Bundle, colours):
    with pytest.raises(TaskNotServed, match="has no graph 'dense'"):
        Store(bundle, ["dense"])
    with pytest.raises(BadRequest, match="graphs image of colours store no scale or zero; they store weight"):
        Store(bundle, ["image"], ["scale", "zero"])

    def outside(graphs):
        graphs["image"].graph.initializer[-1].external_data[0].value = "../secret"

    with pytest.raises(BundleInvalid, match=r"matrix lies in '\.\./secret', which bundle.json does not list"):
        Store(Bundle(read(Path(colours("outside", outside)))), ["image"], KINDS)
