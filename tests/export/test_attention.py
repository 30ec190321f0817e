"""Every softmax with every gate, on a tiny random net of each kind: from a checkpoint in the public names to INT8.

The oracle is `tests.quantizable`: the modules of transformers with the paper's definitions in their attention.
"""

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from calmclip.export import parity, rewrites
from calmclip.export.graph import module_of
from calmclip.export.nets import NETS, Net
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.quantizers.sites import find_sites
from calmclip.export.trace import to_onnx
from calmclip.models.flow import Arrays
from calmclip.models.ops.spec import DOMAIN, SOFTMAX
from tests import quantizable
from tests.quantizable import GATES, SOFTMAXES

SCALE = 2.5
END = 599
CALMER = 0.5  # of CLIP's matrices, which `tiny.spread` made large: 8 bits of them cost over .001, however it attends
CLASSES = {
    "bert": transformers.BertForMaskedLM, "opt": transformers.OPTForCausalLM,
    "vit": transformers.ViTForImageClassification, "clip": transformers.CLIPModel,
}  # fmt: skip
ALL = list(product(CLASSES, SOFTMAXES, GATES))
VANILLA, CLIPPED = SOFTMAXES
SAMPLE = [("bert", CLIPPED, "mlp_mean")]  # of ALL; the other cases are slow tests


@pytest.fixture(scope="module")
def checkpoints(tiny_bert, tiny_opt, tiny_vit, tiny_hf_clip) -> dict[str, Path]:
    return {"bert": tiny_bert, "opt": tiny_opt, "vit": tiny_vit, "clip": tiny_hf_clip}


@pytest.fixture
def made(checkpoints, tmp_path):
    """(kind, softmax, gate) -> the reference and the net that is read from what it writes."""

    def of(kind: str, softmax: str, gate: str) -> tuple[torch.nn.Module, Net]:
        torch.manual_seed(1)
        model = CLASSES[kind].from_pretrained(checkpoints[kind])
        model = quantizable.change(model, softmax, gate, SCALE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if kind == "clip" and parameter.ndim > 1 and "alpha" not in name:
                    parameter.mul_(CALMER)
        directory = shutil.copytree(checkpoints[kind], tmp_path / "changed")
        return model, NETS.get(kind).load(str(quantizable.save(model, directory, softmax, SCALE, gate)))

    return of


def feeds(net: Net, count: int = 1) -> dict[str, list[Arrays]]:
    """By role: random tokens, some of them masked, or pixels."""
    random = np.random.default_rng(3)
    by_role: dict[str, list[Arrays]] = {}
    for role, tower in net.towers.items():
        for _ in range(count):
            ids = random.integers(0, 590, (3, 12))
            ids[:, -1] = END
            if net.name == "clip":  # padding follows the end
                ids[2, 5:] = [END, *range(6)]
            mask = np.arange(12)[None] < np.array([12, 7, 3])[:, None]
            patches = random.standard_normal((3, 3, 4, 4)).repeat(8, 2).repeat(8, 3) * 1.5  # of a colour each
            pixels = patches + random.standard_normal((3, 3, 32, 32)) * 0.5
            given = {"ids": ids, "mask": mask.astype(np.int64), "pixels": pixels.astype(np.float32)}
            by_role.setdefault(role, []).append({name: given[name] for name in tower.inputs})
    return by_role


@torch.no_grad()
def reference(model: torch.nn.Module, role: str, given: Arrays, plain: bool = False) -> np.ndarray:
    """``plain``: the same weights without clipping and gate."""
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    padded = tensors.get("mask")
    if role == "text":
        padded = torch.arange(12) <= (tensors["ids"] == END).int().argmax(-1, keepdim=True)
    tokens = 17 if role in ("image", "logits") else 12
    quantizable.set_lengths(model, [tokens] * 3 if padded is None else padded.sum(-1).tolist())
    with quantizable.defined(plain):
        match role:
            case "mlm":
                return model(tensors["ids"], attention_mask=tensors["mask"]).logits.numpy()
            case "lm":
                return model(tensors["ids"]).logits.numpy()
            case "logits":
                return model(tensors["pixels"]).logits.numpy()
            case "text":
                answers = model.get_text_features(tensors["ids"])
            case "image":
                answers = model.get_image_features(tensors["pixels"])
    return torch.nn.functional.normalize(getattr(answers, "pooler_output", answers), dim=-1).numpy()


def seen(role: str, given: Arrays, answers: np.ndarray) -> np.ndarray:
    """The answer without the positions of padding, which have no meaning."""
    return answers[given["mask"].astype(bool)] if "mask" in given else answers


def compared(model: torch.nn.Module, net: Net, given: dict[str, list[Arrays]]) -> Iterator[tuple[str, np.ndarray]]:
    """Role -> the reference's answer to the first feed."""
    for role in net.towers:
        yield role, seen(role, given[role][0], reference(model, role, given[role][0]))


@pytest.mark.parametrize(("kind", "softmax", "gate"), ALL)
def test_towers_answer_as_the_paper_defines_them(kind: str, softmax: str, gate: str, made):
    model, net = made(kind, softmax, gate)
    given = feeds(net)
    for role, want in compared(model, net, given):
        (answers,) = parity.torch_run(net.towers[role])(given[role][0]).values()
        assert seen(role, given[role][0], answers) == pytest.approx(want, abs=1e-5)
        plain = seen(role, given[role][0], reference(model, role, given[role][0], plain=True))
        assert (np.abs(plain - want).max() > 1e-3) == ((softmax, gate) != (VANILLA, "none"))


def parameters() -> list[object]:
    return [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("kind", "softmax", "gate"), parameters())
def test_graphs_answer_as_the_paper_defines_them_and_in_int8_nearly_so(kind: str, softmax: str, gate: str, made):
    model, net = made(kind, softmax, gate)
    given = feeds(net, 4)
    static = QUANTIZERS.get("static")
    for role, want in compared(model, net, given):
        graph = to_onnx(net.towers[role])
        sites = find_sites(graph).weights
        gates = [node.name for node in graph.graph.node if ".attn.gate" in module_of(node) and node.op_type == "MatMul"]
        assert not {*gates} & {*sites}  # `paper` leaves them in float
        assert len(gates) == (2 if "mlp" in gate else 1) * 2 * (gate not in ("none", "per_head"))
        params = static.params()
        integers = static.quantize(graph, static.observe(graph, given[role], params), params)
        for float_or_int8 in (graph, integers):
            rewritten = rewrites.apply(float_or_int8, rewrites.swaps())
            assert {name: rewritten.counts[name] for name in ("clipped_softmax", "softmax")} == {
                "clipped_softmax": 2 * (softmax == CLIPPED),
                "softmax": 2 * (softmax == VANILLA),
            }
            for node in rewritten.model.graph.node:
                if (node.domain, node.op_type) == (DOMAIN, SOFTMAX.name):
                    values = {attribute.name: attribute.f for attribute in node.attribute}
                    assert (values["gamma"], values["zeta"]) == pytest.approx(SOFTMAXES[softmax])
            (answers,) = parity.onnx_run(rewritten.model)(given[role][0]).values()
            answers = seen(role, given[role][0], answers)
            if float_or_int8 is graph:
                assert answers == pytest.approx(want, abs=1e-4)
            cosines = np.sum(answers * want, -1) / np.linalg.norm(answers, axis=-1) / np.linalg.norm(want, axis=-1)
            assert cosines.mean() >= 0.999


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", CLASSES)
def test_as_it_is_trained_it_answers_as_it_is_traced(kind: str, gate: str, made, tmp_path):
    _, net = made(kind, CLIPPED, gate)
    whole = NETS.get(kind).unfolded(str(tmp_path / "changed"))
    given = feeds(net)
    for role, tower in net.towers.items():
        assert not any(getattr(module, "folded", False) for module in whole.towers[role].module.modules())
        (want,) = parity.torch_run(tower)(given[role][0]).values()
        (answers,) = parity.torch_run(whole.towers[role])(given[role][0]).values()
        assert seen(role, given[role][0], answers) == pytest.approx(seen(role, given[role][0], want), abs=1e-5)
