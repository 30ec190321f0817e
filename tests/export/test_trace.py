import numpy as np
import onnx
import pytest
import torch

from calmclip.export.graph import fingerprint, module_of
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.errors import ExportError


class Net(torch.nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, width)
        self.last = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.gelu(self.first(x)) * 2)


def tower(module: torch.nn.Module, **outputs: Tensor) -> Tower:
    y = outputs or {"y": Tensor(dtype="float32", shape=("B", 3))}
    return Tower(module, {"x": Tensor(dtype="float32", shape=("B", 4))}, y, None, quantizer="none")


def test_the_graph_computes_what_torch_computes_at_any_batch():
    net = Net()
    model = to_onnx(tower(net))
    onnx.checker.check_model(model, full_check=True)
    run = onnx_run(model)
    for rows in (1, 2, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        assert run({"x": x})["y"] == pytest.approx(net(torch.from_numpy(x)).detach().numpy(), abs=1e-6)


def test_names_depend_on_structure_alone():
    first, second = to_onnx(tower(Net())), to_onnx(tower(Net()))
    assert [n.output[0] for n in first.graph.node] == [n.output[0] for n in second.graph.node]
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(to_onnx(tower(Net(width=7))))


def test_parameters_have_torchs_names_and_values_those_of_their_operator():
    graph = to_onnx(tower(Net())).graph
    assert {"first.weight", "last.bias"} <= {i.name for i in graph.initializer}
    inner = [name for node in graph.node for name in node.output if name != "y"]
    assert inner
    assert all(name.rsplit("_", 1)[0] in {node.op_type for node in graph.node} for name in inner)


def test_a_node_knows_its_module():
    nodes = to_onnx(tower(torch.nn.Sequential(Net(), torch.nn.LayerNorm(3)))).graph.node
    expected = [("Gemm", "0.first"), ("Gelu", "0"), ("Mul", "0"), ("Gemm", "0.last"), ("LayerNormalization", "1")]
    assert [(node.op_type, module_of(node)) for node in nodes] == expected


def test_the_file_contains_no_path_of_this_machine():
    data = to_onnx(tower(Net())).SerializeToString()
    for trace in (b".py", b"site-packages", b"pkg.torch", b"/home", b"/usr", b"File "):
        assert trace not in data


def test_outputs_that_differ_from_the_tower_are_refused():
    class Two(Net):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    with pytest.raises(Exception, match="y"):
        to_onnx(tower(Two()))


def test_control_flow_is_refused_by_name():
    model = to_onnx(tower(Net()))
    from calmclip.export.trace import _rename

    branch = onnx.helper.make_graph([], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))
    with pytest.raises(ExportError, match="control flow"):
        _rename(model, keep=set())
