"""`calmclip demonstrate`: trains vanilla, clipped and gated nets side by side and quantizes them as in the paper.

    demo       a net of BERT's kind, one seed
    full       nets of BERT's and ViT's kind, three seeds
    narrow     demo with weights drawn at BERT's own 0.02, clipped with alpha 1
    alpha-3.2  demo's clipped net with the paper's alpha

One directory holds all files: the data, a directory per training, a bundle per net, results-RECIPE.json and
table-RECIPE.md. An interrupted run resumes from it.

Texts: the Collaborative International Dictionary of English (GCIDE, GPL-2 or later), from Debian's package dict-gcide,
or any file with one document a line. Pictures: scikit-learn's handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0),
enlarged, one class per digit.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), tables 1 and 2; the table has their columns.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from calmclip.export.checkpoints.files import require_package
from calmclip.export.training.data import SPECIAL, rows, word_pieces
from calmclip.models.bundle.manifest import REPORT
from calmclip.models.datasets import lines
from calmclip.models.errors import BadRequest, ExportError

Log = Callable[[str], None]
PACKAGE, DICTIONARY = "dict-gcide", Path("usr/share/dictd/gcide.dict.dz")
ROWS, CALIBRATION = 512, 512  # held-out rows to measure on; 16 batches of 32 rows, as in the paper


@dataclass(frozen=True)
class Family:
    """``training``: settings of all variants. ``variants``: name -> other settings. ``metric``: an eval, its figure."""

    role: str
    training: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    metric: tuple[str, str]


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    # alpha is 1.9 at 64 tokens. The paper's 3.2 clips most probabilities of a narrow untrained net to 0, where no
    # gradient passes, so learning starts a thousand steps later
    "clipped": {"softmax": "clipped(-0.03:1)"},
    "gated": {"gate": "linear"},
}
_NARROW = {"spread": 0.02}
NARROW: dict[str, dict[str, Any]] = {
    "vanilla-narrow": _NARROW,
    "clipped-narrow": {**_NARROW, "softmax": "clipped(-0.015:1)"},  # alpha 1
    "gated-narrow": {**_NARROW, "gate": "linear"},
}
ALPHA: dict[str, dict[str, Any]] = {"clipped-alpha-3.2": {"softmax": "clipped(-0.05:1)"}}
WIDTHS: dict[str, dict[str, Any]] = {  # bits of weights and activations -> params of the quantizer `paper`
    "w8a8": {},
    "w6a8": {"weights": "mse", "weight_bits": 6},
    "w4a8": {"weights": "mse", "weight_bits": 4},
}
# spread: wider than BERT's 0.02, which suits nets that are six times as wide
_LOOP = {"spread": 0.05, "batch": 32, "rate": 2e-3, "warmup": 400, "decay": 0.1, "bfloat16": True}
FAMILIES = {
    "bert": Family(
        "mlm",
        {"objective": "mlm", "layers": 6, "width": 128, "heads": 4, "length": 64, "words": 4096, "masked": 0.3,
         "steps": 6000, **_LOOP},
        {**VARIANTS, **NARROW, **ALPHA},
        ("perplexity", "perplexity"),
    ),
    "vit": Family(
        "logits",
        {"objective": "classes", "layers": 6, "width": 96, "heads": 4, "side": 32, "patch": 4, "steps": 3000, **_LOOP},
        VARIANTS,
        ("top1", "top1"),
    ),
}  # fmt: skip
# recipe -> the variants of each family, and the seeds
RECIPES: dict[str, tuple[Mapping[str, Collection[str]], Sequence[int]]] = {
    "demo": ({"bert": VARIANTS}, (0,)),
    "full": ({"bert": VARIANTS, "vit": VARIANTS}, (0, 1, 2)),
    "narrow": ({"bert": NARROW}, (0,)),
    "alpha-3.2": ({"bert": ALPHA}, (0,)),
}


@dataclass(frozen=True)
class Run:
    family: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}-{self.seed}"


def runs_of(recipe: str) -> list[Run]:
    families, seeds = RECIPES[recipe]
    return [Run(family, variant, seed) for seed in seeds for family in families for variant in families[family]]


def results_file(recipe: str, out: Path) -> Path:
    return out / f"results-{recipe}.json"


def demonstrate(recipe: str, out: Path, *, text: Path | None = None, jobs: int | None = None, log: Log = print) -> str:
    """-> the table, as Markdown. ``text`` replaces the dictionary. ``jobs``: concurrent trainings, one thread each."""
    runs = runs_of(recipe)
    data = out / "data"
    for family in RECIPES[recipe][0]:
        log(f"{family}: data")
        PREPARED[family](data / family, text)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:  # each thread waits for a process
        for run in pool.map(lambda run: _train(run, data, out), runs):
            log(f"{run.name}: trained")
    results = {}
    for run in runs:
        log(f"{run.name}: quantizing and measuring")
        results[run.name] = _measure(run, data / run.family, out)
        results_file(recipe, out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    markdown = table(runs, results)
    (out / f"table-{recipe}.md").write_text(f"# Demonstration `{recipe}`\n\n{markdown}", encoding="utf-8")
    return markdown


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


def _texts(directory: Path, text: Path | None) -> None:
    """Write train.txt, tokenizer.json, calibration.txt from the training rows, and held/texts.txt from the other rows.

    Raises `BadRequest` if ``text`` is too short, or if ``directory`` holds data of another text.
    """
    record, source = directory / "source.txt", str(text.resolve()) if text else PACKAGE
    if (directory / "held" / "texts.txt").is_file():
        if record.is_file() and (recorded := record.read_text(encoding="utf-8")) != source:
            raise BadRequest(f"{directory} holds data of {recorded}, not of {source}; choose another --out")
        return
    (directory / "held").mkdir(parents=True, exist_ok=True)
    entries = lines(text) if text else [*dictionary(directory)]
    cut = int(len(entries) * 0.98)
    train, held = entries[:cut], entries[cut:]
    (directory / "train.txt").write_text("".join(f"{entry}\n" for entry in train), encoding="utf-8")
    settings = FAMILIES["bert"].training
    tokenizer = word_pieces(train, settings["words"])
    tokenizer.save(str(directory / "tokenizer.json"))
    record.write_text(source, encoding="utf-8")
    draw, start, end = np.random.default_rng(0), SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    for file, entries, count in (("calibration.txt", train, CALIBRATION), ("held/texts.txt", held, ROWS)):
        try:
            ids = rows(entries, tokenizer, settings["length"], start, end)
        except BadRequest as error:
            raise BadRequest(f"{text or PACKAGE} is too short to train on and to hold out 2 %: {error}") from None
        drawn = ids[draw.choice(len(ids), min(count, len(ids)), replace=False), 1:-1].tolist()
        texts = tokenizer.decode_batch(drawn, skip_special_tokens=False)
        (directory / file).write_text("".join(f"{line}\n" for line in texts), encoding="utf-8")


def _digits(directory: Path, text: Path | None) -> None:
    """Write train/CLASS/*.png and held/CLASS/*.png: scikit-learn's 8 x 8 digits at four times the size."""
    if (directory / "held").is_dir():
        return
    digits = require_package("sklearn.datasets", "the set of digits", "demonstration").load_digits()
    fresh = directory.with_name(f"{directory.name}.new")  # renamed when it is complete
    for incomplete in (fresh, directory):
        shutil.rmtree(incomplete, ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(digits.images))
    held = {*order[: len(order) // 5].tolist()}
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = fresh / ("held" if number in held else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(folder / f"{number:04}.png")
    fresh.rename(directory)


PREPARED: dict[str, Callable[[Path, Path | None], None]] = {"bert": _texts, "vit": _digits}


def _train(run: Run, data: Path, out: Path) -> Run:
    """Train in another process, whose output goes into training.out. A finished training is not repeated."""
    family = FAMILIES[run.family]
    directory, data = out / "checkpoints" / run.name, data / run.family
    settings = {**family.training, **family.variants[run.variant], "seed": run.seed}
    if run.family == "bert":
        settings |= {"text": str(data / "train.txt"), "tokenizer": str(data / "tokenizer.json")}
    else:
        settings |= {"pictures": str(data / "train")}
    directory.mkdir(parents=True, exist_ok=True)
    file, toml, output = directory / "settings.toml", tomli_w.dumps(settings), directory / "training.out"
    if (directory / "config.json").is_file() and file.read_text(encoding="utf-8") == toml:
        return run
    file.write_text(toml, encoding="utf-8")
    options = ["--settings", str(file), "--out", str(directory), "--threads", "1"]
    command = [sys.executable, "-m", "calmclip.models.cli", "train", settings["objective"], *options]
    with output.open("a") as stream:
        status = subprocess.run(command, check=False, stdout=stream, stderr=stream).returncode
    if status:
        last = output.read_text(errors="replace").strip().splitlines()[-1:]
        raise ExportError(f"{run.name}: the training failed ({''.join(last)}); see {output}")
    return run


def _measure(run: Run, data: Path, out: Path) -> dict[str, Any]:
    """Export with the paper's quantizer, without bars, once for each of `WIDTHS`; -> the figures of the table."""
    from calmclip.export.pipeline import build
    from calmclip.export.recipe import load_recipe, recognise

    family, checkpoint = FAMILIES[run.family], out / "checkpoints" / run.name
    eval_name, figure = family.metric
    calibration = {"texts": data / "calibration.txt"} if run.family == "bert" else {"images": data / "train"}
    net_name, plugin = recognise(str(checkpoint))
    figures: dict[str, Any] = {}
    for width, params in WIDTHS.items():
        net = plugin.load(str(checkpoint))
        recipe = load_recipe(
            str(checkpoint), net_name, net,
            name=f"{run.name}-{width}", replace=True, quantize={family.role: {"name": "paper", "params": params}},
            calibration={**calibration, "count": CALIBRATION, "seed": run.seed}, evals={eval_name: data / "held"},
            bars={"min_output_cosine": -1.0, "min_text_cosine": -1.0, "min_image_cosine": -1.0},
        )  # fmt: skip
        sealed = build(recipe, out / "bundles", net=net, release=True)
        report = json.loads((sealed[0].directory / REPORT).read_text(encoding="utf-8"))
        sides, graph = report["accuracy"][eval_name], report["graphs"][family.role]
        figures |= {"float": sides["float32"][figure], width: sides["int8"][figure]}
        if width == "w8a8":
            keys = ("max_inf_norm", "avg_kurtosis", "max_kurtosis", "worst")
            figures |= {key: graph["outliers"][key] for key in keys} | {"bundle": sealed[0].manifest.name}
    trained = json.loads((checkpoint / "training.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {**figures, "seconds": trained["seconds"], "steps": trained["step"]}


def table(runs: Sequence[Run], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The mean over seeds and, for several seeds, the standard deviation."""
    keys = ("float", "max_inf_norm", "avg_kurtosis", "max_kurtosis", *WIDTHS)
    names = [key.upper() if key in WIDTHS else key.replace("_", " ") for key in keys]
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
