"""Clipped softmax and gates. Golden vectors come from other code, in float64; definitions are written out here."""

import pytest
import torch
from torch import Tensor

from calmclip.export.gates import GATES
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec, Gate, Softmax, kind, new_gate
from calmclip.export.towers.bert import LastPostBlock, PostBlock
from calmclip.export.towers.transformer import Attention, Block, LastBlock, causal, hide, valid
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests.towers import HEADS, WIDTH, block

TOKENS = 7
EACH = WIDTH // HEADS
X = torch.tensor([2.0, 1, 0, -1, -6], dtype=torch.float64)
TYPES = dict.fromkeys(("linear_mean", "mlp_mean"), "conditional_per_head")
REAL = [gate for gate in GATES if gate != "none"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("softmax", "want"),
    [
        (Softmax(), [0.6437752, 0.23683166, 0.0871255, 0.03205168, 0.00021596]),
        (Softmax(-0.03), [0.63308845, 0.21393661, 0.05973926, 0.00301323, 0]),
        (Softmax(-0.1, 1.1), [0.67253024, 0.18419799, 0.0045506, 0, 0]),
        (Softmax(0.0, 1.03), [0.66308845, 0.24393661, 0.08973926, 0.03301323, 0.00022244]),
    ],
)
def test_the_softmax_of_golden_logits(softmax: Softmax, want: list[float]):
    assert softmax(X).tolist() == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize(
    ("length", "alpha", "least"), [(128, 3.2, 0.0243902), (512, 12, 0.0229008), (77, 4, 0.0493827), (197, 4, 0.0199005)]
)
def test_what_is_0_by_the_length_of_the_trainings_rows(length: int, alpha: float, least: float):
    softmax = Softmax.of_length(alpha, length)
    for chance, zero in ((least * 0.9999, True), (least * 1.0001, False)):
        logits = torch.tensor([chance, 1 - chance], dtype=torch.float64).log()
        assert (softmax(logits)[0].item() == 0) == zero
    assert Softmax.of_length(3.2, 128) == Softmax(-0.025)


def test_settings_are_read_as_the_papers_code_writes_them():
    assert Softmax.parse("vanilla") == Softmax()
    assert Softmax.parse("clipped(-0.025:1)") == Softmax(-0.025, 1.0)
    assert Softmax.parse("clipped(-.005 : 1.005)") == Softmax(-0.005, 1.005)
    assert Softmax.parse(str(Softmax(-0.003, 1.003))) == Softmax(-0.003, 1.003)
    assert Softmax.parse(str(Softmax.of_length(3.2, 384))) == Softmax(-3.2 / 384)  # more digits than are printed
    for wrong in ("", "clipped", "clipped(0.1:1)", "clipped(-0.1:0.9)", "clipped(-0.1)", "clipped(a:1)", "clip(0:1)"):
        with pytest.raises(BadRequest, match=r"expected vanilla, or clipped\(gamma:zeta\)"):
            Softmax.parse(wrong)


@pytest.mark.parametrize(
    ("config", "softmax", "scale"),
    [
        ({}, Softmax(), 1.0),
        ({"attn_softmax": None, "alpha": None}, Softmax(), 1.0),
        ({"attn_softmax": "clipped(-0.025:1)"}, Softmax(-0.025), 1.0),
        ({"alpha": 12, "max_seq_length": 512, "attn_softmax": "vanilla"}, Softmax(-12 / 512), 1.0),
        ({"fine_tuning": True, "attn_gate_init": 0.25}, Softmax(), 4.0),
        ({"fine_tuning": False, "attn_gate_init": 0.25}, Softmax(), 1.0),
        ({"attn_gate_scale": 2, "fine_tuning": True, "attn_gate_init": 0.25}, Softmax(), 2.0),
        ({"attn_gate_type": "conditional_per_head"}, Softmax(), 1.0),
    ],
)
def test_what_a_config_says(config: dict, softmax: Softmax, scale: float):
    spec = AttentionSpec.of(config)
    assert (spec.softmax, spec.gate_scale) == (softmax, scale)
    assert AttentionSpec.of(spec.to_config()) == spec


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"alpha": 4}, "alpha without max_seq_length"),
        ({"attn_softmax": "clipped(1:2)"}, r"attention: softmax is 'clipped\(1:2\)'"),
        ({"attn_gate_scale": 0}, "attention: attn_gate_scale is 0; expected a number above 0"),
        ({"attn_gate_type": "per_head"}, "attention: attn_gate_type is 'per_head'; expected one of none, uncond"),
        ({"fine_tuning": True, "attn_gate_init": 0}, "attention: "),
        ({"alpha": "much", "max_seq_length": 128}, "attention: could not convert"),
    ],
)
def test_a_config_that_says_it_wrongly(config: dict, named: str):
    with pytest.raises(UnknownCheckpoint, match=f"^config.json: {named}"):
        AttentionSpec.of(config)


def gate_of(which: str, prefix: str = "") -> dict[str, Tensor]:
    state = {name: torch.randn(tensor.shape) for name, tensor in new_gate(which, HEADS, WIDTH).items()}
    return {prefix + name: tensor for name, tensor in state.items()}


def opened(which: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Table 4 of the paper, one head and one token at a time: x [B, T, W] -> [B, H, T]."""
    gates = torch.empty(len(x), HEADS, x.shape[1], dtype=x.dtype)
    for b, h, t in ((b, h, t) for b in range(len(x)) for h in range(HEADS) for t in range(x.shape[1])):
        inputs = x[b, t, h * EACH : (h + 1) * EACH]
        if which == "per_head":
            logit = state["logits"][h]
        elif which.startswith("linear"):
            logit = state["weight"][h] @ inputs + state["bias"][h]
        elif which == "all_heads":
            logit = state["weight"][h] @ x[b, t] + state["bias"][h]
        else:
            inner = (state["hidden.weight"][h] @ inputs + state["hidden.bias"][h]).clamp(min=0)
            logit = state["weight"][h] @ inner + state["bias"][h]
        gates[b, h, t] = logit
    if which.endswith("_mean"):
        for b, h in ((b, h) for b in range(len(x)) for h in range(HEADS)):
            gates[b, h] = sum(gates[b, h].tolist()) / x.shape[1]
    return 1 / (1 + torch.exp(-gates))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("which", REAL)
def test_a_gate_is_what_the_paper_says_folded_or_not(which: str, folded: bool):
    state = {name: tensor.double() for name, tensor in gate_of(which).items()}
    gate = Gate(state, HEADS, WIDTH, mean=which.endswith("_mean")).double()
    gate.load_state_dict(state)
    assert gate.kind == which
    assert kind(state, HEADS, WIDTH) == which.removesuffix("_mean")
    if folded:
        gate.fold()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    answers = gate(x)[..., 0].expand(2, HEADS, TOKENS)
    assert torch.allclose(answers, opened(which, state, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("which", TYPES)
def test_padding_does_not_enter_the_mean_of_a_gate(which: str):
    """A row of four tokens answers the same alone and beside three tokens of padding."""
    state = gate_of(which)
    gate = Gate(state, HEADS, WIDTH, mean=True).requires_grad_(False)
    gate.load_state_dict(state)
    x = torch.randn(2, TOKENS, WIDTH)
    real = (torch.arange(TOKENS) < 4).float()[None].expand(2, -1)
    for mask in (hide(real), causal(TOKENS) + hide(real)):
        assert torch.allclose(gate(x, valid(mask)), gate(x[:, :4]), atol=1e-6)
    assert torch.allclose(gate(x, valid(causal(TOKENS))), gate(x), atol=1e-6)


@pytest.mark.parametrize(
    ("gate_type", "which", "message"),
    [
        (
            "conditional_per_head",
            "all_heads",
            "the tensors are those of the gate all_heads; expected the gate linear or",
        ),
        ("conditional_per_head", "none", "the tensors are those of the gate none; expected the gate linear or mlp"),
        ("conditional_per_token", "per_head", "the tensors are those of the gate per_head; expected the gate linear"),
        ("none", "linear", "the tensors are those of the gate linear; expected the gate none"),
    ],
)
def test_a_config_and_tensors_of_two_gates(gate_type: str, which: str, message: str):
    with pytest.raises(UnknownCheckpoint, match=f"^config.json: attn_gate_type is '{gate_type}', but {message}"):
        attention(AttentionSpec(gate_type=gate_type), gate_of(which, "gate."))


def test_all_heads_of_blocks_beside_zeros_is_linear():
    state = gate_of("linear")
    whole = {"weight": torch.block_diag(*state["weight"][:, None]), "bias": state["bias"]}
    x = torch.randn(2, TOKENS, WIDTH)
    gates = []
    for tensors in (state, whole):
        gates.append(Gate(tensors, HEADS, WIDTH))
        gates[-1].load_state_dict(tensors)
    assert [gate.kind for gate in gates] == ["linear", "all_heads"]
    assert torch.allclose(gates[0](x), gates[1](x), atol=1e-6)


def attention(spec: AttentionSpec, gate: dict[str, Tensor]) -> tuple[Attention, dict[str, Tensor]]:
    state = {
        "qkv.weight": torch.randn(3 * WIDTH, WIDTH) / 4, "qkv.bias": torch.randn(3 * WIDTH),
        "out.weight": torch.randn(WIDTH, WIDTH), "out.bias": torch.randn(WIDTH), **gate,
    }  # fmt: skip
    made = Attention(state, Style(heads=HEADS, attention=spec), WIDTH)
    made.load_state_dict(state)
    return made.double().requires_grad_(False), {name: tensor.double() for name, tensor in state.items()}


def defined(state: dict[str, Tensor], which: str, spec: AttentionSpec, x: Tensor) -> Tensor:
    """Equations 4 and 5, a head at a time."""
    q, k, v = (state["qkv.weight"] @ x.mT + state["qkv.bias"][:, None]).mT.chunk(3, dim=-1)
    gate = {name.removeprefix("gate."): tensor for name, tensor in state.items()}
    heads = []
    for h in range(HEADS):
        part = slice(h * EACH, (h + 1) * EACH)
        p = torch.softmax(q[..., part] @ k[..., part].mT / EACH**0.5, -1)
        p = torch.clip((spec.softmax.zeta - spec.softmax.gamma) * p + spec.softmax.gamma, 0, 1)
        answer = p @ v[..., part]
        if which != "none":
            answer = spec.gate_scale * opened(which, gate, x)[:, h, :, None] * answer
        heads.append(answer)
    return torch.cat(heads, -1) @ state["out.weight"].T + state["out.bias"]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("which", GATES)
def test_attention_is_what_the_paper_says_folded_or_not(which: str, folded: bool):
    spec = AttentionSpec(Softmax(-0.04, 1.02), gate_scale=2.5, gate_type=TYPES.get(which))
    made, state = attention(spec, gate_of(which, "gate."))
    if folded:
        made.fold()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    assert torch.allclose(made(x), defined(state, which, spec, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("which", GATES)
@pytest.mark.parametrize(("whole", "last"), [(Block, LastBlock), (PostBlock, LastPostBlock)])
def test_the_last_block_is_the_whole_block_and_then_its_token(which: str, whole: type, last: type, folded: bool):
    state = block() | gate_of(which, "attn.gate.")
    style = Style(heads=HEADS, attention=AttentionSpec(Softmax(-0.04), 1.5, TYPES.get(which)))
    modules = [kind(state, style, WIDTH) for kind in (whole, last)]
    for module in modules:
        module.load_state_dict(state)
        module.double().requires_grad_(False)
        if folded:
            module.fold()
    x, token = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), slice(4, 5)
    mask = causal(TOKENS).double() + hide((torch.arange(TOKENS) < 5).double()[None])  # padding follows the token
    answers = modules[1](x, mask[:, :, token], lambda x: x[:, token])
    assert torch.allclose(answers, modules[0](x, mask)[:, token], atol=1e-12, rtol=0)


@pytest.mark.parametrize("start", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("which", REAL)
def test_a_gate_without_weights_opens_as_far_as_it_starts_and_its_scale_undoes_that(which: str, start: float):
    """Fine-tuning: the net starts unchanged."""
    gate = new_gate(which, HEADS, WIDTH, start)
    for name in gate:
        if name.endswith("weight"):
            gate[name] = torch.zeros_like(gate[name])
    gate = {f"gate.{name}": tensor for name, tensor in gate.items()}
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    made, state = attention(AttentionSpec(gate_scale=1 / start, gate_type=TYPES.get(which)), gate)
    assert torch.allclose(made(x), defined(state, "none", AttentionSpec(), x), atol=1e-6)
    half, state = attention(AttentionSpec(gate_type=TYPES.get(which)), gate)
    context = defined(state, "none", AttentionSpec(), x) - state["out.bias"]
    assert torch.allclose(half(x) - state["out.bias"], start * context, atol=1e-6)


def test_a_new_gate_has_the_biases_of_the_paper_and_small_weights():
    assert new_gate("linear", HEADS, WIDTH, 0.25)["bias"].tolist() == pytest.approx([-1.0986123] * HEADS)
    assert new_gate("all_heads", HEADS, WIDTH, 0.9)["bias"].tolist() == pytest.approx([2.1972246] * HEADS)
    assert new_gate("mlp", HEADS, 4 * 64)["hidden.weight"].shape == (HEADS, 16, 64)
    assert new_gate("mlp", HEADS, WIDTH, hidden=5)["hidden.weight"].shape == (HEADS, 5, EACH)
    assert new_gate("none", HEADS, WIDTH) == {}
    with pytest.raises(BadRequest, match="a gate starts at 1; expected a number between 0 and 1"):
        new_gate("linear", HEADS, WIDTH, 1)


def test_clipped_entries_pass_no_gradient():
    """So logits stop growing."""
    logits = X.clone().requires_grad_()
    Softmax(-0.1)(logits)[3:].sum().backward()
    assert logits.grad.abs().max() == 0
