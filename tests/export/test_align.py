import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from calmclip.export import align
from calmclip.export.align_cli import align_command
from calmclip.export.nets import NETS
from calmclip.export.nets.mini import SHIPPED
from calmclip.export.nets.mini.towers import Heads
from calmclip.models.errors import BadRequest


def test_a_text_is_right_for_whatever_holds_its_meaning():
    holds = torch.tensor([[7, 8], [8, align.NOTHING]])  # a dog is an animal; an animal
    meanings = torch.tensor([8, 7])  # "animal", "dog"
    assert align.right(holds, meanings).tolist() == [[True, True], [True, False]]


def test_padding_is_nothing_a_text_could_mean():
    holds = align.padded([[1, 2, 3], [4]])
    assert holds.tolist() == [[1, 2, 3], [4, align.NOTHING, align.NOTHING]]
    assert not align.right(holds, torch.tensor([0, 5])).any()


def test_right_answers_share_and_resembling_texts_get_some():
    positive = torch.tensor([[True, True], [False, True]])
    texts = torch.eye(2)
    assert align.targets(positive, texts, 0.0, 1.0).tolist() == [[0.5, 0.5], [0.0, 1.0]]
    # softmax of (1, 0) is e/(e+1) = .731 and .269; half of it goes on top of half the hard answer
    soft = align.targets(positive, texts, 0.5, 1.0)
    assert torch.allclose(soft, torch.tensor([[0.25 + 0.3655, 0.25 + 0.1345], [0.1345, 0.5 + 0.3655]]), atol=1e-3)


def test_loss_by_hand():
    # rows: -(log softmax(ln3, 0))[right]: right answers at 3/4 in both rows, -ln(3/4) = .2877; columns alike
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert align.loss(logits, torch.eye(2), torch.eye(2)).item() == pytest.approx(0.28768, abs=1e-5)


def test_categories_are_drawn_alike_however_frequent():
    chances = align.balanced(torch.tensor([0, 0, 0, 0, 1]))
    assert chances.tolist() == [0.25, 0.25, 0.25, 0.25, 1.0]


def test_recalls_by_hand(monkeypatch: pytest.MonkeyPatch):
    class Same(torch.nn.Module):
        def __init__(self, heads: object, classifier: object) -> None:
            super().__init__()

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures

    monkeypatch.setattr(align, "ImageHead", Same)
    shipped = Heads.load(SHIPPED)
    heads = Heads(**{**vars(shipped), "text_centre": torch.zeros(384), "text_weight": torch.eye(384)})
    pictures = torch.eye(384)[:3]
    # the texts of 0 and 1 find their picture first; the text of 2 lies nearest to 0, then 1, then its own
    texts = F.normalize(
        torch.stack([pictures[0], pictures[1], 3 * pictures[0] + 2 * pictures[1] + pictures[2]]), dim=-1
    )
    recalls = align.recalls(heads, pictures, texts, torch.tensor([0, 1, 2]))
    assert recalls["text_to_image@1"] == 66.7
    assert recalls["text_to_image@5"] == 100.0
    # picture 2 has cosine 1/sqrt(14) with its text and 0 with the others
    assert recalls["image_to_text@1"] == 100.0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small are slower on two threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_lowers_the_loss_and_finds_unseen_pairs():
    """Captions whose vectors are a fixed random map of the pictures' features: what a linear head can learn."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(240, 24, generator=generator)
    features = (hidden @ torch.randn(24, 1280, generator=generator)).relu()
    texts = F.normalize(hidden @ torch.randn(24, 384, generator=generator), dim=-1)
    start = align.fresh(features[:, None], texts, torch.zeros(1000, 384))
    source = align.captioned(features[:200, None], texts[:200], [1] * 200, batch=100)
    heads, figures = align.align([source], start, align.Training(steps=60, seeds=2), quiet=True)
    assert figures["last_loss"] < figures["first_loss"] / 2
    owner = torch.arange(40)
    before, after = (align.recalls(h, features[200:], texts[200:], owner)["text_to_image@5"] for h in (start, heads))
    assert before < 30  # chance is 12.5
    assert after > 60


@pytest.mark.usefixtures("one_thread")
def test_align_writes_a_checkpoint_that_export_reads(
    photographs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    some = {photographs[name].name: [f"a photo of a {name}"] for name in ("cat", "coffee", "rocket", "clock")}
    captions, out = tmp_path / "captions.json", tmp_path / "own"
    captions.write_text(json.dumps(some))
    argv = ["--captions", str(captions), "--images", str(photographs["cat"].parent), "--out", str(out), "--json"]
    argv += ["--steps", "3", "--seeds", "1", "--held-out", "1", "--cache", str(tmp_path / "cache")]
    assert align_command(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "heads.json").read_text())
    assert printed["data"] == {"captions": {"pictures": 3, "texts": 3}}
    assert printed["held_out"]["pictures"] == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert NETS.get("mini").recognise(str(out))
    trained, shipped = Heads.load(out / "heads.safetensors"), Heads.load(SHIPPED)
    assert not torch.equal(trained.image_weight, shipped.image_weight)
    assert torch.equal(trained.class_table, shipped.class_table)


@pytest.mark.parametrize(
    ("out", "printed"),
    [([], "./checkpoints/own"), (["--out", "mini"], "./mini"), (["--out", "../a"], "./../a"), (["--out", "/a"], "/a")],
)
def test_the_next_step_it_prints_is_of_what_it_wrote(
    out: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`export mini` would take the heads that ship, and seal the name that is there already."""
    monkeypatch.setattr(
        align, "train", lambda *_: {"heads": "", "training": {"first_loss": 2, "last_loss": 1}, "held_out": {}}
    )
    align_command(["--captions", "c.json", "--images", ".", *out])
    assert capsys.readouterr().out.splitlines()[-1] == f"export it with: calmclip export {printed}"


def test_a_picture_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "c.json").write_text('{"lost.jpg": ["one"]}')
    with pytest.raises(BadRequest, match=r"1 of 1 pictures .* lost\.jpg"):
        align_command(["--captions", str(tmp_path / "c.json"), "--images", str(tmp_path)])
