import onnx

from calmclip.export.nets import Tower
from calmclip.export.towers.attention import Softmax
from tests.towers import state_of, tower_of
from tests.traces import once


def test_equal_towers_are_traced_once_and_towers_that_differ_by_themselves():
    asked: list[Tower] = []

    def trace(tower: Tower) -> onnx.ModelProto:
        asked.append(tower)
        return onnx.ModelProto(producer_name=str(len(asked)))

    traced, state = once(trace), state_of("bert", "none")
    name = next(iter(state))
    towers = [
        tower_of("bert", state),
        tower_of("bert", state),
        tower_of("bert", state, Softmax(-0.05, 1.02)),
        tower_of("bert", state, Softmax(-0.05, 1.03)),
        tower_of("bert", {**state, name: state[name] + 1e-6}),
    ]
    assert [traced(tower).producer_name for tower in towers] == ["1", "1", "2", "3", "4"]
    traced(towers[0]).producer_name = "changed"
    assert traced(towers[0]).producer_name == "1"
