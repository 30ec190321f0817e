"""Distillation of tiny students. Oracles: torch by hand, a linear teacher, and the exported checkpoint."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from calmclip.export.nets import NETS, ready
from calmclip.export.training import distillation
from calmclip.export.training.corpus import read_corpus
from calmclip.export.training.distillation import alignment_loss, distil, feature_loss, targets
from calmclip.export.training.settings import Distillation
from calmclip.export.training.students import open_student
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.text import TextPreparer
from tests import tiny

WORDS = ("a cat", "a dog", "the red dog", "naïve", "café", "a photo", "of a", "cats", "dogs", "photo of", "the", "red")
TEXTS = [f"{first} {second}" for first in WORDS for second in WORDS]


def vectors_of(checkpoint: Path, texts: list[str]) -> torch.Tensor:
    """By the net that export makes of ``checkpoint``: unit rows."""
    module, preparer = opened(checkpoint)
    with torch.inference_mode():
        return module(*map(torch.from_numpy, preparer.prepare(texts).values()))


@cache
def opened(checkpoint: Path) -> tuple[torch.nn.Module, TextPreparer]:
    tower = (net := ready(NETS.get("bert").load(str(checkpoint)))).towers["text"]
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
        return tower.module, TextPreparer(tower.preprocess, Path(folder))


class Teacher:
    """unit(matrix @ the vector of the tiny student). A picture's vector is that of the text in its name."""

    def __init__(self, student: Path, rows: int = 16, digest: str = "d") -> None:
        self.student, self.calls = student, 0
        self.matrix = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
        self.bundle = SimpleNamespace(name="teacher", digest=digest, require=lambda task: None)

    def embed(self, *, texts=(), images=()) -> np.ndarray:
        self.calls += 1
        texts = [*texts, *(Path(image).stem for image in images)]
        return F.normalize(vectors_of(self.student, texts) @ self.matrix.T, dim=-1).numpy().copy()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sentences(tmp_path_factory.mktemp("student") / "sentences", "mean_tokens")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path / "texts.txt"


def settings(texts: Path, **more) -> Distillation:
    small = {"steps": 40, "feature_steps": 60, "batch": 64, "every": 20, "warmup": 4, "decay": 0.0, "rate": 0.01}
    return Distillation(**{"texts": texts, "projection": True, "held_out": 0.1, **small, **more})


# Losses


def test_the_feature_loss_is_smooth_l1_of_rows_times_the_root_of_their_length():
    # D = 4, so times 2. Differences: .6 -> .6^2 / 2 = .18; 0; 1.6 -> 1.6 - .5 = 1.1; 0
    goals = torch.tensor([[0.6, 0.0, 0.8, 0.0]])
    vectors = torch.tensor([[0.3, 0.0, 0.0, 0.0]])
    assert feature_loss(vectors, goals).item() == pytest.approx((0.18 + 1.1) / 4)


def test_equal_goals_share_the_target_and_like_goals_get_some():
    goals = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    hard = targets(goals, 0.0, 1.0)
    assert hard.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert torch.equal(targets(goals * 0.999, 0.0, 1.0), hard)  # rows that were rounded
    even = torch.tensor([np.e, np.e, 1.0]) / (2 * np.e + 1)  # softmax of (1, 1, 0)
    assert torch.allclose(targets(goals, 0.4, 1.0)[0], 0.6 * hard[0] + 0.4 * even.float())


def test_the_alignment_loss_by_hand():
    # logits 2 (1, 0; .6, .8): rows -log softmax, columns alike
    vectors, others = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    rows = -(np.log(np.exp(2) / (np.exp(2) + 1)) + np.log(np.exp(1.6) / (np.exp(1.6) + np.exp(1.2)))) / 2
    columns = -(np.log(np.exp(2) / (np.exp(2) + np.exp(1.2))) + np.log(np.exp(1.6) / (np.exp(1.6) + 1))) / 2
    value = alignment_loss(vectors, others, torch.eye(2), torch.tensor(2.0)).item()
    assert value == pytest.approx((rows + columns) / 2, abs=1e-6)


# A student and its teacher


def test_a_projection_begins_at_the_regression_on_the_features(student: Path, tmp_path: Path):
    goals = np.random.default_rng(0).standard_normal((len(TEXTS), 16)).astype(np.float32)
    layer = open_student(str(student), True, TEXTS, goals, tmp_path).module
    x = vectors_of(student, TEXTS).double().numpy()
    ridge = 1e-4 * (x**2).sum() / 32 * np.eye(32)
    expected = np.linalg.inv(x.T @ x + ridge) @ x.T @ goals
    assert np.allclose(layer.weight.detach().numpy(), expected.T, atol=1e-3 * np.abs(expected).max())


def test_a_projection_recovers_a_linear_teacher(student: Path, texts: Path, tmp_path: Path):
    teacher = Teacher(student)
    facts = distil(teacher, str(student), settings(texts, rate=1e-4), tmp_path / "out")
    assert facts["figures"]["cosine"] > 0.995
    ours = load_file(tmp_path / "out" / "3_Dense" / "model.safetensors")["linear.weight"]
    # the matrix, up to its length, on the span of the features
    features = vectors_of(student, TEXTS)
    expected, actual = features @ teacher.matrix.T, features @ ours.T
    assert F.cosine_similarity(expected, actual).min() > 0.98
    exported = vectors_of(tmp_path / "out", TEXTS)  # the layer lies before Normalize
    assert torch.allclose(exported, F.normalize(actual, dim=-1), atol=1e-5)
    assert [entry["path"] for entry in json.loads((tmp_path / "out" / "modules.json").read_text())] == [
        "", "1_Pooling", "3_Dense", "2_Normalize"
    ]  # fmt: skip


def test_the_first_stage_learns_features_alone_and_the_second_aligns(student: Path, texts: Path, tmp_path: Path):
    given = settings(texts, soft=0.0, feature_weight=0.5)
    corpus = read_corpus(given)
    teacher = torch.from_numpy(Teacher(student).embed(texts=corpus.taught))
    module = distillation.Joined(torch.nn.Linear(32, 16, bias=False))
    inputs = vectors_of(student, TEXTS).clone()
    none = np.empty((0, 16), np.float32)
    stages = {
        stage: distillation.Distil(
            module, lambda places: (inputs[places],), corpus, (teacher.numpy(), none), given, stage
        )
        for stage in distillation.STAGES
    }
    batch = stages["features"].batch(np.random.default_rng(0))
    vectors, goals = module(batch[0]), teacher[batch[1]]
    features = F.smooth_l1_loss(4 * vectors, 4 * goals)
    assert torch.allclose(stages["features"].loss(batch), features)
    wanted = targets(goals, 0.0, 1.0)
    aligned = alignment_loss(vectors, goals, wanted, torch.tensor(20.0))
    assert torch.allclose(stages["alignment"].loss(batch), 0.5 * features + aligned, rtol=1e-5)
    held = {int(place) for place in stages["features"].held_out[0]}
    drawn = {int(place) for seed in range(20) for place in stages["features"].batch(np.random.default_rng(seed))[1]}
    assert len(held) == 14
    assert not held & drawn


def test_all_of_a_student_learns_and_export_reads_it(student: Path, texts: Path, tmp_path: Path):
    teacher = Teacher(student, rows=32)
    before = F.cosine_similarity(vectors_of(student, TEXTS), torch.from_numpy(teacher.embed(texts=TEXTS))).mean()
    given = settings(texts, projection=False, feature_steps=30, steps=10, rate=2e-3)
    facts = distil(teacher, str(student), given, tmp_path / "out")
    after = F.cosine_similarity(vectors_of(tmp_path / "out", TEXTS), torch.from_numpy(teacher.embed(texts=TEXTS)))
    assert after.mean() > before + 0.2
    assert facts["figures"]["cosine"] == pytest.approx(float(after.mean()), abs=0.1)
    assert not (tmp_path / "out" / "3_Dense").exists()  # both have 32 numbers


def test_a_layer_joins_a_dense_layer_without_activation(texts: Path, tmp_path: Path):
    dense = tiny.sentences(tmp_path / "dense", "mean_tokens", {"Tanh": 48})
    config = dense / "2_Dense" / "config.json"
    config.write_text(config.read_text().replace("activation.Tanh", "linear.Identity"))
    teacher = Teacher(dense, rows=20)
    teacher.matrix = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    for name, given in {"layer": settings(texts), "all": settings(texts, projection=False)}.items():
        facts = distil(teacher, str(dense), given, tmp_path / name)
        assert vectors_of(tmp_path / name, TEXTS[:2]).shape == (2, 20)
        goals = torch.from_numpy(teacher.embed(texts=TEXTS))
        cosine = F.cosine_similarity(vectors_of(tmp_path / name, TEXTS), goals).mean()
        assert float(cosine) == pytest.approx(facts["figures"]["cosine"], abs=0.05)


def test_a_stopped_distillation_ends_with_the_same_bytes_and_asks_the_teacher_once(
    student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, teacher = distil(Teacher(student), str(student), settings(texts), tmp_path / "whole"), Teacher(student)
    train = distillation.train

    def interrupted(task, given, out):
        if out.name == "alignment":
            train(task, given, out, until=20)
            raise KeyboardInterrupt
        return train(task, given, out)

    monkeypatch.setattr(distillation, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, str(student), settings(texts), tmp_path / "halves")
    monkeypatch.undo()
    asked = teacher.calls
    again = distil(teacher, str(student), settings(texts), tmp_path / "halves")
    assert teacher.calls == asked
    assert {**again, "figures": 0} == {**whole, "figures": 0}
    for file in ("3_Dense/model.safetensors", "modules.json"):
        assert (tmp_path / "halves" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    distil(Teacher(student, digest="e"), str(student), settings(texts), tmp_path / "halves")
    with pytest.raises(BadRequest, match="of a training with other settings"):
        distil(teacher, str(student), settings(texts, rate=0.02), tmp_path / "halves")


# Data


def test_languages_and_pictures_take_part(student: Path, tmp_path: Path):
    captions = {f"{text}.png": [text, "naïve"] for text in TEXTS[:30]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "images").mkdir()
    for name in captions:
        (tmp_path / "images" / name).touch()
    rows = [{"en": text, "de": " ".join(reversed(text.split())), "fr": text} for text in TEXTS[:40]]
    del rows[3]["fr"]
    (tmp_path / "parallel.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = settings(
        tmp_path / "captions.json", pictures=tmp_path / "images", parallel=tmp_path / "parallel.jsonl", batch=16
    )
    corpus = read_corpus(given)
    assert (len(corpus.texts), len(corpus.taught), len(corpus.pictures)) == (60 + 119, 60 + 40, 30)
    place = corpus.texts.index(rows[1]["de"], 60)  # the teacher reads the English text of that line
    assert corpus.taught[corpus.goals[place]] == rows[1]["en"]
    facts = distil(Teacher(student), str(student), given, tmp_path / "out")
    assert {"cosine", "recall1", "cosine_en", "cosine_de", "recall1_fr"} <= facts["figures"].keys()
    assert facts["settings"]["parallel"] == "parallel.jsonl"

    inputs = torch.eye(len(corpus.texts))
    goals, seen = torch.randn(100, 4), torch.randn(30, 4)
    module = distillation.Joined(torch.nn.Linear(len(corpus.texts), 4, bias=False))
    vectors = tuple(F.normalize(rows, dim=-1).numpy() for rows in (goals, seen))
    task = distillation.Distil(module, lambda places: (inputs[places],), corpus, vectors, given, "alignment")
    *_, pictures = batch = task.batch(np.random.default_rng(0))
    assert (pictures[:8] >= 0).all()
    assert (pictures[8:] == -1).all()
    with_pictures = task.loss(batch)
    task.settings = given.model_copy(update={"picture_weight": 0.0})
    part = task.loss(batch)
    wanted = targets(task.goals[batch[1][:8]], given.soft, given.soft_temperature)
    seen_loss = alignment_loss(module(batch[0])[:8], task.pictures[pictures[:8]], wanted, module.scale())
    assert torch.allclose(with_pictures, part + 0.5 * seen_loss)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('["a"]', "line 2: "),
        ('{"en": " "}', "line 2: "),
        (
            '{"de": "ein Hund"}',
            "line 2 has no text in 'en', which the teacher reads; add it, or set source to one of de",
        ),
    ],
)
def test_wrong_lines_are_named(texts: Path, tmp_path: Path, line: str, message: str):
    (tmp_path / "parallel.jsonl").write_text(f'{{"en": "a"}}\n{line}\n')
    with pytest.raises(BadRequest, match=message):
        read_corpus(settings(texts, parallel=tmp_path / "parallel.jsonl"))


def test_wrong_students_and_data_are_named(student: Path, texts: Path, tmp_path: Path):
    goals = np.zeros((len(TEXTS), 16), np.float32)
    with pytest.raises(BadRequest, match="expected a sentence encoder"):
        open_student(str(tiny.bert(tmp_path / "bert")), True, TEXTS, goals, tmp_path / "out")
    with pytest.raises(BadRequest, match="choose another --out"):
        open_student(str(student), True, TEXTS, goals, student)
    (tmp_path / "two.txt").write_text("a\nb")
    with pytest.raises(BadRequest, match="2 texts are too few to hold out 1"):
        distil(Teacher(student), str(student), settings(tmp_path / "two.txt"), tmp_path / "two")
    (tmp_path / "captions.json").write_text('{"a.jpg": ["a"]}')
    with pytest.raises(BadRequest, match=r"1 of 1 pictures are absent, for example .*a\.jpg"):
        read_corpus(settings(tmp_path / "captions.json", pictures=tmp_path))
    with_activation = tiny.sentences(tmp_path / "tanh", "mean_tokens", {"Tanh": 16})
    with pytest.raises(BadRequest, match="train a projection"):
        distil(Teacher(student), str(with_activation), settings(texts, projection=False), tmp_path / "tanh-out")


def test_the_verb_names_a_setting_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    given = ["--teacher", "t", "--student", "s", "--out", str(tmp_path / "out")]
    assert main(["distil", *given]) == 2
    assert "texts" in capsys.readouterr().err
    assert main(["distil", *given, "--texts", "a.txt", "--share", "2"]) == 2
    assert "share" in capsys.readouterr().err
