"""Signed gradient x attention. Oracles: transformers' attention and autograd in float64; leave-one-out of a scorer that
sums its tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export import borrow, parity
from calmclip.export.adapters import Adapt, Context, adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.layouts import LAYOUTS
from calmclip.export.nets import NETS, Net, Tower, ready
from calmclip.export.towers.attribution import Attribution
from calmclip.export.trace import to_onnx
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.explain import ExplainRequest
from tests import tiny

IDS = torch.tensor([[tiny.START, 11, 12, 13, tiny.END, 1, 1], [tiny.START, 7, 8, 9, 10, 11, tiny.END]])
REFUSED = {
    "mobileclip": "convolutions of its text tower mix neighbouring tokens",
    **dict.fromkeys((name for name in LAYOUTS.names() if name.startswith("llm2clip")), "that read pictures and texts"),
}


def adapted(net: Net, **params: Any) -> Net:
    return adapt(net, [Adapt(name="attribution", params={"on": True, **params})], Context(lambda net, tower: []))


def opened(checkpoint: Path) -> Net:
    return NETS.get("clip").unfolded(str(checkpoint), Weights())  # type: ignore[misc]


def unit_rows(count: int, width: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture(scope="module")
def tower(tiny_hf_clip: Path) -> Tower:
    return ready(adapted(opened(tiny_hf_clip), layers=2)).towers["attribution"]


@pytest.mark.parametrize("layers", [1, 2])
def test_contributions_are_gradient_times_attention_of_transformers(layers: int, tiny_hf_clip: Path):
    clip = transformers.CLIPModel.from_pretrained(tiny_hf_clip, attn_implementation="eager").double()
    image = unit_rows(2, 16).double()
    hidden = clip.text_model(input_ids=IDS, output_attentions=True)
    for probabilities in hidden.attentions:
        probabilities.retain_grad()
    vectors = clip.text_projection(hidden.pooler_output)
    score = (F.normalize(vectors, dim=-1) * image).sum(-1)
    score.sum().backward()
    parts = [(p * p.grad).sum(dim=(1, 2)) for p in hidden.attentions[-layers:]]  # over heads and queries
    wanted = sum(parts[1:], parts[0])

    text = opened(tiny_hf_clip).towers["text"].module.double()
    contributions, cosine = Attribution(text, layers)(IDS, image)
    assert torch.allclose(cosine, score, atol=1e-12)
    assert torch.allclose(contributions, wanted, atol=1e-12)
    assert wanted.abs().max() > 0.01
    assert (wanted < -0.001).any()  # negative ones stay
    assert not contributions[0, 5:].any()  # after the end of the text


class Summed(nn.Module):
    """One linear layer: the vector of a text is the sum of its tokens' values."""

    gain: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Embedding(20, 8, dtype=torch.float64)

    def forward(self, ids: Tensor, left_out: int | None = None) -> Tensor:
        values = self.values(ids) if self.gain is None else self.values(ids) * self.gain
        kept = [place for place in range(ids.shape[1]) if place != left_out]
        return values[:, kept].sum(dim=1)


def test_a_linear_scorer_has_the_contributions_of_leave_one_out():
    text, ids, image = Summed(), torch.randint(20, (3, 6)), unit_rows(3, 8).double()
    contributions, score = Attribution(text, 1)(ids, image)
    for place in range(6):
        without = (text(ids, left_out=place) * image).sum(-1)
        assert torch.allclose(contributions[:, place], score - without, atol=1e-12)
    assert text.gain is None  # the tower is as before


@pytest.mark.slow  # a trace
def test_the_traced_graph_is_autograds_answer_and_rows_are_independent(tower: Tower):
    run = parity.onnx_run(borrow.untransposed(to_onnx(tower)), threads=1)
    feeds = {"ids": np.concatenate([IDS.numpy(), IDS.numpy()[:1]]), "image_embeds": unit_rows(3, 16).numpy()}
    together, truth = run(feeds), parity.torch_run(tower)(feeds)
    for name in ("contributions", "score"):
        assert np.abs(together[name] - truth[name]).max() <= 1e-5
    longer = np.pad(feeds["ids"][:1], ((0, 0), (0, 4)), constant_values=1)
    alone = run({"ids": longer, "image_embeds": feeds["image_embeds"][:1]})
    assert np.abs(alone["contributions"][0, :7] - together["contributions"][0]).max() <= 1e-6
    assert not alone["contributions"][0, 5:].any()


@pytest.mark.slow  # a trace for each layout
@pytest.mark.parametrize("name", LAYOUTS.names())
def test_every_layout_has_the_graph_or_says_why_not(name: str, checkpoint):
    net = opened(checkpoint(name))
    if name in REFUSED:
        with pytest.raises(BadRequest, match=REFUSED[name]):
            adapted(net)
        return
    tower = ready(adapted(net)).towers["attribution"]
    model, random = to_onnx(tower), np.random.default_rng(0)
    sizes, words = {"B": 3, "T": 9}, min(90, tower.module.text.tokens.num_embeddings)
    feeds: Arrays = {}
    for key, spec in tower.inputs.items():
        shape = [sizes.get(str(dim), dim) for dim in spec.shape]
        whole = random.integers(3, words, shape) if key == "ids" else np.ones(shape, np.int64)  # type: ignore[arg-type]
        feeds[key] = random.standard_normal(shape).astype(np.float32) if spec.dtype == "float32" else whole  # type: ignore[arg-type]
    truth = parity.torch_run(tower)(feeds)
    for graph in (model, borrow.untransposed(model)):
        answer = parity.onnx_run(graph, threads=1)(feeds)
        for key in truth:
            assert np.abs(answer[key] - truth[key]).max() <= 1e-4 * max(1.0, np.abs(truth[key]).max())
    assert np.abs(truth["contributions"]).max() > 1e-4


def test_what_does_not_fit_is_refused_in_words(tiny_hf_clip: Path):
    net = opened(tiny_hf_clip)
    assert adapt(
        net, [Adapt(name="attribution", params={"on": False})], Context(lambda net, tower: [])
    ).towers.keys() == (net.towers.keys())
    with pytest.raises(BadRequest, match="layers is 3; expected at most 2"):
        adapted(net, layers=3)
    net.towers["text"].module.blocks = nn.ModuleList()
    with pytest.raises(BadRequest, match="no attention mixes the tokens of its text tower"):
        adapted(net)


@pytest.mark.slow  # an export
@pytest.mark.parametrize("portable", [False, True])
def test_a_bundle_explains_by_the_graph(
    portable: bool, tiny_hf_clip: Path, photographs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The contributions of words are those of the torch tower, whose tokens are words here."""
    command = ["export", str(tiny_hf_clip), "--out", str(tmp_path), "--name", "why", "--keep-float"]
    assert main([*command, "--attribution", "--attribution-layers", "2", *(["--portable"] if portable else [])]) == 0
    floats = open_bundle(tmp_path / "why-float")
    (int8,) = (open_bundle(path) for path in tmp_path.iterdir() if path.is_dir() and path.name != "why-float")
    caption, picture = "a photo of two cat", photographs["cat"]
    answers = [runner.ask("explain", ExplainRequest(picture, caption, "gradient")) for runner in (floats, int8)]
    tower = ready(adapted(opened(tiny_hf_clip), layers=2)).towers["attribution"]
    feeds = floats.bundle.text().prepare([caption])
    truth = parity.torch_run(tower)({**feeds, "image_embeds": floats.embed(images=[picture])})
    words = [word.contribution for word in answers[0].words]
    assert words == pytest.approx(truth["contributions"][0, 1:6].tolist(), abs=1e-4)  # behind the start
    assert answers[0].score == pytest.approx(float(truth["score"][0]), abs=1e-4)
    rounded = [word.contribution for word in answers[1].words]
    assert np.corrcoef(words, rounded)[0, 1] > 0.95
    capsys.readouterr()
    assert main(["check", str(int8.bundle.directory)]) == 0
    assert "attribution: contributions [1, " in capsys.readouterr().out
    sizes = {path.name: path.stat().st_size for path in int8.bundle.directory.iterdir()}
    assert sizes["attribution.onnx"] < 200_000  # bytes; the structure
