"""`calmclip demonstrate`: trains vanilla, clipped and gated nets side by side and quantizes them as the paper does.

`calmclip.export.training.recipes` has the recipes. One directory holds all files: the data; in `runs` the settings,
output and figures of each net; its checkpoint and bundles; results, table and curves of each recipe. An interrupted run
resumes from it. A net that was trained and measured is neither trained nor measured again, also for another recipe.

Texts: the Collaborative International Dictionary of English (GCIDE, GPL-2 or later), from Debian's package dict-gcide,
or any file with one document a line. Pictures: scikit-learn's handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0),
enlarged, one class per digit; or crops of the photographs that ship, one class per photograph.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), tables 1 and 2; the table has their columns.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from calmclip.export import samples
from calmclip.export.checkpoints.files import require_package
from calmclip.export.training.data import byte_pairs, rows, word_pieces
from calmclip.export.training.recipes import NetRecipe, Recipe, load
from calmclip.export.training.settings import LOG
from calmclip.models.bundle.manifest import REPORT
from calmclip.models.datasets import lines
from calmclip.models.errors import BadRequest, ExportError

Log = Callable[[str], None]
PACKAGE, DICTIONARY = "dict-gcide", Path("usr/share/dictd/gcide.dict.dz")
ROWS, CALIBRATION = 512, 512  # held-out rows to measure on; 16 batches of 32 rows, as in the paper
CROPS = 200  # of a photograph, to train on


# columns of the table: bits of weights and activations -> params of the quantizer `paper`; None is the quantizer that
# `calmclip export` takes by itself
QUANTIZED: dict[str, dict[str, Any] | None] = {
    "w8a8": {},
    "w6a8": {"weights": "mse", "weight_bits": 6},
    "w4a8": {"weights": "mse", "weight_bits": 4},
    "w6a6": {"weights": "mse", "weight_bits": 6, "activation_bits": 6},
    "default": None,
}
OUTLIERS = ("max_inf_norm", "avg_kurtosis", "max_kurtosis")  # columns of the table, and panels of the curves


@dataclass(frozen=True)
class Family:
    """``metric``: an eval, its figure. ``prepare`` writes the data of a net into a directory; it takes the text that
    replaces the dictionary. ``inputs``: settings, and the calibration's arguments, as paths below that directory."""

    role: str
    metric: tuple[str, str]
    prepare: Callable[[Path, NetRecipe, Path | None], None]
    inputs: Mapping[str, str]
    calibration: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One training. ``net``: of the recipe."""

    family: str
    variant: str
    seed: int
    net: NetRecipe

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}-{self.seed}"

    def file(self, out: Path, kind: str) -> Path:
        """Not in the checkpoint: a training that starts from it copies its files. ``kind``: toml, out or json."""
        return out / "runs" / f"{self.name}.{kind}"


def runs_of(recipe: Recipe) -> list[Run]:
    """In the order of the seeds, so that a stopped run has each variant once before any has two."""
    nets = recipe.nets.items()
    return [
        Run(family, variant, seed, net) for seed in recipe.seeds for family, net in nets for variant in net.variants
    ]


def label_of(recipe: str) -> str:
    """The part of file names that a recipe's name, or its file, stands for."""
    return Path(recipe).name.removesuffix(".toml")


def results_file(recipe: str, out: Path) -> Path:
    return out / f"results-{label_of(recipe)}.json"


def demonstrate(name: str, out: Path, *, text: Path | None = None, jobs: int | None = None, log: Log = print) -> str:
    """-> the table, as Markdown. ``name``: of a recipe. ``text`` replaces the dictionary. ``jobs``: concurrent
    trainings, one thread each.

    Raises `BadRequest`; `ExportError` if a training fails.
    """
    recipe = load(name)
    label = label_of(name)
    if unknown := recipe.nets.keys() - FAMILIES.keys():
        raise BadRequest(f"the recipe {name} has the net {min(unknown)!r}; expected {', '.join(FAMILIES)}")
    runs, data = runs_of(recipe), out / "data"
    for family, net in recipe.nets.items():
        log(f"{family}: data")
        FAMILIES[family].prepare(data / family, net, text)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:  # each thread waits for a process
        for follows in (False, True):  # a net that starts from another one waits for it
            now = [run for run in runs if follows == ("start" in run.net.variants[run.variant])]
            for run in pool.map(lambda run: _train(run, data, out), now):
                log(f"{run.name}: trained")
    results = {}
    for run in runs:
        results[run.name] = _figures(run, data / run.family, out, log)
        results_file(name, out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    markdown = table(runs, results)
    (out / f"table-{label}.md").write_text(f"# Demonstration `{label}`\n\n{markdown}", encoding="utf-8")
    draw_curves(runs, out, out / f"curves-{label}.png", label)
    return markdown


def draw_curves(runs: Sequence[Run], out: Path, file: Path, title: str) -> None:
    """Write a PNG of outliers and loss during the trainings in ``out``, a line for each net."""
    logs = {run.name: log_of(out / "checkpoints" / run.name) for run in runs}
    import_module("calmclip.export.chart").learning(logs, (*OUTLIERS, "loss"), file, title)


def log_of(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / LOG).read_text(encoding="utf-8").splitlines()]


def dictionary(directory: Path, root: Path = Path("/")) -> Iterator[str]:
    """The entries of GCIDE, white space joined. The package is read from ``root``, else downloaded to ``directory``.

    Raises `BadRequest` if it is not available.
    """
    file = root / DICTIONARY
    if not file.is_file():
        file = directory / DICTIONARY
    if not file.is_file():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise BadRequest(f"the Debian package {PACKAGE} is not available here; give --text, one document a line")
        directory.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=directory, check=True, capture_output=True)
            (package,) = directory.glob(f"{PACKAGE}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package.resolve()), str(directory)], check=True, capture_output=True)
        except (subprocess.CalledProcessError, ValueError) as error:
            reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or error
            raise BadRequest(f"{PACKAGE} cannot be downloaded ({reason}); give --text, one document a line") from None
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as stream:
        entries = re.split(r"\n(?=\S)", stream.read())
    for entry in entries:
        joined = " ".join(entry.split())
        if len(joined) > 60:
            yield joined


def _texts(directory: Path, net: NetRecipe, text: Path | None) -> None:
    """Write train.txt, tokenizer.json, calibration.txt from the training rows, and held/texts.txt from the other rows.

    Raises `BadRequest` if ``text`` is too short, or if ``directory`` holds other data.
    """
    length, words, causal = net.training["length"], net.training["words"], net.training["objective"] == "clm"
    record, source = directory / "source.txt", str(text.resolve()) if text else PACKAGE
    source = f"{source}, {words} tokens, rows of {length}"
    if (directory / "held" / "texts.txt").is_file():
        if record.is_file() and (recorded := record.read_text(encoding="utf-8")) != source:
            raise BadRequest(f"{directory} holds data of {recorded}, not of {source}; choose another --out")
        return
    (directory / "held").mkdir(parents=True, exist_ok=True)
    entries = lines(text) if text else [*dictionary(directory)]
    cut = int(len(entries) * 0.98)
    train, held = entries[:cut], entries[cut:]
    (directory / "train.txt").write_text("".join(f"{entry}\n" for entry in train), encoding="utf-8")
    tokenizer = (byte_pairs if causal else word_pieces)(train, words)
    tokenizer.save(str(directory / "tokenizer.json"))
    record.write_text(source, encoding="utf-8")
    ids_of = tokenizer.get_vocab()
    start, end, last = (ids_of["</s>"], None, None) if causal else (ids_of["[CLS]"], ids_of["[SEP]"], -1)
    draw = np.random.default_rng(0)
    for file, part, count in (("calibration.txt", train, CALIBRATION), ("held/texts.txt", held, ROWS)):
        try:
            ids = rows(part, tokenizer, length, start, end)
        except BadRequest as error:
            raise BadRequest(f"{text or PACKAGE} is too short to train on and to hold out 2 %: {error}") from None
        drawn = ids[draw.choice(len(ids), min(count, len(ids)), replace=False), 1:last].tolist()
        texts = tokenizer.decode_batch(drawn, skip_special_tokens=False)
        (directory / file).write_text("".join(f"{' '.join(line.split())}\n" for line in texts), encoding="utf-8")


def _digits(directory: Path, net: NetRecipe, text: Path | None) -> None:
    """Write train/CLASS/*.png and held/CLASS/*.png: scikit-learn's 8 x 8 digits at four times the size."""
    digits = require_package("sklearn.datasets", "the set of digits", "demonstration").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    held = {*order[: len(order) // 5].tolist()}
    side = (net.training["side"],) * 2

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            grey = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize(side, Image.Resampling.BICUBIC)
            yield f"{'held' if number in held else 'train'}/{label}/{number:04}.png", grey.convert("RGB")

    _write_pictures(directory, pictures)


def _crops(directory: Path, net: NetRecipe, text: Path | None) -> None:
    """Write train/CLASS/*.png and held/CLASS/*.png: crops of the photographs that ship, a class for each photograph.

    The photograph's lower fifth, or its right fifth if it is wide, is held out: no training crop overlaps it.
    """
    side, draw = net.training["side"], np.random.default_rng(0)

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for file in (*samples.pictures(), *samples.calibration_pictures()):
            with Image.open(file) as opened:
                photograph = opened.convert("RGB")
            photograph.thumbnail((8 * side, 8 * side))
            width, height = photograph.size
            across = width >= height
            border = int(0.8 * max(width, height))
            for part, count, ends in (
                ("train", CROPS, (0, border)),
                ("held", CROPS // 10, (border, max(width, height))),
            ):
                for number in range(count):
                    size = int(draw.integers(side, 2 * side))
                    size = min(size, ends[1] - ends[0], width, height)
                    along = int(draw.integers(ends[0], ends[1] - size + 1))
                    other = int(draw.integers(0, min(width, height) - size + 1))
                    x, y = (along, other) if across else (other, along)
                    crop = photograph.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + size, y + size))
                    yield f"{part}/{file.stem}/{number:04}.png", crop

    _write_pictures(directory, pictures)


def _write_pictures(directory: Path, pictures: Callable[[], Iterator[tuple[str, Image.Image]]]) -> None:
    """Write pictures below ``directory``, which appears when it is complete."""
    if (directory / "held").is_dir():
        return
    fresh = directory.with_name(f"{directory.name}.new")
    for incomplete in (fresh, directory):
        shutil.rmtree(incomplete, ignore_errors=True)
    for name, picture in pictures():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(fresh / name)
    fresh.rename(directory)


_TEXT = {"text": "train.txt", "tokenizer": "tokenizer.json"}
FAMILIES = {
    "bert": Family("mlm", ("perplexity", "perplexity"), _texts, _TEXT, {"texts": "calibration.txt"}),
    "opt": Family("lm", ("perplexity", "perplexity"), _texts, _TEXT, {"texts": "calibration.txt"}),
    "vit": Family("logits", ("top1", "top1"), _digits, {"pictures": "train"}, {"images": "train"}),
    "crops": Family("logits", ("top1", "top1"), _crops, {"pictures": "train"}, {"images": "train"}),
}


def _train(run: Run, data: Path, out: Path) -> Run:
    """Train in another process. A finished training is not repeated."""
    directory, paths = out / "checkpoints" / run.name, FAMILIES[run.family].inputs
    settings = {**run.net.training, **run.net.variants[run.variant], "seed": run.seed}
    settings |= {name: str(data / run.family / path) for name, path in paths.items()}
    if start := settings.get("start"):
        settings["start"] = str(out / "checkpoints" / f"{start}-{run.seed}")
        settings.pop("tokenizer", None)  # the checkpoint has it
        if not (out / "checkpoints" / f"{start}-{run.seed}" / "config.json").is_file():
            raise BadRequest(f"{run.name} starts from {start}-{run.seed}, which is not trained; run its recipe first")
    directory.mkdir(parents=True, exist_ok=True)
    file, toml, output = run.file(out, "toml"), tomli_w.dumps(settings), run.file(out, "out")
    if (directory / "config.json").is_file() and file.is_file() and file.read_text(encoding="utf-8") == toml:
        return run
    file.parent.mkdir(exist_ok=True)
    file.write_text(toml, encoding="utf-8")
    run.file(out, "json").unlink(missing_ok=True)
    options = ["--settings", str(file), "--out", str(directory), "--threads", "1"]
    command = [sys.executable, "-m", "calmclip.models.cli", "train", settings["objective"], *options]
    with output.open("a") as stream:
        status = subprocess.run(command, check=False, stdout=stream, stderr=stream).returncode
    if status:
        last = output.read_text(errors="replace").strip().splitlines()[-1:]
        raise ExportError(f"{run.name}: the training failed ({''.join(last)}); see {output}")
    return run


def _figures(run: Run, data: Path, out: Path, log: Log) -> dict[str, Any]:
    """The figures of the table: of the net's file if it has those of today's quantizers, else measured."""
    file, quantizers = run.file(out, "json"), {"columns": QUANTIZED, "paper": run.net.quantizer}
    if file.is_file() and (record := json.loads(file.read_text(encoding="utf-8")))["quantizers"] == quantizers:
        return dict(record["figures"])
    log(f"{run.name}: quantizing and measuring")
    figures = _measure(run, data, out)
    file.write_text(json.dumps({"quantizers": quantizers, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    return figures


def _measure(run: Run, data: Path, out: Path) -> dict[str, Any]:
    """Export without bars, once for each of `QUANTIZED`; -> the figures of the table."""
    from calmclip.export.pipeline import build
    from calmclip.export.recipe import load_recipe, recognise

    family, checkpoint = FAMILIES[run.family], out / "checkpoints" / run.name
    eval_name, figure = family.metric
    calibration = {name: data / path for name, path in family.calibration.items()}
    net_name, plugin = recognise(str(checkpoint))
    figures: dict[str, Any] = {}
    for column, params in QUANTIZED.items():
        net = plugin.load(str(checkpoint))
        quantize = {}
        if params is not None:
            quantize = {family.role: {"name": "paper", "params": {**run.net.quantizer, **params}}}
        recipe = load_recipe(
            str(checkpoint), net_name, net,
            name=f"{run.name}-{column}", replace=True, quantize=quantize,
            calibration={**calibration, "count": CALIBRATION, "seed": run.seed}, evals={eval_name: data / "held"},
            bars={"min_output_cosine": -1.0, "min_text_cosine": -1.0, "min_image_cosine": -1.0},
        )  # fmt: skip
        sealed = build(recipe, out / "bundles", net=net, release=True)
        report = json.loads((sealed[0].directory / REPORT).read_text(encoding="utf-8"))
        sides = report["accuracy"][eval_name]
        figures |= {"float": sides["float32"][figure], column: sides["int8"][figure]}
        if column == "w8a8":
            outliers = report["graphs"][family.role]["outliers"]
            figures |= {key: outliers[key] for key in (*OUTLIERS, "worst")} | {"bundle": sealed[0].manifest.name}
    trained = log_of(checkpoint)[-1]
    return {**figures, "seconds": trained["seconds"], "steps": trained["step"]}


def table(runs: Sequence[Run], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The mean over seeds and, for several seeds, the standard deviation."""
    keys = ("float", *OUTLIERS, *QUANTIZED)
    names = [key.replace("_", " ") if QUANTIZED.get(key) is None else key.upper() for key in keys]
    head = ("net", "attention", *names)
    lines_ = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for family, variant in dict.fromkeys((run.family, run.variant) for run in runs):
        seeds = [results[run.name] for run in runs if (run.family, run.variant) == (family, variant)]
        figure = FAMILIES[family].metric[1]
        cells = [_spread([figures[key] for figures in seeds]) for key in keys]
        lines_.append(f"| {family} ({figure}) | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines_) + "\n"


def _spread(values: Sequence[float]) -> str:
    middle = mean(values)
    digits = 2 if abs(middle) < 100 else 0
    return f"{middle:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
