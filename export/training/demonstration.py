"""`calmclip demonstrate`: vanilla, clipped and gated nets, trained side by side and quantized as the paper does.

    demo    a net of BERT's kind, one seed
    full    nets of BERT's and ViT's kind, three seeds

Everything lies under one directory and is gone on with where it was interrupted: the data, a directory for each
training, a bundle for each net, results.json, table.md.

Texts: the Collaborative International Dictionary of English (GCIDE, GPL-2 or later), out of Debian's package
dict-gcide; or any file with one document a line. Pictures: scikit-learn's handwritten digits (Alpaydin and Kaynak 1998,
CC BY 4.0), made larger, one class each.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), tables 1 and 2, whose columns the table has.
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
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from calmclip.export.checkpoints.files import require_package
from calmclip.export.training.data import rows, word_pieces
from calmclip.models.datasets import lines
from calmclip.models.errors import BadRequest, ExportError

Say = Callable[[str], None]
PACKAGE, DICTIONARY = "dict-gcide", Path("usr/share/dictd/gcide.dict.dz")
ROWS, CALIBRATION = 512, 512  # held-out rows that are measured on; 16 batches of 32 rows, as the paper calibrates


@dataclass(frozen=True)
class Family:
    """``training``: of every variant; ``variants``: name -> what differs; ``metric``: an eval and its figure."""

    role: str
    training: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    metric: tuple[str, str]


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    # alpha is 1.9 at 64 tokens: at the paper's 3.2 most chances of an untrained net this narrow are clipped to 0, where
    # no gradient passes, and it starts a thousand steps later
    "clipped": {"softmax": "clipped(-0.03:1)"},
    "gated": {"gate": "linear"},
}
WIDTHS: dict[str, dict[str, Any]] = {  # of weights and activations in bits: params of the quantizer `paper`
    "w8a8": {},
    "w6a8": {"weights": "mse", "weight_bits": 6},
    "w4a8": {"weights": "mse", "weight_bits": 4},
}
# weights drawn wider than BERT's 0.02, which is meant for nets six times as wide
_LOOP = {"spread": 0.05, "batch": 32, "rate": 2e-3, "warmup": 400, "decay": 0.1, "bfloat16": True}
FAMILIES = {
    "bert": Family(
        "mlm",
        {"objective": "mlm", "layers": 6, "width": 128, "heads": 4, "length": 64, "words": 4096, "masked": 0.3,
         "steps": 6000, **_LOOP},
        VARIANTS,
        ("perplexity", "perplexity"),
    ),
    "vit": Family(
        "logits",
        {"objective": "classes", "layers": 6, "width": 96, "heads": 4, "side": 32, "patch": 4, "steps": 3000, **_LOOP},
        VARIANTS,
        ("top1", "top1"),
    ),
}  # fmt: skip
RECIPES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "demo": (("bert",), (0,)),
    "full": (("bert", "vit"), (0, 1, 2)),
}


@dataclass(frozen=True)
class Run:
    family: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}-{self.seed}"


def demonstrate(recipe: str, out: Path, *, text: Path | None = None, jobs: int | None = None, say: Say = print) -> str:
    """-> the table, as Markdown. ``text``: in place of the dictionary; ``jobs``: trainings at a time, a thread each."""
    families, seeds = RECIPES[recipe]
    runs = [
        Run(family, variant, seed) for seed in seeds for family in families for variant in FAMILIES[family].variants
    ]
    data = out / "data"
    for family in families:
        say(f"{family}: data")
        PREPARED[family](data / family, text)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:  # each waits for a process of its own
        for run in pool.map(lambda one: _train(one, data, out), runs):
            say(f"{run.name}: trained")
    found = {}
    for run in runs:
        say(f"{run.name}: quantizing and measuring")
        found[run.name] = _measure(run, data / run.family, out)
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    made = table(runs, found)
    (out / "table.md").write_text(made, encoding="utf-8")
    return made


def dictionary(directory: Path, root: Path = Path("/")) -> Iterator[str]:
    """The entries of GCIDE, white space joined; ``root``: where it may be installed.

    Raises `BadRequest` where the package is not to be had.
    """
    place = root / DICTIONARY
    if not place.is_file():
        place = directory / DICTIONARY
    if not place.is_file():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise BadRequest(f"there is no Debian package {PACKAGE} to be had here; give --text, one document a line")
        directory.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=directory, check=True, capture_output=True)
            (package,) = directory.glob(f"{PACKAGE}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package.resolve()), str(directory)], check=True, capture_output=True)
        except (subprocess.CalledProcessError, ValueError) as error:
            why = getattr(error, "stderr", b"").decode(errors="replace").strip() or error
            raise BadRequest(f"{PACKAGE} cannot be fetched ({why}); give --text, one document a line") from None
    with gzip.open(place, "rt", encoding="utf-8", errors="replace") as stream:
        whole = stream.read()
    for entry in re.split(r"\n(?=\S)", whole):
        joined = " ".join(entry.split())
        if len(joined) > 60:
            yield joined


def _texts(directory: Path, text: Path | None) -> None:
    """train.txt, tokenizer.json, calibration.txt of the trained rows, held/texts.txt of the others.

    Raises `BadRequest` where ``text`` is too little, or not what the data that lie there were made of.
    """
    told, source = directory / "source.txt", str(text.resolve()) if text else PACKAGE
    if (directory / "held" / "texts.txt").is_file():
        if told.is_file() and (made_of := told.read_text(encoding="utf-8")) != source:
            raise BadRequest(f"{directory} holds data of {made_of}, not of {source}; choose another --out")
        return
    (directory / "held").mkdir(parents=True, exist_ok=True)
    entries = lines(text) if text else [*dictionary(directory)]
    cut = int(len(entries) * 0.98)
    train, held = entries[:cut], entries[cut:]
    (directory / "train.txt").write_text("".join(f"{one}\n" for one in train), encoding="utf-8")
    size = FAMILIES["bert"].training
    made = word_pieces(train, size["words"])
    made.save(str(directory / "tokenizer.json"))
    told.write_text(source, encoding="utf-8")
    draw = np.random.default_rng(0)
    for file, of, count in (("calibration.txt", train, CALIBRATION), ("held/texts.txt", held, ROWS)):
        start, end = (made.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        try:
            found = rows(of, made, size["length"], start, end)
        except BadRequest as error:
            raise BadRequest(f"{text or PACKAGE} is too little to train on and hold 2 % out: {error}") from None
        found = found[draw.choice(len(found), min(count, len(found)), replace=False)]
        texts = [made.decode([int(one) for one in row[1:-1]], skip_special_tokens=False) for row in found]
        (directory / file).write_text("".join(f"{one}\n" for one in texts), encoding="utf-8")


def _digits(directory: Path, text: Path | None) -> None:
    """train/CLASS/*.png, held/CLASS/*.png: scikit-learn's 8 x 8 digits at four times the size."""
    if (directory / "held").is_dir():
        return
    found = require_package("sklearn.datasets", "the set of digits", "demonstration").load_digits()
    fresh = directory.with_name(f"{directory.name}.new")  # renamed when all is there
    for left in (fresh, directory):  # by whom was interrupted
        shutil.rmtree(left, ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(found.images))
    held = {*order[: len(order) // 5].tolist()}
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        folder = fresh / ("held" if number in held else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(folder / f"{number:04}.png")
    fresh.rename(directory)


PREPARED: dict[str, Callable[[Path, Path | None], None]] = {"bert": _texts, "vit": _digits}


def _train(run: Run, data: Path, out: Path) -> Run:
    """In a process of its own, whose words go into a file; none where it is done already."""
    family = FAMILIES[run.family]
    directory, at = out / "checkpoints" / run.name, data / run.family
    given = {**family.training, **family.variants[run.variant], "seed": run.seed}
    if run.family == "bert":
        given |= {"text": str(at / "train.txt"), "tokenizer": str(at / "tokenizer.json")}
    else:
        given |= {"pictures": str(at / "train")}
    directory.mkdir(parents=True, exist_ok=True)
    settings, said = directory / "settings.toml", tomli_w.dumps(given)
    if (directory / "config.json").is_file() and settings.read_text(encoding="utf-8") == said:
        return run
    settings.write_text(said, encoding="utf-8")
    how = ["--settings", str(settings), "--out", str(directory), "--threads", "1"]
    command = [sys.executable, "-m", "calmclip.models.cli", "train", given["objective"], *how]
    with (directory / "training.out").open("a") as words:
        done = subprocess.run(command, check=False, stdout=words, stderr=words)
    if done.returncode:
        last = (directory / "training.out").read_text(errors="replace").strip().splitlines()[-1:]
        raise ExportError(f"{run.name}: the training failed: {''.join(last)}")
    return run


def _measure(run: Run, data: Path, out: Path) -> dict[str, Any]:
    """Exported by the paper's quantizer, no bar set, once for each of `WIDTHS`; -> the figures of the table."""
    from calmclip.export.pipeline import build
    from calmclip.export.recipe import load_recipe, recognise

    family, checkpoint = FAMILIES[run.family], out / "checkpoints" / run.name
    measured, figure = family.metric
    calibration = {"texts": data / "calibration.txt"} if run.family == "bert" else {"images": data / "train"}
    net_name, plugin = recognise(str(checkpoint))
    found: dict[str, Any] = {}
    for width, params in WIDTHS.items():
        net = plugin.load(str(checkpoint))
        recipe = load_recipe(
            str(checkpoint), net_name, net,
            name=f"{run.name}-{width}", replace=True, quantize={family.role: {"name": "paper", "params": params}},
            calibration={**calibration, "count": CALIBRATION, "seed": run.seed}, evals={measured: data / "held"},
            bars={"min_output_cosine": -1.0, "min_text_cosine": -1.0, "min_image_cosine": -1.0},
        )  # fmt: skip
        sealed = build(recipe, out / "bundles", net=net, release=True)
        report = json.loads((sealed[0].directory / "report.json").read_text(encoding="utf-8"))
        sides, graph = report["accuracy"][measured], report["graphs"][family.role]
        found |= {"float": sides["float32"][figure], width: sides["int8"][figure]}
        if width == "w8a8":
            outliers = {
                key: graph["outliers"][key] for key in ("max_inf_norm", "avg_kurtosis", "max_kurtosis", "worst")
            }
            found |= {**outliers, "bundle": sealed[0].manifest.name}
    trained = json.loads((checkpoint / "training.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {**found, "seconds": trained["seconds"], "steps": trained["step"]}


def table(runs: Sequence[Run], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean over seeds, and deviation where there are several."""
    keys = ("float", "max_inf_norm", "avg_kurtosis", "max_kurtosis", *WIDTHS)
    names = [key.upper() if key in WIDTHS else key.replace("_", " ") for key in keys]
    head = ("net", "attention", *names)
    lines_ = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for family, variant in dict.fromkeys((run.family, run.variant) for run in runs):
        own = [found[run.name] for run in runs if (run.family, run.variant) == (family, variant)]
        figure = FAMILIES[family].metric[1]
        cells = [_spread([one[key] for one in own]) for key in keys]
        lines_.append(f"| {family} ({figure}) | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines_) + "\n"


def _spread(values: Sequence[float]) -> str:
    middle = mean(values)
    digits = 2 if abs(middle) < 100 else 0
    return f"{middle:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
