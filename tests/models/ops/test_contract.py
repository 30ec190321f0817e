"""The promises of every operator: constants, threads, in-place outputs, shapes, types, empty tensors, errors.

The results of an operator are tested in its own file, which also holds its `Contract`.

The oracle is the same node run in another way, and the operator's reference for large inputs.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from calmclip.models.ops.table import TABLE
from tests.models.ops.harness import Contract, gather, load, model, near, node, run, session

CONTRACT = {contract.op.name: contract for contract in gather("CONTRACTS")}
ROWS = {row.op.name: row for row in TABLE}


def each(field: str):
    """Parametrize over the contracts that state ``field``."""
    return pytest.mark.parametrize("contract", [c for c in CONTRACT.values() if getattr(c, field)], ids=label)


def each_place(places: Callable[[Contract], Iterable[str]]):
    """Parametrize over the contracts, and over the inputs of each."""
    pairs = [(contract, place) for contract in CONTRACT.values() for place in places(contract)]
    return pytest.mark.parametrize(("contract", "place"), pairs, ids=label)


def label(value: Any) -> str | None:
    return value.op.name if isinstance(value, Contract) else None


def test_every_operator_of_the_table_has_a_contract():
    assert set(CONTRACT) == set(ROWS)


@pytest.mark.parametrize("columns", [False, True])
@each("op")
def test_constants_give_the_same_answer_as_fed_inputs(library, contract: Contract, columns):
    """With all other inputs constant, and with all but one; also in a second run. Other inputs give other answers."""
    op, attributes, later = contract.op, contract.attributes, list(contract.op.inputs)[1:]
    feeds = contract.draw(1, columns)
    fed = session(op, feeds, attributes, library=library)
    for inputs in (feeds, contract.draw(3, columns), feeds):
        expected = fed.run(None, inputs)
        for free in (None, *later):
            constants = [name for name in later if name != free]
            loaded = session(op, inputs, attributes, library=library, constants=constants)
            for _ in range(2):
                answer = loaded.run(None, {name: array for name, array in inputs.items() if name not in constants})
                for y, wanted in zip(answer, expected, strict=True):
                    np.testing.assert_array_equal(y, wanted, strict=True)


@each("large")
def test_threads_share_large_inputs(library, contract: Contract):
    """ONNX Runtime's threads, and threads that use one session at the same time."""
    op, (feeds, attributes) = contract.op, contract.large
    constants = list(op.inputs)[1:]
    fed = {name: array for name, array in feeds.items() if name not in constants}
    alone, two, three = (
        session(op, feeds, attributes, library=library, constants=constants, threads=threads) for threads in (1, 2, 3)
    )
    answer, expected = alone.run(None, fed), ROWS[op.name].oracle(**feeds, **attributes)
    for y, wanted in zip(answer, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert near(y, wanted) if y.dtype == np.uint8 else np.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    gate = threading.Barrier(4)

    def work(_):
        gate.wait()
        return [alone.run(None, fed) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        concurrent = [run for runs in pool.map(work, range(4)) for run in runs]
    for other in (two.run(None, fed), three.run(None, fed), *concurrent):
        assert all(np.array_equal(y, wanted) for y, wanted in zip(other, answer, strict=True))


@each_place(lambda contract: contract.in_place)
def test_an_output_may_take_the_memory_of_an_input(library, contract: Contract, place):
    """Between nodes; one of the values has a second reader, so its memory must stay."""
    op, (feeds, attributes) = contract.op, contract.large
    x, others = feeds[place], {name: array for name, array in feeds.items() if name != place}
    back, join = (np.negative, np.add) if x.dtype == np.float32 else (np.invert, np.bitwise_xor)
    unary, binary = ("Neg", "Add") if x.dtype == np.float32 else ("BitwiseNot", "BitwiseXor")
    attributes = op.attributes | attributes

    def inputs(value: str) -> list[str]:
        return [value if name == place else name for name in op.inputs]

    def answer(array: np.ndarray) -> np.ndarray:
        return run(op, feeds | {place: array}, attributes, library=library)[0]

    nodes = [
        helper.make_node(unary, [place], ["p"]),
        node(op, inputs("p"), ["q"], **attributes),
        helper.make_node(unary, ["q"], ["r"]),
        node(op, inputs("r"), ["s"], **attributes),
        helper.make_node(binary, ["r", "s"], ["t"]),
    ]
    proto = model(nodes, {place: (x.dtype, x.shape)}, {"t": (x.dtype, x.shape)}, others)
    (t,) = load(proto, library, threads=2).run(None, {place: x})
    r = back(answer(back(x)))
    np.testing.assert_array_equal(t, join(r, answer(r)), strict=True)


@each("any_side")
def test_an_unnamed_side_fits_any_other(library, contract: Contract):
    """x gets its shape at run time. The tensor that is added to the answer has known sides, which -1 would not fit."""
    op, feeds, places = contract.op, contract.draw(0, False), contract.any_side
    attributes = op.attributes | contract.attributes
    (y,) = run(op, feeds, attributes, library=library)[:1]
    x, kind = feeds[places[0]], TensorProto.FLOAT if feeds[places[0]].dtype == np.float32 else TensorProto.UINT8
    nodes = [
        helper.make_node("Reshape", ["flat", "shape"], ["long"]),
        *(helper.make_node("Cast", ["long"], [place], to=kind) for place in places),
        node(op, op.inputs, ["y", *[""] * (len(op.outputs) - 1)], **attributes),
        helper.make_node("Cast", ["y"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "known"], ["z"]),
    ]
    known = np.random.default_rng(0).normal(size=y.shape).astype(np.float32)
    inputs = {"flat": (x.dtype, [x.size]), "shape": (np.int64, [x.ndim]), "known": (np.float32, y.shape)}
    constants = {name: array for name, array in feeds.items() if name not in places}
    proto = model(nodes, inputs, {"z": (np.float32, None), "y": (y.dtype, None)}, constants)
    z, same = load(proto, library).run(None, {"flat": x.ravel(), "shape": np.array(x.shape), "known": known})
    assert same.shape == y.shape
    assert (z == same.astype(np.float32) + known).all()


@each("empty")
def test_an_empty_input_gives_an_empty_output(library, contract: Contract):
    for feeds, attributes, shape in contract.empty:
        for ops in (library, None) if contract.empty_by_function else (library,):
            for y in run(contract.op, feeds, attributes, library=ops):
                assert y.shape == shape


@each_place(lambda contract: contract.op.inputs)
def test_another_type_is_refused(library, contract: Contract, place):
    feeds = contract.draw(0, False)
    with pytest.raises(Exception, match=r"tensor\(int32\)"):
        session(contract.op, feeds | {place: feeds[place].astype(np.int32)}, contract.attributes, library=library)


@each_place(lambda contract: [name for name in contract.op.inputs if name.endswith("_scale")])
def test_a_scale_is_positive_and_normal(library, contract: Contract, place):
    """A refused run does not harm the session."""
    op, feeds, attributes = contract.op, contract.draw(0, True), contract.attributes
    fed = session(op, feeds, attributes, library=library)
    for value in (0, -1, np.nan, np.inf, 1e-39):
        wrong = feeds | {place: feeds[place].copy()}
        wrong[place].flat[-1] = value
        if (place, value) == ("p_scale", 0):  # 0 has a meaning: normalize by the row maximum
            continue
        message = rf"{op.name}: {place}(\[\d+\])? is .*; expected a positive, normal number"
        with pytest.raises(Exception, match=message) as refused:
            fed.run(None, wrong)
        assert type(refused.value).__name__ == "InvalidArgument"
        with pytest.raises(Exception, match=message):
            run(op, wrong, attributes, library=library, constants=list(op.inputs)[1:])
    fed.run(None, feeds)


@pytest.mark.parametrize(
    ("contract", "change", "message"),
    [(contract, *row) for contract in CONTRACT.values() for row in contract.refused],
    ids=label,
)
def test_an_input_that_does_not_fit_is_refused_by_name(library, contract: Contract, change, message):
    """Attributes when the model is loaded, fed inputs when it runs, constants at either time."""
    op, feeds, attributes = contract.op, contract.draw(0, False), contract.attributes
    for place, new in change.items():
        if place not in op.inputs:
            attributes = attributes | {place: new}
        elif isinstance(new, list):
            feeds = feeds | {place: np.ones(new, feeds[place].dtype)}
        else:
            feeds = feeds | {place: np.asarray(new, feeds[place].dtype)}
    with pytest.raises(Exception, match=f"{op.name}: .*{message}") as refused:
        run(op, feeds, attributes, library=library)
    if change.keys() & op.inputs.keys():
        assert type(refused.value).__name__ == "InvalidArgument"
    with pytest.raises(Exception, match=f"{op.name}: .*{message}"):
        run(op, feeds, attributes, library=library, constants=list(op.inputs)[1:])
