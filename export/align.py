"""Trains the projections of the built-in dual encoder on pictures and the texts that belong to them.

The encoders stay frozen, so their features are computed once and a training takes a minute. Every step draws
pictures from each `Source`, one text for each, and asks every picture for its texts and every text for its
pictures among all that were drawn (symmetric InfoNCE; Radford et al. 2021, arXiv 2103.00020, figure 3). A
picture may have several right answers: a text counts as right when it *means* something the picture holds
(Khosla et al. 2020, arXiv 2004.11362), so "animal" is right for every dog of the batch. Runs with different
seeds start from the same weights and are averaged (Wortsman et al. 2022, arXiv 2203.05482).
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export.nets.mini import features
from calmclip.export.nets.mini.backbone import from_state
from calmclip.export.nets.mini.minilm import WIDTH
from calmclip.export.nets.mini.towers import FEATURE_LENGTH, SHIPPED, Heads, ImageHead
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.classifier import fill
from calmclip.models.cli import parser
from calmclip.models.datasets import FORM, read_captions
from calmclip.models.errors import BadRequest

PEOPLE = ("man", "woman", "child", "people", "boy", "girl")  # said of COCO's "person" in captions
NOTHING = -1  # pads rows of `Source.holds`


@dataclass(frozen=True)
class Source:
    """Pictures, texts, and which belong together.

    pictures [N, V, 1280] backbone features of V views; texts [M, K, 384] unit vectors of K wordings;
    draws: for each picture the texts it may be trained with (a repeated one is drawn more often);
    meanings [M]: what a text means, a number; holds [N, A]: what a picture holds, padded with `NOTHING`;
    share: how many of its pictures a step draws; chances [N]: how often each (None: all alike).
    """

    name: str
    pictures: Tensor
    texts: Tensor
    draws: Sequence[Sequence[int]]
    meanings: Tensor
    holds: Tensor
    share: int
    chances: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """``noise``: in standard deviations of a feature. ``text_rate``: the text projection starts near its goal."""

    steps: int = 600
    rate: float = 1e-3
    text_rate: float = 1e-4
    decay: float = 0.05
    dropout: float = 0.1
    noise: float = 0.3
    max_scale: float = 60.0
    soft: float = 0.3
    soft_temperature: float = 0.05
    seeds: int = 3


class Projections(nn.Module):
    """The part of the heads that learns: A, a, B, and the scale of the cosines."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.image = nn.Linear(heads.image_weight.shape[1], WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH, bias=False)
        self.image.load_state_dict({"weight": heads.image_weight, "bias": heads.image_bias})
        self.text.load_state_dict({"weight": heads.text_weight})
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, inputs: Tensor, texts: Tensor, max_scale: float) -> Tensor:
        """[b, 1664], centred texts [b, 384] -> logits [b, b], pictures in rows."""
        scale = self.log_scale.exp().clamp(max=max_scale)
        return scale * F.normalize(self.image(inputs), dim=-1) @ F.normalize(self.text(texts), dim=-1).T


def right(holds: Tensor, meanings: Tensor) -> Tensor:
    """holds [b, A], meanings [c] -> bool [b, c]: does picture b hold what text c means?"""
    return (holds[:, None, :] == meanings[None, :, None]).any(-1)


def targets(positive: Tensor, texts: Tensor, soft: float, temperature: float) -> Tensor:
    """Where each row's probability belongs: [b, b], rows sum to 1.

    ``1 - soft`` of it is shared equally by the right answers; ``soft`` goes to whatever text resembles the picture's
    own (texts [b, 384] unit rows, row i drawn for picture i), because "a dog in snow" is not wrong for another
    snowy dog. The teacher is the frozen text encoder (compare Andonian et al. 2022, arXiv 2204.02960).
    """
    share = positive.to(texts.dtype)
    share = share / share.sum(1, keepdim=True)
    return (1 - soft) * share + soft * F.softmax(texts @ texts.T / temperature, dim=-1) if soft else share


def loss(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean of both directions' cross-entropy. logits, rows, columns [b, b]: pictures in rows; columns transposed."""
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


class _Deck:
    """One source, ready to be drawn from: ConSE vectors worked out, texts centred, meanings made unique."""

    def __init__(self, source: Source, heads: Heads, head: ImageHead, offset: int) -> None:
        self.source = source
        self.standard = (source.pictures - heads.feature_mean) / heads.feature_std
        with torch.inference_mode():
            self.classes = torch.cat([head.inputs(part)[..., -WIDTH:] for part in source.pictures.split(512)])
        self.classes = self.classes.clone()
        self.texts = source.texts - heads.text_centre
        self.counts = torch.tensor([len(row) for row in source.draws])
        widest = int(self.counts.max())
        self.draws = torch.tensor([[row[i % len(row)] for i in range(widest)] for row in source.draws])
        self.meanings = source.meanings + offset
        self.holds = torch.where(source.holds == NOTHING, NOTHING, source.holds + offset)

    def draw(self, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> inputs [b, 1664], centred texts [b, 384], meanings [b], holds [b, A]; no picture twice."""
        count, views, _ = self.standard.shape
        chances = torch.ones(count) if self.source.chances is None else self.source.chances
        rows = torch.multinomial(chances, self.source.share, generator=generator)
        chance = torch.rand(3, len(rows), generator=generator)
        view = (chance[0] * views).long()
        text = self.draws[rows, (chance[1] * self.counts[rows]).long()]
        wording = (chance[2] * self.texts.shape[1]).long()
        standard = self.standard[rows, view]
        shaken = standard + noise * torch.randn(standard.shape, generator=generator)
        inputs = torch.cat([FEATURE_LENGTH * F.normalize(shaken, dim=-1), self.classes[rows, view]], dim=-1)
        return inputs, self.texts[text, wording], self.meanings[text], self.holds[rows]


def align(sources: Sequence[Source], start: Heads, training: Training, *, quiet: bool = False) -> tuple[Heads, dict]:
    """-> the heads with projections trained from those of ``start``, and what happened (scale, losses)."""
    head = ImageHead(start, from_state(backbone_state()).classifier)
    decks, offset = [], 0
    for source in sources:
        decks.append(_Deck(source, start, head, offset))
        offset += int(max(source.meanings.max(), source.holds.max())) + 1
    runs = [_run(decks, Projections(start), training, seed, quiet) for seed in range(training.seeds)]
    mean = {name: sum(run.state_dict()[name] for run, _ in runs) / len(runs) for name in runs[0][0].state_dict()}
    trained = replace(
        start, image_weight=mean["image.weight"], image_bias=mean["image.bias"], text_weight=mean["text.weight"]
    )
    first, last = np.mean([losses[:20] for _, losses in runs]), np.mean([losses[-20:] for _, losses in runs])
    scale = min(float(mean["log_scale"].exp()), training.max_scale)
    return trained, {"scale": round(scale, 3), "first_loss": round(float(first), 3), "last_loss": round(float(last), 3)}


def _run(
    decks: Sequence[_Deck], model: Projections, training: Training, seed: int, quiet: bool
) -> tuple[Projections, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout knows no generator
    slow = [model.text.weight]
    fast = [p for p in model.parameters() if p is not model.text.weight]
    groups = [{"params": fast, "lr": training.rate}, {"params": slow, "lr": training.text_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=training.steps)
    losses = []
    bar = tqdm(range(training.steps), f"seed {seed}", unit="step", disable=quiet)
    for _ in bar:
        drawn = [deck.draw(training.noise, generator) for deck in decks]
        inputs, texts, meanings = (torch.cat([one[part] for one in drawn]) for part in range(3))
        widest = max(holds.shape[1] for *_, holds in drawn)
        holds = torch.cat([F.pad(one[3], (0, widest - one[3].shape[1]), value=NOTHING) for one in drawn])
        logits = model(F.dropout(inputs, training.dropout), texts, training.max_scale)
        positive, teacher = right(holds, meanings), F.normalize(texts, dim=-1)
        rows, columns = (targets(p, teacher, training.soft, training.soft_temperature) for p in (positive, positive.T))
        value = loss(logits, rows, columns)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return model, losses


# Where sources come from


def captioned(pictures: Tensor, texts: Tensor, per_picture: Sequence[int], share: int = 256) -> Source:
    """Pictures [N, V, 1280] with ``per_picture`` captions each, their vectors [sum, 384] in order."""
    owner = torch.repeat_interleave(torch.arange(len(per_picture)), torch.tensor(per_picture))
    firsts = np.cumsum([0, *per_picture])
    draws = [range(first, first + count) for first, count in zip(firsts, per_picture, strict=False)]
    return Source(
        "captions",
        pictures,
        texts[:, None],
        draws,
        owner,
        torch.arange(len(per_picture))[:, None],
        min(share, len(per_picture)),
    )


def named(pictures: Tensor, classes: Sequence[int], names: dict[str, Any], texts: Tensor, share: int = 384) -> Source:
    """ImageNet pictures [N, V, 1280] with their class numbers; texts [M, K, 384]: each `bag_text` in K templates.

    A class is named by itself, by synonyms and by WordNet hypernyms; each is right for whatever it is above.
    """
    synsets = sorted({*names["bag_synset"], *(synset for row in names["ancestors"] for synset in row)})
    number = {synset: index for index, synset in enumerate(synsets)}
    above = [[number[synset] for synset in names["ancestors"][c]] for c in classes]
    return Source(
        "names",
        pictures,
        texts,
        [names["class_bag"][c] for c in classes],
        torch.tensor([number[synset] for synset in names["bag_synset"]]),
        padded(above),
        min(share, len(classes)),
    )


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ragged rows -> [N, longest], filled with `NOTHING`."""
    widest = max(map(len, rows))
    return torch.tensor([[*row, *[NOTHING] * (widest - len(row))] for row in rows])


def cropped(
    pictures: Tensor, categories: Sequence[int], means: Sequence[int], texts: Tensor, share: int = 96
) -> Source:
    """Pictures of single objects [N, V, 1280] and their categories; texts [M, K, 384] and the category each means."""
    draws = [[text for text, meant in enumerate(means) if meant == c] for c in categories]
    share = min(share, len(categories))
    owns = torch.tensor(categories)
    return Source("crops", pictures, texts, draws, torch.tensor(means), owns[:, None], share, balanced(owns))


def balanced(categories: Tensor) -> Tensor:
    """[N] -> chances [N] by which every category is drawn equally often, however many pictures it has.

    Otherwise the names of frequent objects come to lie near everything: "car" was the answer to most airplanes.
    """
    return 1 / torch.bincount(categories)[categories]


def fresh(pictures: Tensor, captions: Tensor, names: Tensor) -> Heads:
    """Heads to start from: features standardised over ``pictures`` [N, V, 1280], texts centred between captions
    and class names, the text projection the identity, and the image projection mostly the ConSE vector itself.
    """
    centre = (captions.mean(0) + names.mean(0)) / 2
    flat = pictures.flatten(0, 1)
    image = torch.zeros(WIDTH, flat.shape[1] + WIDTH)
    image[:, flat.shape[1] :] = torch.eye(WIDTH)
    nn.init.uniform_(image[:, : flat.shape[1]], -0.01, 0.01, generator=torch.Generator().manual_seed(0))
    return Heads(image, torch.zeros(WIDTH), torch.eye(WIDTH), centre, flat.mean(0), flat.std(0) + 1e-6, names - centre)


def recalls(heads: Heads, pictures: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Pictures [N, 1280], unit texts [M, 384], owner [M] -> R@1/5/10 of both directions in percent."""
    head = ImageHead(heads, from_state(backbone_state()).classifier)
    with torch.inference_mode():
        images = head(pictures)
        similar = images @ F.normalize((texts - heads.text_centre) @ heads.text_weight.T, dim=-1).T
    own = similar[owner, torch.arange(len(owner))]
    text_rank = (similar > own).sum(0)
    best = torch.full((len(pictures),), -2.0).scatter_reduce(0, owner, own, "amax")
    image_rank = (similar > best[:, None]).sum(1)
    return {
        f"{name}@{k}": round(100 * float((rank < k).float().mean()), 1)
        for name, rank in (("text_to_image", text_rank), ("image_to_text", image_rank))
        for k in (1, 5, 10)
    }


# The verb


def align_command(argv: list[str]) -> int:
    """`calmclip align --captions FILE --images DIR`: heads for the built-in model from your own pairs."""
    given = _parser().parse_args(argv)
    given.command = " ".join(["calmclip align", *argv])
    quiet = given.json or not sys.stderr.isatty()
    result = train(given, quiet)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"wrote {result['heads']}; loss {result['training']['first_loss']} -> {result['training']['last_loss']}")
        for name, value in result["held_out"].items():
            print(f"  {name:18s} {value}")
        where = given.out if given.out.is_absolute() else f"./{given.out}"  # "mini" alone is the built-in model
        print(f"export it with: calmclip export {where}")
    return 0


def train(given: argparse.Namespace, quiet: bool) -> dict[str, Any]:
    """Everything `align_command` does but printing."""
    captions = read_captions(given.captions)
    files = sorted(captions)
    if absent := [name for name in files if not (given.images / name).is_file()]:
        raise BadRequest(f"{len(absent)} of {len(files)} pictures are not in {given.images}, for example {absent[0]}")
    pictures = features.of_pictures([given.images / name for name in files], given.cache, quiet=quiet)
    sentences = [text for name in files for text in captions[name]]
    texts = features.of_texts(sentences, quiet=quiet)
    per_picture = [len(captions[name]) for name in files]
    owner = torch.repeat_interleave(torch.arange(len(files)), torch.tensor(per_picture))

    held = set(random.Random(0).sample(range(len(files)), min(given.held_out, len(files) // 2)))
    seen = [i for i in range(len(files)) if i not in held]
    keep = torch.tensor([int(o) not in held for o in owner])
    sources = [captioned(pictures[seen], texts[keep], [per_picture[i] for i in seen])]
    names = json.loads(given.names.read_text(encoding="utf-8")) if given.names else None
    sources += _extra(given, names, quiet) if names else []
    if given.fresh:
        if names is None:
            raise BadRequest("--fresh needs --names FILE: the class names of which the ConSE table is made")
        start = fresh(pictures[seen], texts[keep], features.of_texts(names["class_names"], quiet=quiet))
    else:
        start = Heads.load(given.start)
    training = Training(steps=given.steps, seeds=given.seeds)
    heads, happened = align(sources, start, training, quiet=quiet)

    result = {
        "heads": str(given.out / SHIPPED.name),
        "command": given.command,
        "data": {s.name: {"pictures": len(s.pictures), "texts": len(s.texts)} for s in sources},
        "settings": asdict(training),
        "training": happened,
        "held_out": {},
    }
    if held:
        order = sorted(held)
        place = {picture: row for row, picture in enumerate(order)}
        owners = torch.tensor([place[int(o)] for o in owner if int(o) in held])
        result["held_out"] = {"pictures": len(order), **recalls(heads, pictures[order, 0], texts[~keep], owners)}
    given.out.mkdir(parents=True, exist_ok=True)
    heads.save(given.out / SHIPPED.name, {"net": "mini", "scale": str(happened["scale"])})
    (given.out / "heads.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _extra(given: argparse.Namespace, names: dict[str, Any], quiet: bool) -> list[Source]:
    """The other sources of the shipped heads: ImageNet pictures by class, and COCO crops, as cached features."""
    found = []
    if given.name_views:
        cached = _cached(given.name_views)
        found.append(named(cached.features, cached.numbers, names, _worded(names["bag_text"], names, quiet)))
    if given.crops:
        cached, own = _cached(given.crops), names["coco_names"]
        texts = _worded([*own, *PEOPLE], names, quiet)
        means = [*range(len(own)), *[own.index("person")] * len(PEOPLE)]
        found.append(cropped(cached.features, cached.numbers, means, texts))
    return found


def _worded(labels: Sequence[str], names: dict[str, Any], quiet: bool) -> Tensor:
    """[M, K, 384]: each label in every training template."""
    templates = names["templates_train"]
    return torch.stack([features.of_texts([fill(t, x) for x in labels], quiet=quiet) for t in templates], 1)


@dataclass(frozen=True)
class _Cached:
    features: Tensor  # [N, V, 1280]
    numbers: list[int]  # class or category of each


def _cached(file: Path) -> _Cached:
    """An .npz of backbone features: ``q`` uint8 [N, 1280] or [N, V, 1280] times ``scale`` [1280], and numbers."""
    with np.load(file, allow_pickle=False) as data:
        found = torch.from_numpy(data["q"] * data["scale"])
        numbers = data["class_index"] if "class_index" in data else data["category"]
    return _Cached(found if found.ndim == 3 else found[:, None], numbers.tolist())


def _parser() -> argparse.ArgumentParser:
    options = parser("align", "Train the projections of the built-in model on your own captioned pictures.")
    options.add_argument("--captions", type=Path, required=True, help=f"JSON: {FORM}")
    options.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    options.add_argument(
        "--out", type=Path, default=Path("checkpoints/own"), help="folder for heads.safetensors (default %(default)s)"
    )
    options.add_argument("--start", type=Path, default=SHIPPED, help="heads to start from (default: those that ship)")
    options.add_argument("--fresh", action="store_true", help="start from nothing; needs --names")
    options.add_argument("--names", type=Path, help="JSON of class names, WordNet bags and templates")
    options.add_argument(
        "--name-views", type=Path, help=".npz of features of ImageNet pictures by class; needs --names"
    )
    options.add_argument("--crops", type=Path, help=".npz of features of COCO objects; needs --names")
    options.add_argument("--held-out", type=int, default=0, help="pictures kept from training, to measure recall on")
    options.add_argument("--steps", type=int, default=Training.steps)
    options.add_argument("--seeds", type=int, default=Training.seeds, help="runs that are averaged")
    options.add_argument("--cache", type=Path, help="folder that keeps the pictures' features for the next time")
    return options
