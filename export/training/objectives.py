"""The tasks of training. A `Task` draws batches, computes the loss of a batch, and measures on held-out data.

mlm          masked words; cross-entropy of the words to predict   Devlin et al. 2018 (arXiv 1810.04805)
clm          the next token                                        Radford et al. 2018
classes      the class of a picture                                Dosovitskiy et al. 2020 (arXiv 2010.11929)
contrastive  pairs of picture and caption, in both directions      Radford et al. 2021 (arXiv 2103.00020)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers.bert import MaskedLM
from calmclip.export.towers.transformer import Block
from calmclip.export.training.data import Pictures, shifted
from calmclip.export.training.settings import Training
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.preprocess.masking import IGNORED, masked
from calmclip.models.preprocess.text import TextPreparer

_MEASURED = 8  # held-out batches
_LARGEST = 700.0  # the exponential of more is nearly the largest float64
Batch = tuple[Tensor, ...]


class Task(Protocol):
    @property
    def module(self) -> nn.Module: ...

    def batch(self, draw: np.random.Generator) -> Batch: ...

    def loss(self, batch: Batch) -> Tensor: ...

    def measure(self) -> dict[str, float]: ...


class _Rows(ABC):
    """Rows of tokens; the last rows are held out."""

    def __init__(self, module: nn.Module, rows: Array, settings: Training) -> None:
        self.module, self.settings = module, settings
        self.rows, self.held_out = _split(rows, settings, f"rows of {settings.length} tokens")

    @abstractmethod
    def inputs(self, rows: Array, draw: np.random.Generator, rate: float = 0.15) -> Batch: ...

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor: ...

    def batch(self, draw: np.random.Generator) -> Batch:
        rows = self.rows[draw.integers(0, len(self.rows), self.settings.batch)]
        return self.inputs(rows, draw, self.settings.masked)

    def measure(self) -> dict[str, float]:
        """Perplexity: e to the mean cross-entropy, over the first held-out batches."""
        size = self.settings.batch
        parts = [self.held_out[i * size : (i + 1) * size] for i in range(_MEASURED)]
        losses = [self.loss(self.inputs(part, np.random.default_rng(i))) for i, part in enumerate(parts) if len(part)]
        mean = float(torch.stack(losses).mean())
        return {"perplexity": math.exp(mean) if mean < _LARGEST else math.inf}


class MaskedWords(_Rows):
    module: MaskedLM

    def __init__(
        self, module: MaskedLM, rows: Array, settings: Training, mask: int, words: int, spared: Sequence[int]
    ) -> None:
        super().__init__(module, rows, settings)
        self.mask, self.words, self.spared = mask, words, spared

    def inputs(self, rows: Array, draw: np.random.Generator, rate: float = 0.15) -> Batch:
        """``rate``: measurements use BERT's rate, whatever the rate of training."""
        ids, targets = masked(rows, draw, self.mask, self.words, self.spared, rate)
        if (targets == IGNORED).all():  # few short rows; the mean of no losses is not a number
            targets[0, 1] = rows[0, 1]
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def loss(self, batch: Batch) -> Tensor:
        ids, targets = batch
        predicted = targets != IGNORED
        hidden = self.module.hidden(ids, torch.ones_like(ids))
        logits = self.module.logits(hidden[predicted])  # logits of other tokens would be wasted
        return F.cross_entropy(logits.float(), targets[predicted])


class NextToken(_Rows):
    def inputs(self, rows: Array, draw: np.random.Generator, rate: float = 0.15) -> Batch:
        return (torch.from_numpy(rows),)

    def loss(self, batch: Batch) -> Tensor:
        (ids,) = batch
        logits = self.module(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Classes:
    """Pictures of classes, some held out. Training shifts the pictures a little."""

    def __init__(self, module: nn.Module, pictures: Pictures, settings: Training) -> None:
        self.module, self.settings = module, settings
        order = np.random.default_rng(0).permutation(len(pictures.labels))  # the same for every seed
        (self.pixels, self.labels), self.held_out = (
            (pictures.pixels[part], pictures.labels[part]) for part in _split(order, settings, "pictures")
        )

    def batch(self, draw: np.random.Generator) -> Batch:
        rows = draw.integers(0, len(self.labels), self.settings.batch)
        moved = shifted(self.pixels[rows], draw, self.pixels.shape[-1] // 8)
        return torch.from_numpy(moved), torch.from_numpy(self.labels[rows])

    def loss(self, batch: Batch) -> Tensor:
        pixels, labels = batch
        return F.cross_entropy(self.module(pixels).float(), labels)

    def measure(self) -> dict[str, float]:
        pixels, labels = self.held_out
        parts = np.array_split(pixels, -(-len(pixels) // 64))
        answers = torch.cat([self.module(torch.from_numpy(part)).argmax(-1) for part in parts])
        return {"top1": 100 * float((answers.numpy() == labels).mean())}


class Captions:
    """Pictures with captions, some pictures held out. A batch draws one caption per picture."""

    def __init__(
        self, module: "Pair", pixels: Array, captions: Sequence[Sequence[str]], tokens: TextPreparer, settings: Training
    ) -> None:
        self.module, self.settings, self.tokens = module, settings, tokens
        self.pixels, self.captions = pixels, captions
        order = np.random.default_rng(0).permutation(len(pixels))
        self.trained, self.held_out = _split(order, settings, "pictures", least=2)

    def batch(self, draw: np.random.Generator) -> Batch:
        rows = draw.choice(self.trained, min(self.settings.batch, len(self.trained)), replace=False)
        return self.inputs(rows, [self.captions[i][int(draw.integers(len(self.captions[i])))] for i in rows])

    def inputs(self, rows: Array, texts: Sequence[str]) -> Batch:
        return torch.from_numpy(self.pixels[rows]), *map(torch.from_numpy, self.tokens.prepare(texts).values())

    def loss(self, batch: Batch) -> Tensor:
        logits = self.module(*batch).float()
        targets = torch.arange(len(logits))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def measure(self) -> dict[str, float]:
        """The percentage of held-out pictures whose first caption ranks first among those of all held-out pictures."""
        logits = self.module(*self.inputs(self.held_out, [self.captions[i][0] for i in self.held_out]))
        return {"recall1": 100 * float((logits.argmax(-1) == torch.arange(len(logits))).double().mean())}


class Penalised:
    """``task`` with a loss that also has ``weight`` times the mean square of the numbers that the MLPs put out.

    A net with outliers needs it: new gates let attention do nothing, but nothing makes its large weights smaller.

    Source: Bondarenko et al. 2023 (arXiv 2306.12929), fine-tuning; the form of the term is ours.
    """

    def __init__(self, task: Task, weight: float) -> None:
        self.task, self.module, self.weight = task, task.module, weight
        self.squares: list[Tensor] = []  # of each MLP, in the step
        blocks = [block for block in self.module.modules() if isinstance(block, Block)]
        if not blocks:
            raise BadRequest("the net has no block of calmclip, whose MLP penalty is of; train it without a penalty")
        for block in blocks:
            block.mlp.register_forward_hook(self._keep)

    def _keep(self, mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.module.training:  # a measurement has no penalty
            self.squares.append(output.float().square().mean())

    def batch(self, draw: np.random.Generator) -> Batch:
        return self.task.batch(draw)

    def loss(self, batch: Batch) -> Tensor:
        self.squares.clear()
        loss = self.task.loss(batch)
        return loss + self.weight * torch.stack(self.squares).mean()

    def measure(self) -> dict[str, float]:
        return self.task.measure()


class Pair(nn.Module):
    """Two towers -> logits [B, B], pictures in rows: cosines times a learned scale, at most 100."""

    def __init__(self, image: nn.Module, text: nn.Module, scale: float) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, pixels: Tensor, *tokens: Tensor) -> Tensor:
        images: Tensor = self.image(pixels)
        texts: Tensor = self.text(*tokens)
        return self.logit_scale.exp().clamp(max=100.0) * images @ texts.T


def _split(items: Array, settings: Training, kind: str, least: int = 1) -> tuple[Array, Array]:
    """-> the items to train on, and the held-out items. Raises `BadRequest` if either would be less than ``least``."""
    number = max(least, math.ceil(len(items) * settings.held_out))
    if len(items) - number < least:
        raise BadRequest(
            f"{len(items)} {kind} are too few to hold out {number}; give more data, or a smaller held_out or length"
        )
    return items[:-number], items[-number:]
