"""Trains the projections of the built-in dual encoder on pictures and their texts.

The encoders stay frozen, so their features are computed once and a training takes a minute. Each step draws a batch
from each `Source`: pictures, and one text per picture. It matches all drawn pictures and texts in both directions
(symmetric InfoNCE; Radford et al. 2021, arXiv 2103.00020, figure 3). A picture may match several texts: a text matches
if its meaning is among those of the picture (Khosla et al. 2020, arXiv 2004.11362), so "animal" matches every dog of
the batch. Runs with different seeds start from the same weights and are averaged (Wortsman et al. 2022, arXiv
2203.05482).
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export.nets.mini import SHIPPED, features
from calmclip.export.nets.mini.backbone import frozen
from calmclip.export.nets.mini.facts import FEATURE_LENGTH, WIDTH
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.towers import Heads, ImageHead
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.classifier import fill
from calmclip.models.datasets import read_captions
from calmclip.models.errors import BadRequest

PEOPLE = ("man", "woman", "child", "people", "boy", "girl")  # words of captions for COCO's "person"
NOTHING = -1  # pads rows of `Source.holds`


@dataclass(frozen=True)
class Source:
    """Pictures, texts, and which of them match.

    pictures [N, V, 1280]: backbone features of V views. texts [M, K, 384]: unit vectors of K wordings.
    draws: per picture, the texts to draw from; a repeated text is drawn more often.
    meanings [M]: the number of a text's meaning. holds [N, A]: the meanings of a picture, padded with `NOTHING`.
    batch: pictures per step. weights [N]: of the draw of pictures; None draws all equally often.
    """

    name: str
    pictures: Tensor
    texts: Tensor
    draws: Sequence[Sequence[int]]
    meanings: Tensor
    holds: Tensor
    batch: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """``noise``: in standard deviations of a feature. ``text_rate`` is small, since the text projection starts near its
    goal. ``soft``, ``soft_temperature``: see `targets`."""

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
    """The part of the heads that is trained: A, a, B, and the scale of the cosines."""

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
    """holds [b, A], meanings [c] -> bool [b, c]: is the meaning of text c among those of picture b?"""
    return (holds[:, None, :] == meanings[None, :, None]).any(-1)


def targets(positive: Tensor, texts: Tensor, soft: float, temperature: float) -> Tensor:
    """The target probabilities [b, b]; rows sum to 1.

    The right answers share ``1 - soft`` equally. ``soft`` is spread by the similarity of texts to the picture's text
    (texts [b, 384] unit rows, row i drawn for picture i), because "a dog in snow" also fits another snowy dog. The
    teacher is the frozen text encoder (compare Andonian et al. 2022, arXiv 2204.02960).
    """
    hard = positive.to(texts.dtype)
    hard = hard / hard.sum(1, keepdim=True)
    return (1 - soft) * hard + soft * F.softmax(texts @ texts.T / temperature, dim=-1) if soft else hard


def loss(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The mean cross-entropy of both directions. logits, rows, columns [b, b]: pictures in rows; columns transposed."""
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


class _Deck:
    """One source with computed ConSE vectors, centred texts and meanings that are unique among sources."""

    def __init__(self, source: Source, heads: Heads, head: ImageHead, offset: int) -> None:
        self.source = source
        self.standard = (source.pictures - heads.feature_mean) / heads.feature_std
        with torch.inference_mode():
            self.classes = torch.cat([head.inputs(part)[..., -WIDTH:] for part in torch.split(source.pictures, 512)])
        self.classes = self.classes.clone()  # a tensor of inference mode takes no part in autograd
        self.texts = source.texts - heads.text_centre
        self.counts = torch.tensor([len(row) for row in source.draws])
        widest = int(self.counts.max())
        self.draws = torch.tensor([[row[i % len(row)] for i in range(widest)] for row in source.draws])
        self.meanings = source.meanings + offset
        self.holds = torch.where(source.holds == NOTHING, NOTHING, source.holds + offset)

    def draw(self, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> inputs [b, 1664], centred texts [b, 384], meanings [b], holds [b, A]. No picture is drawn twice."""
        count, views, _ = self.standard.shape
        weights = torch.ones(count) if self.source.weights is None else self.source.weights
        rows = torch.multinomial(weights, self.source.batch, generator=generator)
        chance = torch.rand(3, len(rows), generator=generator)
        view = (chance[0] * views).long()
        text = self.draws[rows, (chance[1] * self.counts[rows]).long()]
        wording = (chance[2] * self.texts.shape[1]).long()
        standard = self.standard[rows, view]
        noisy = standard + noise * torch.randn(standard.shape, generator=generator)
        inputs = torch.cat([FEATURE_LENGTH * F.normalize(noisy, dim=-1), self.classes[rows, view]], dim=-1)
        return inputs, self.texts[text, wording], self.meanings[text], self.holds[rows]


def align(
    sources: Sequence[Source], start: Heads, training: Training, *, quiet: bool = False
) -> tuple[Heads, dict[str, float]]:
    """-> heads with projections trained from those of ``start``, and figures of the training (scale, losses)."""
    head = ImageHead(start, frozen(tensors(backbone_state())).classifier)
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
    torch.manual_seed(seed)  # dropout takes no generator
    others = [p for p in model.parameters() if p is not model.text.weight]
    rates = [training.rate, training.text_rate]
    groups = [{"params": p, "lr": rate} for p, rate in zip((others, [model.text.weight]), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=training.steps)
    losses = []
    bar = tqdm(range(training.steps), f"seed {seed}", unit="step", disable=quiet)
    for _ in bar:
        drawn = [deck.draw(training.noise, generator) for deck in decks]
        inputs, texts, meanings = (torch.cat(parts) for parts in list(zip(*drawn, strict=True))[:3])
        widest = max(holds.shape[1] for *_, holds in drawn)
        holds = torch.cat([F.pad(holds, (0, widest - holds.shape[1]), value=NOTHING) for *_, holds in drawn])
        logits = model(F.dropout(inputs, training.dropout), texts, training.max_scale)
        positive, teacher = right(holds, meanings), F.normalize(texts, dim=-1)
        rows, columns = (targets(p, teacher, training.soft, training.soft_temperature) for p in (positive, positive.T))
        value = loss(logits, rows, columns)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return model, losses


# Sources


def captioned(pictures: Tensor, texts: Tensor, per_picture: Sequence[int], batch: int = 256) -> Source:
    """Pictures [N, V, 1280] with ``per_picture`` captions each, their vectors [sum, 384] in order."""
    owner = torch.repeat_interleave(torch.arange(len(per_picture)), torch.tensor(per_picture))
    firsts = np.cumsum([0, *per_picture])
    draws = [range(first, first + count) for first, count in zip(firsts, per_picture, strict=False)]
    holds = torch.arange(len(per_picture))[:, None]
    return Source("captions", pictures, texts[:, None], draws, owner, holds, min(batch, len(per_picture)))


def named(pictures: Tensor, classes: Sequence[int], names: dict[str, Any], texts: Tensor, batch: int = 384) -> Source:
    """ImageNet pictures [N, V, 1280] with their class numbers; texts [M, K, 384]: each `bag_text` in K templates.

    The names of a class are its own, its synonyms and its WordNet hypernyms. A name matches each class below it.
    """
    synsets = sorted({*names["bag_synset"], *(synset for row in names["ancestors"] for synset in row)})
    number = {synset: index for index, synset in enumerate(synsets)}
    holds = padded([[number[synset] for synset in names["ancestors"][c]] for c in classes])
    draws = [names["class_bag"][c] for c in classes]
    meanings = torch.tensor([number[synset] for synset in names["bag_synset"]])
    return Source("names", pictures, texts, draws, meanings, holds, min(batch, len(classes)))


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ragged rows -> [N, longest], filled with `NOTHING`."""
    widest = max(map(len, rows))
    return torch.tensor([[*row, *[NOTHING] * (widest - len(row))] for row in rows])


def cropped(
    pictures: Tensor, categories: Sequence[int], means: Sequence[int], texts: Tensor, batch: int = 96
) -> Source:
    """Pictures of single objects [N, V, 1280] with their categories; texts [M, K, 384] with the category of each."""
    draws = [[text for text, category in enumerate(means) if category == c] for c in categories]
    holds, batch = torch.tensor(categories), min(batch, len(categories))
    return Source("crops", pictures, texts, draws, torch.tensor(means), holds[:, None], batch, balanced(holds))


def balanced(categories: Tensor) -> Tensor:
    """[N] -> weights [N] that draw every category equally often, whatever its number of pictures.

    Without them the names of frequent objects move near all pictures: "car" was the answer to most airplanes.
    """
    return 1 / torch.bincount(categories)[categories]


def fresh(pictures: Tensor, captions: Tensor, names: Tensor) -> Heads:
    """Heads to start from. Features are standardised over ``pictures`` [N, V, 1280]; texts are centred between captions
    and class names. The text projection is the identity, and the image projection is nearly the ConSE vector.
    """
    centre = (captions.mean(0) + names.mean(0)) / 2
    flat = pictures.flatten(0, 1)
    image = torch.zeros(WIDTH, flat.shape[1] + WIDTH)
    image[:, flat.shape[1] :] = torch.eye(WIDTH)
    nn.init.uniform_(image[:, : flat.shape[1]], -0.01, 0.01, generator=torch.Generator().manual_seed(0))
    return Heads(image, torch.zeros(WIDTH), torch.eye(WIDTH), centre, flat.mean(0), flat.std(0) + 1e-6, names - centre)


def recalls(heads: Heads, pictures: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Pictures [N, 1280], unit texts [M, 384], owner [M] -> R@1/5/10 of both directions in percent."""
    head = ImageHead(heads, frozen(tensors(backbone_state())).classifier)
    with torch.inference_mode():
        images = head(pictures)
        similar = images @ F.normalize((texts - heads.text_centre) @ heads.text_weight.T, dim=-1).T
    pairs = similar[owner, torch.arange(len(owner))]
    text_rank = (similar > pairs).sum(0)
    best = torch.full((len(pictures),), -2.0).scatter_reduce(0, owner, pairs, "amax")
    image_rank = (similar > best[:, None]).sum(1)
    return {
        f"{name}@{k}": round(100 * float((rank < k).float().mean()), 1)
        for name, rank in (("text_to_image", text_rank), ("image_to_text", image_rank))
        for k in (1, 5, 10)
    }


def train(options: argparse.Namespace, quiet: bool) -> dict[str, Any]:
    """Train and write the heads; -> the content of heads.json. Raises `BadRequest`."""
    captions = read_captions(options.captions)
    files = sorted(captions)
    if absent := [name for name in files if not (options.images / name).is_file()]:
        raise BadRequest(
            f"{len(absent)} of {len(files)} pictures are not in {options.images}, for example {absent[0]}; --images is "
            "the folder that the names in --captions are relative to"
        )
    pictures = features.of_pictures([options.images / name for name in files], options.cache, quiet=quiet)
    sentences = [text for name in files for text in captions[name]]
    texts = features.of_texts(sentences, quiet=quiet)
    per_picture = [len(captions[name]) for name in files]
    owner = torch.repeat_interleave(torch.arange(len(files)), torch.tensor(per_picture))

    held = sorted(random.Random(0).sample(range(len(files)), min(options.held_out, len(files) // 2)))
    trained = [i for i in range(len(files)) if i not in held]
    of_trained = torch.tensor([int(i) not in held for i in owner])
    sources = [captioned(pictures[trained], texts[of_trained], [per_picture[i] for i in trained])]
    names = json.loads(options.names.read_text(encoding="utf-8")) if options.names else None
    sources += _extra(options, names, quiet) if names else []
    if options.fresh:
        if names is None:
            raise BadRequest("--fresh needs --names FILE: the ConSE table is built from its class names")
        start = fresh(pictures[trained], texts[of_trained], features.of_texts(names["class_names"], quiet=quiet))
    else:
        start = Heads.load(options.start or SHIPPED)
    given = {"steps": options.steps, "seeds": options.seeds}
    training = Training(**{name: value for name, value in given.items() if value is not None})
    heads, figures = align(sources, start, training, quiet=quiet)

    result = {
        "heads": str(options.out / SHIPPED.name),
        "command": options.command,
        "data": {s.name: {"pictures": len(s.pictures), "texts": len(s.texts)} for s in sources},
        "settings": asdict(training),
        "training": figures,
        "held_out": {},
    }
    if held:
        owners = torch.tensor([held.index(int(i)) for i in owner if int(i) in held])
        result["held_out"] = {"pictures": len(held), **recalls(heads, pictures[held, 0], texts[~of_trained], owners)}
    options.out.mkdir(parents=True, exist_ok=True)
    heads.save(options.out / SHIPPED.name, {"net": "mini", "scale": str(figures["scale"])})
    (options.out / "heads.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _extra(options: argparse.Namespace, names: dict[str, Any], quiet: bool) -> list[Source]:
    """The other sources of the shipped heads, from cached features: ImageNet pictures by class, and COCO crops."""
    sources = []
    if options.name_views:
        pictures, numbers = _cached(options.name_views)
        sources.append(named(pictures, numbers, names, _worded(names["bag_text"], names, quiet)))
    if options.crops:
        (pictures, numbers), categories = _cached(options.crops), names["coco_names"]
        texts = _worded([*categories, *PEOPLE], names, quiet)
        means = [*range(len(categories)), *[categories.index("person")] * len(PEOPLE)]
        sources.append(cropped(pictures, numbers, means, texts))
    return sources


def _worded(labels: Sequence[str], names: dict[str, Any], quiet: bool) -> Tensor:
    """[M, K, 384]: each label in each training template."""
    templates = names["templates_train"]
    return torch.stack([features.of_texts([fill(t, x) for x in labels], quiet=quiet) for t in templates], 1)


def _cached(file: Path) -> tuple[Tensor, list[int]]:
    """Read an .npz: ``q`` uint8 [N, 1280] or [N, V, 1280] times ``scale`` [1280], and ``class_index`` or ``category``.

    -> features [N, V, 1280], and the number of the class or category of each.
    """
    with np.load(file, allow_pickle=False) as data:
        pictures = torch.from_numpy(data["q"] * data["scale"])
        numbers = data["class_index"] if "class_index" in data else data["category"]
    return pictures if pictures.ndim == 3 else pictures[:, None], numbers.tolist()
