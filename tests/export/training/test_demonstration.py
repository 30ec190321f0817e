"""The demonstration's data and table by hand; a small complete run in the slow suite."""

import gzip
import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer

from calmclip.export.training import demonstration, shipped
from calmclip.export.training.demonstration import DICTIONARY, FAMILIES, Run, demonstrate, dictionary, runs_of, table
from calmclip.export.training.recipes import NetRecipe, Recipe, load
from calmclip.export.training.settings import training
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, ExportError

NARROW = load("narrow").nets["bert"]
PICTURES = NetRecipe(training={"side": 32}, variants={"vanilla": {}})
ENTRY = "Calm \\Calm\\ (k[aum]m), n. [OE. & F. calme, fr. It. or Sp. calma.] Freedom from motion, or disturbance."


def test_entries_of_the_dictionary_begin_where_a_line_is_not_indented(tmp_path):
    place = tmp_path / DICTIONARY
    place.parent.mkdir(parents=True)
    second = (
        "Calm \\Calm\\, v. t.\n   To make calm; to render still or quiet, as elements;\n   as, to calm the winds.\n"
    )
    with gzip.open(place, "wt", encoding="utf-8") as stream:
        stream.write(ENTRY.replace(" (", "\n   (") + "\n\n" + second + "\nShort\n   one.\n")
    entries = [*dictionary(tmp_path, tmp_path / "none")]
    assert entries == [ENTRY, " ".join(second.split())]


def test_without_debian_a_text_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration.shutil, "which", lambda name: None)
    with pytest.raises(BadRequest, match="Debian package dict-gcide is not available here; give --text"):
        next(dictionary(tmp_path, tmp_path / "none"))


def test_rows_that_are_measured_on_are_none_that_are_trained_on(tmp_path):
    texts = [f"entry number {n} says {' '.join(f'w{n}x{k}' for k in range(12))}." for n in range(200)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    FAMILIES["bert"].prepare(tmp_path / "bert", NARROW, tmp_path / "texts.txt")
    train = (tmp_path / "bert" / "train.txt").read_text().splitlines()
    held = (tmp_path / "bert" / "held" / "texts.txt").read_text()
    assert train == texts[:196]
    assert all(f"number {n} " not in held for n in range(196))
    assert any(f"number {n} " in held for n in range(196, 200))
    tokenizer = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json"))
    longest = max(len(tokenizer.encode(row).ids) for row in held.splitlines())
    assert 40 < longest <= 64 + 8  # decoded texts may be cut into other tokens


def test_digits_are_scikit_learns_four_times_as_large(tmp_path):
    FAMILIES["vit"].prepare(tmp_path, PICTURES, None)
    files = [*tmp_path.glob("*/*/*.png")]
    digits = load_digits()
    assert len(files) == len(digits.target) == 1797
    assert len([*tmp_path.glob("held/*/*.png")]) == 1797 // 5
    for file in files[::300]:
        number = int(file.stem)
        assert int(file.parent.name) == digits.target[number]
        small = np.asarray(Image.open(file).convert("L").resize((8, 8), Image.Resampling.BOX), np.float64)
        assert np.abs(small - digits.images[number] * 255 / 16).mean() < 25


def test_a_table_has_means_and_deviations_worked_out_by_hand():
    runs = [Run("bert", *run, NARROW) for run in (("vanilla", 0), ("vanilla", 1), ("gated", 0))]
    keys = ("float", "max_inf_norm", "avg_kurtosis", "max_kurtosis", "w8a8", "w6a8", "w4a8", "w6a6", "default")
    results = {run.name: dict.fromkeys(keys, value) for run, value in zip(runs, (10.0, 13.0, 120.5), strict=True)}
    rows = table(runs, results).splitlines()
    figures = "float | max inf norm | avg kurtosis | max kurtosis | W8A8 | W6A8 | W4A8 | W6A6 | default"
    assert rows[0] == f"| net | attention | {figures} |"
    assert rows[2] == "| bert (perplexity) | vanilla |" + " 11.50 ± 2.12 |" * 9  # 1.5 sqrt(2)
    assert rows[3] == "| bert (perplexity) | gated |" + " 120 |" * 9


def test_each_net_is_trained_once_with_its_settings_and_sealed_however_far_it_is_from_float(
    tiny_bert, tiny_vit, tmp_path, monkeypatch
):
    """Trainings and exports are replaced: they cost minutes. The slow test runs them."""
    texts, picture = (
        tmp_path / "data" / "bert" / "held" / "texts.txt",
        tmp_path / "data" / "vit" / "held" / "1" / "1.png",
    )
    for file in (texts, picture):  # data that are there are not made
        file.parent.mkdir(parents=True)
    texts.write_text("red cat\n")
    Image.new("RGB", (32, 32)).save(picture)
    trainings, trained, recipes = [], {}, []

    def train(command, stdout, **_):
        out = Path(command[command.index("--out") + 1])
        trainings.append(out.name)
        trained[out.name] = tomllib.loads(Path(command[command.index("--settings") + 1]).read_text())
        if len(trainings) == 5:
            stdout.write("a step\nno memory left\n")
            return SimpleNamespace(returncode=1)
        shutil.copytree(tiny_bert if out.name.startswith("bert") else tiny_vit, out, dirs_exist_ok=True)
        line = {"seconds": 2.5, "step": 9, "loss": 1.0, "max_inf_norm": 4.0, "avg_kurtosis": 4.0, "max_kurtosis": 4.0}
        (out / "training.jsonl").write_text(json.dumps(line) + "\n")
        return SimpleNamespace(returncode=0)

    def build(recipe, out, **_):
        recipes.append(recipe)
        folder = out / recipe.name
        folder.mkdir(parents=True, exist_ok=True)
        ((name, _),) = recipe.evals.items()
        outliers = dict.fromkeys(("max_inf_norm", "avg_kurtosis", "max_kurtosis", "worst"), 4.0)
        sides = {"float32": {name: 20.0}, "int8": {name: 30.0}}
        graphs = {role: {"outliers": outliers} for role in recipe.quantize}
        (folder / "report.json").write_text(json.dumps({"accuracy": {name: sides}, "graphs": graphs}))
        return [SimpleNamespace(directory=folder, manifest=recipe)]

    monkeypatch.setattr(demonstration.subprocess, "run", train)
    monkeypatch.setattr("calmclip.export.pipeline.build", build)
    once = load("full").model_copy(update={"seeds": (7,)})
    monkeypatch.setattr(demonstration, "load", lambda name: once)
    with pytest.raises(ExportError, match=r"the training failed \(no memory left\); see .*runs/.*[.]out"):
        demonstrate("full", tmp_path, jobs=1, log=lambda line: None)
    made = demonstrate("full", tmp_path, jobs=1, log=lambda line: None)
    assert len(trained) == 6
    assert trainings[6:] == [trainings[4]]  # the others are not repeated
    assert demonstrate("full", tmp_path, jobs=1, log=lambda line: None) == made
    assert (len(trainings), len(recipes)) == (7, 30)  # nothing is repeated
    assert all(settings["seed"] == 7 for settings in trained.values())
    assert trained["vit-gated-7"]["pictures"] == str(tmp_path / "data" / "vit" / "train")
    assert trained["bert-clipped-7"]["softmax"] == "clipped(-0.03:1)"
    assert (
        "| vit (top1) | vanilla | 20.00 | 4.00 | 4.00 | 4.00 | 30.00 | 30.00 | 30.00 | 30.00 | 30.00 |"
        in made.splitlines()
    )
    assert [len(recipe.quantize) for recipe in recipes] == [1, 1, 1, 1, 0] * 6
    six = [recipe.quantize["mlm"].params for recipe in recipes if recipe.name == "bert-gated-7-w6a6"]
    assert six == [{"weights": "mse", "weight_bits": 6, "activation_bits": 6}]
    assert (tmp_path / "curves-full.png").read_bytes().startswith(b"\x89PNG")
    assert {recipe.bars.cosine(role) for recipe in recipes for role in ("image", "text")} == {-1.0}
    changed = {"vit": once.nets["vit"].model_copy(update={"quantizer": {"percentile": 99.9}})}
    monkeypatch.setattr(demonstration, "load", lambda name: once.model_copy(update={"nets": changed}))
    demonstrate("full", tmp_path, jobs=1, log=lambda line: None)
    assert (len(trainings), len(recipes)) == (7, 45)  # the same nets, and other figures


def test_every_recorded_run_belongs_to_a_command_that_the_page_shows_and_that_parses(monkeypatch, capsys):
    root = Path(__file__).parents[3]
    page = (root / "docs" / "demonstration.md").read_text(encoding="utf-8")
    shown = {*re.findall(r"`calmclip demonstrate ([\w.-]+)`", page)}
    asked = []
    monkeypatch.setattr(demonstration, "demonstrate", lambda recipe, *_, **__: asked.append(recipe) or "")
    monkeypatch.setattr(
        demonstration, "results_file", lambda recipe, out: root / "docs/demonstration/results-full.json"
    )
    for recipe in sorted(shown):
        assert main(["demonstrate", recipe, "--json"]) == 0
    assert {*asked} == shown == {*shipped()}
    runs = {run.name: run for recipe in shown for run in runs_of(load(recipe))}
    assert {file.stem for file in (root / "docs" / "demonstration").glob("*.jsonl")} <= runs.keys()


def test_a_name_of_two_recipes_is_the_same_net_and_every_setting_is_valid():
    settings: dict[str, dict] = {}
    for recipe in map(load, shipped()):
        for run in runs_of(recipe):
            given = {**run.net.training, **run.net.variants[run.variant], "seed": run.seed}
            assert settings.setdefault(run.name, given) == given
            inputs = dict.fromkeys(FAMILIES[run.family].inputs, "somewhere")
            training(**given | inputs)
    starts = {given["start"] for given in settings.values() if "start" in given}
    assert {f"{start}-0" for start in starts} <= settings.keys()


def test_a_recipe_that_is_none_says_what_there_is(tmp_path):
    with pytest.raises(BadRequest, match=r"no recipe 'narow'; did you mean 'narrow'"):
        load("narow")
    (tmp_path / "mine.toml").write_text("seeds = [0]\nsummary = 'mine'\nnets = {}\n")
    with pytest.raises(BadRequest, match=r"mine\.toml: nets: "):
        load(str(tmp_path / "mine.toml"))


def test_crops_that_are_measured_on_overlap_none_that_are_trained_on(tmp_path, monkeypatch):
    """Each column of the photograph has a grey of its own, so a crop shows where it was."""
    ramp = np.repeat(np.arange(240, dtype=np.uint8)[None], 200, axis=0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    monkeypatch.setattr(demonstration.samples, "pictures", lambda: [tmp_path / "ramp.png"])
    monkeypatch.setattr(demonstration.samples, "calibration_pictures", list)
    FAMILIES["crops"].prepare(tmp_path / "crops", PICTURES, None)
    shown = {
        part: [np.asarray(Image.open(file)) for file in (tmp_path / "crops" / part / "ramp").iterdir()]
        for part in ("train", "held")
    }
    assert (len(shown["train"]), len(shown["held"])) == (200, 20)
    assert {crop.shape for crops in shown.values() for crop in crops} == {(32, 32, 3)}
    assert max(crop.max() for crop in shown["train"]) <= 192 <= min(crop.min() for crop in shown["held"])


@pytest.mark.parametrize(
    ("recipe", "spread", "alpha"),
    [("demo", 0.05, 1.9), ("narrow", 0.02, 1.0), ("alpha-3.2", 0.05, 3.2), ("contrast", 0.02, 1.25)],
)
def test_nets_are_clipped_at_the_alpha_that_the_page_states(recipe, spread, alpha):
    """gamma = -alpha / length (arXiv 2306.12929); the rows have 64 tokens."""
    net = load(recipe).nets["bert"]
    (clipped,) = [name for name in net.variants if name.startswith("clipped")]
    settings = training(**{**net.training, **net.variants[clipped], "text": "texts.txt"})
    gamma, zeta = re.fullmatch(r"clipped\((.+):(.+)\)", settings.softmax).groups()
    assert (settings.length, settings.spread, float(zeta)) == (64, spread, 1)
    assert -float(gamma) * 64 == pytest.approx(alpha, abs=0.05)


@pytest.mark.slow
def test_the_whole_of_it_small(tmp_path, monkeypatch):
    words = ["red", "green", "blue", "cat", "dog", "fish", "sits", "runs", "on", "under", "the", "a", "mat", ".", ","]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 14)) for _ in range(3000)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    size = {"layers": 2, "width": 32, "heads": 2, "steps": 30, "every": 10, "batch": 8, "warmup": 5}
    nets = {
        name: net.model_copy(
            update={"training": {**net.training, **size, **({"words": 400} if "text" in inputs else {})}}
        )
        for recipe in ("full", "opt", "crops")
        for name, net in load(recipe).nets.items()
        for inputs in [FAMILIES[name].inputs]
    }
    few: dict[str, dict] = {
        "bert": {"vanilla": {}, "tuned": {"start": "bert-vanilla", "gate": "linear"}},
        "opt": {"gated": {"gate": "all_heads"}},
    }
    nets = {name: net.model_copy(update={"variants": few.get(name, {"vanilla": {}})}) for name, net in nets.items()}
    small = Recipe(summary="small", seeds=(0,), nets=nets)
    monkeypatch.setattr(demonstration, "load", lambda name: small)
    monkeypatch.setattr(demonstration, "CROPS", 10)
    monkeypatch.setattr(demonstration, "ROWS", 64)
    monkeypatch.setattr(demonstration, "CALIBRATION", 64)
    ends = {name: demonstration.QUANTIZED[name] for name in ("w8a8", "default")}  # the others differ in one setting
    monkeypatch.setattr(demonstration, "QUANTIZED", ends)
    lines: list[str] = []
    made = demonstrate("full", tmp_path / "out", text=tmp_path / "texts.txt", log=lines.append)
    results = json.loads((tmp_path / "out" / "results-full.json").read_text())
    assert len(results) == 5
    assert len(made.splitlines()) == 7
    assert all(run["steps"] == 30 and run["max_inf_norm"] > 0 for run in results.values())
    assert 5 < results["bert-vanilla-0"]["float"] < 400
    begun, out = len(lines), tmp_path / "out"
    trained = {run: (out / "checkpoints" / run / "training.pt").stat().st_mtime for run in results}
    again = demonstrate("full", tmp_path / "out", text=tmp_path / "texts.txt", log=lines.append)
    assert again == made
    assert not [line for line in lines[begun:] if "measuring" in line]
    assert {run: (out / "checkpoints" / run / "training.pt").stat().st_mtime for run in results} == trained


@pytest.mark.parametrize("many", [1, 20])
def test_a_text_that_is_too_little_is_named(many, tmp_path):
    (tmp_path / "few.txt").write_text("one cat and two dogs and so on\n" * many)
    with pytest.raises(BadRequest, match=r"few\.txt is too short to train on and to hold out 2 %: the texts have"):
        FAMILIES["bert"].prepare(tmp_path / "bert", NARROW, tmp_path / "few.txt")


def test_data_of_one_text_are_not_taken_for_those_of_another(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {n} {'cats ' * 60}\n" for n in range(200)))
    FAMILIES["bert"].prepare(tmp_path / "bert", NARROW, tmp_path / "one.txt")
    FAMILIES["bert"].prepare(tmp_path / "bert", NARROW, tmp_path / "one.txt")
    with pytest.raises(BadRequest, match=r"of .*one.txt, 4096 tokens, rows of 64, not of .*two.txt.*; choose"):
        FAMILIES["bert"].prepare(tmp_path / "bert", NARROW, tmp_path / "two.txt")


def test_digits_that_were_interrupted_are_made_anew(tmp_path, monkeypatch):
    left = []

    def interrupted(self, file):
        left.append(file)
        if len(left) == 40:
            raise KeyboardInterrupt

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FAMILIES["vit"].prepare(tmp_path / "vit", PICTURES, None)
    monkeypatch.setattr(Image.Image, "save", save)
    FAMILIES["vit"].prepare(tmp_path / "vit", PICTURES, None)
    assert len([*tmp_path.glob("vit/*/*/*.png")]) == 1797
