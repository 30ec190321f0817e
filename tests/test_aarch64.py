"""The library on emulated ARM: kernels, dispatch, and a whole bundle beside this processor's answers.

In an emulator times say nothing; bytes do. See `tests.aarch64`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from tests import aarch64, aarch64_bundle, numpy_torch
from tests.bench import ops_instructions

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "models/bundles/mini-int8"
DISPATCH = """
import sys
from collections.abc import Callable
from pathlib import Path
from calmclip.models.ops.library import look
print(*(f"{name}={isa}" for name, isa in look(Path(sys.argv[1])).isas.items()))
"""


def draw(*shape: int) -> Any:
    return np.random.default_rng(0).normal(0, 2, shape)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "cat": lambda f, x: f([x, x], -1),
    "clamp": lambda f, x: f(x, -1, 1),
    "einsum": lambda f, x: f("bckp,bkcp->bpc", x, x),
    "layer_norm": lambda f, x: f(x, (6,), x[0, 0, 0], x[0, 0, 1], 1e-5),
    "max_pool2d": lambda f, x: f(x, (3, 2), (1, 2)),
    "pad": lambda f, x: f(x, (1, 2, 3, 0)),
    "rms_norm": lambda f, x: f(x, (6,), x[0, 0, 0], 1e-6),
    "scaled_dot_product_attention": lambda f, x: f(x, x + 1, x - 1, scale=0.7),
    "softmax": lambda f, x: f(x, -1),
    "unfold": lambda f, x: f(x, (3, 2), stride=(2, 1)),
    "where": lambda f, x: f(x > 0, x, x + 1),
    **dict.fromkeys(("exp", "gelu", "relu", "round", "sigmoid", "silu", "tanh"), lambda f, x: f(x)),
}
NOT_FUNCTIONS = {"float64", "from_numpy", "ones", "tensor"}


def test_the_functions_in_torchs_place_equal_torchs() -> None:
    ours = numpy_torch.TORCH | numpy_torch.FUNCTIONAL
    assert ours.keys() - NOT_FUNCTIONS == CALLS.keys()
    x = draw(2, 4, 4, 6)
    for name, call in CALLS.items():
        function = getattr(torch, name) if name in numpy_torch.TORCH else getattr(torch.nn.functional, name)
        exact = call(function, torch.from_numpy(x)).numpy()
        assert np.allclose(call(ours[name], numpy_torch.from_numpy(x)), exact, rtol=1e-12, atol=1e-12), name
    tanh = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    assert np.allclose(numpy_torch.gelu(x, approximate="tanh"), tanh, rtol=1e-12, atol=1e-12)


def test_nms_equals_torchvisions() -> None:
    from torchvision.ops import nms

    rng = np.random.default_rng(0)
    for n in range(40):
        low = rng.uniform(0, 10, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(0, 8, (n, 2))], 1).astype(np.float32)
        scores = rng.choice(np.linspace(0, 1, 20, dtype=np.float32), n)  # some are equal
        threshold = float(rng.uniform(0.1, 0.9))
        expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist()
        assert numpy_torch.nms(boxes, scores, threshold).tolist() == expected


def test_the_methods_of_tensors_equal_torchs() -> None:
    x = draw(2, 4, 4, 6)
    for call in (
        lambda t: t.permute(0, 3, 1, 2), lambda t: t.transpose(2, 3), lambda t: t.flatten(2), lambda t: t.flatten(0, 1),
        lambda t: t.unflatten(1, (2, 2)), lambda t: t.abs().amax(-1, keepdim=True).clamp(min=1),
        lambda t: t.sum(-1, keepdim=True), lambda t: t.softmax(-1), lambda t: t.chunk(2, -1)[1],
        lambda t: t[0, 0, 0, :1].expand(5), lambda t: t.double() @ t.transpose(-1, -2), lambda t: t.reshape(-1, 6),
    ):  # fmt: skip
        ours, exact = call(numpy_torch.from_numpy(x)), call(torch.from_numpy(x)).numpy()  # type: ignore[no-untyped-call]  # of lambdas
        assert isinstance(ours, numpy_torch.Tensor)
        assert ours.shape == exact.shape
        assert np.allclose(ours, exact, rtol=1e-12, atol=1e-12)
    assert numpy_torch.tensor(-1e30).numel() == 1


LISTING = """
0000000000001000 <quant_linear_dotprod>:
    1000:\tcbz\tx0, 1020 <quant_linear_dotprod+0x20>
    1004:\tldr\tq0, [x1], #16
    1008:\tsdot\tv1.4s, v0.16b, v2.4b[0]
    100c:\tusmmla\tv3.4s, v0.16b, v2.16b
    1010:\tsmlal2\tv4.4s, v0.8h, v2.h[0]
    1014:\tsubs\tx0, x0, #0x1
    1018:\tb.ne\t1004 <quant_linear_dotprod+0x4>  // b.any
    101c:\tb\t1000 <quant_linear_dotprod>
    1020:\tret
"""


def test_a_loop_is_a_branch_back_without_another_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {"-d": LISTING.splitlines(), "-t": []}
    monkeypatch.setattr(ops_instructions, "_printed", lambda tool, flag, *words: printed[flag])
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    code = ops_instructions.code_of(Path("library"), "aarch64")
    (loop,) = ops_instructions.kernel_loops(code, "quant_linear", "dotprod")
    assert [i.name for i in loop.body] == ["ldr", "sdot", "usmmla", "smlal2", "subs", "b.ne"]
    assert (loop.products, loop.least, sum(i.moves for i in loop.body)) == (16 + 32 + 4, 2, 1)


def needed() -> None:
    """Without an emulator the test is skipped, in CI it fails."""
    if reason := aarch64.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def run(*words: object, cpu: str = "max") -> str:
    command, environment = aarch64.command(*words, cpu=cpu)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow  # compiles
def test_each_kernel_of_byte_products_has_a_loop_of_its_instructions() -> None:
    needed()
    rows = [line.split(" | ") for line in ops_instructions.rows(aarch64.library() / build.NAME, "aarch64")]
    counted = {(row[0].removeprefix("| "), row[1]) for row in rows}
    kernels = ops_instructions.KERNEL.findall((build.SOURCES / "kernels/list.inc").read_text())
    wanted = {(kernel, isa) for kernel in kernels for isa in build.isas("INT8_", "aarch64") if isa != "scalar"}
    assert wanted
    assert wanted <= counted


@pytest.mark.slow  # downloads an interpreter and wheels where there are none
@pytest.mark.parametrize(("cpu", "best"), [("max", "i8mm"), ("neoverse-n1", "dotprod"), ("cortex-a72", "neon")])
def test_dispatch_takes_what_the_processor_has(cpu: str, best: str) -> None:
    needed()
    used = dict(pair.split("=") for pair in run("-c", DISPATCH, aarch64.library(), cpu=cpu).split())
    assert used["quant_linear"] == used["quant_attention"] == used["quant_depthwise"] == best
    assert used["quant_add"] == used["quant_lookup"] == "neon"


def passed(*words: str, cpu: str) -> int:
    """How many of pytest's tests pass; none fails or is skipped."""
    printed = run(*aarch64.tests(*words), cpu=cpu)
    assert "skipped" not in printed
    count = re.search(r"(\d+) passed", printed)
    assert count, printed[-2000:]
    return int(count[1])


@pytest.mark.slow
def test_kernels_equal_their_oracles() -> None:
    """Every test of the operators that takes an instruction set of ARM, and the comparisons between all of them.

    Except that of weights which AVX2's products of bytes may saturate: other tests have those that matter here.
    """
    needed()
    kernels = "(dotprod or i8mm or neon or every_instruction_set) and not weights_of_every_kind"
    assert passed("-k", kernels, "tests/models/ops", cpu="max") > 800


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["max", "neoverse-n1", "cortex-a72"])
def test_kernels_touch_no_byte_past_their_tensors(cpu: str) -> None:
    """Nor do those of an older processor need an instruction that it lacks."""
    needed()
    assert passed("tests/models/ops/test_edge.py", cpu=cpu) == 1


Answers = tuple[Any, Any]  # npz files of this processor and of the emulated one


@pytest.fixture(scope="module")
def built_in(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the built-in bundle and its nodes answer on this processor, and emulated."""
    needed()
    if not BUNDLE.is_dir():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"no {BUNDLE}; 'calmclip export mini' makes it"
        )
    return answered(library, BUNDLE, tmp_path_factory.mktemp("answered"))


@pytest.fixture(scope="module")
def tiny(library: Library, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The same of a CLIP whose every product is an operator of ours, from the patches of pictures on."""
    needed()
    bundle = tiny_bundles / "tiny-int8"
    towers = [onnx.load(bundle / f"{role}.onnx").graph.node for role in aarch64_bundle.ROLES]
    kinds = {node.op_type for nodes in towers for node in nodes}
    assert not kinds & {"Conv", "MatMul", "Gemm"}
    assert kinds >= {"QuantPatches", "QuantLinear", "QuantAttention", "QuantLayerNorm", "QuantLinearToFloat"}
    return answered(library, bundle, tmp_path_factory.mktemp("answered"))


def answered(library: Library, bundle: Path, folder: Path) -> Answers:
    script, feeds = ROOT / "tests/aarch64_bundle.py", folder / "feeds.npz"
    here = [sys.executable, str(script), str(library.path.parent), str(bundle), str(folder / "here.npz"), str(feeds)]
    subprocess.run(here, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    printed = run(script, aarch64.library(), bundle, folder / "arm.npz", feeds)
    assert build.isas("INT8_", "aarch64")[-1] in printed.split()
    return np.load(folder / "here.npz"), np.load(folder / "arm.npz")


def same_nodes(answers: Answers) -> int:
    """How many outputs of nodes there are, all with the same bytes; a node has the inputs that it had on this
    processor."""
    here, arm = answers
    nodes = [name for name in here.files if "/Quant" in name]
    assert [name for name in nodes if here[name].tobytes() != arm[name].tobytes()] == []
    return len(nodes)


def cosines(answers: Answers, name: str) -> Any:
    a, b = (file[name] for file in answers)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.slow
def test_every_node_of_the_built_in_bundle_answers_the_same_bytes(built_in: Answers) -> None:
    assert same_nodes(built_in) > 100


@pytest.mark.slow
def test_a_bundle_answers_the_same(tiny: Answers) -> None:
    """Texts and pictures from end to end. ONNX Runtime computes only layer norms between the operators."""
    assert same_nodes(tiny) > 20
    assert len(cosines(tiny, "answers")) == aarch64_bundle.TEXTS + aarch64_bundle.PICTURES
    assert cosines(tiny, "answers").min() >= 0.99999


@pytest.mark.slow
def test_the_built_in_bundle_answers_the_same_behind_its_first_convolutions(built_in: Answers) -> None:
    """Texts from end to end, and pictures from the first operator on.

    Before it three convolutions in float32 are ONNX Runtime's, which adds in another order on each processor. So a few
    bytes that enter the operator differ by a step, and the layers behind round otherwise: whole pictures came to
    cosines of 0.9985 to 0.9997. The bar for them says that they are the same pictures, not that they are exact.
    """
    texts = slice(0, aarch64_bundle.TEXTS)
    assert cosines(built_in, "answers")[texts].min() >= 0.99999
    towers = [name for name in built_in[0].files if name.startswith("from ") and name.endswith("_embeds")]
    assert sorted(towers) == ["from image/image_embeds", "from text/text_embeds"]
    for name in towers:
        assert cosines(built_in, name).min() >= 0.99999, name
    before = [name for name in built_in[0].files if name.startswith("before image/")]
    (picture,) = (name for name in before if built_in[0][name].dtype == np.uint8)  # others are weights
    here, arm = (file[picture] for file in built_in)
    steps = np.abs(here.astype(int) - arm)
    assert steps.max() <= 1
    assert (steps > 0).mean() <= 1e-3
    assert cosines(built_in, "answers").min() >= 0.998
