"""What is learned. A `Task` draws batches, says what one costs, and measures on what was held out.

mlm          masked words; cross-entropy of those asked for        Devlin et al. 2018 (arXiv 1810.04805)
clm          the next token                                        Radford et al. 2018
classes      the class of a picture                                Dosovitskiy et al. 2020 (arXiv 2010.11929)
contrastive  which caption is whose picture, both ways             Radford et al. 2021 (arXiv 2103.00020)
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.training.data import Pictures, shifted
from calmclip.export.training.settings import Training
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.preprocess.masking import IGNORED, masked
from calmclip.models.preprocess.text import TextPreparer

_MEASURED = 8  # batches of what was held out
_LARGEST = 700.0  # a float64 holds no e to much more
Batch = tuple[Tensor, ...]


class Task(Protocol):
    module: nn.Module

    def batch(self, draw: np.random.Generator) -> Batch: ...

    def loss(self, batch: Batch) -> Tensor: ...

    def measure(self) -> dict[str, float]: ...


class _Rows:
    """Rows of tokens, the last of them held out."""

    def __init__(self, module: nn.Module, rows: Array, settings: Training) -> None:
        self.module, self.settings = module, settings
        kept = max(1, math.ceil(len(rows) * settings.held_out))
        self.rows, self.held_out = rows[:-kept], rows[-kept:]
        if not len(self.rows):
            raise BadRequest(
                f"the texts fill {len(rows)} rows of {settings.length} tokens, which {settings.held_out:g} held out "
                "leaves none of; give more, or a smaller length"
            )

    def drawn(self, draw: np.random.Generator) -> Array:
        return self.rows[draw.integers(0, len(self.rows), self.settings.batch)]

    def measure(self) -> dict[str, float]:
        """Perplexity: e to the mean cross-entropy, over the first batches of what was held out."""
        size = self.settings.batch
        parts = [self.held_out[i * size : (i + 1) * size] for i in range(_MEASURED)]
        losses = [self.loss(self.asked(part, np.random.default_rng(i))) for i, part in enumerate(parts) if len(part)]
        mean = float(torch.stack(losses).mean())
        return {"perplexity": math.exp(mean) if mean < _LARGEST else math.inf}


class MaskedWords(_Rows):
    def __init__(self, module: nn.Module, rows: Array, settings: Training, mask: int, words: int, spared: Any) -> None:
        super().__init__(module, rows, settings)
        self.mask, self.words, self.spared = mask, words, spared

    def batch(self, draw: np.random.Generator) -> Batch:
        return self.asked(self.drawn(draw), draw, self.settings.masked)

    def asked(self, rows: Array, draw: np.random.Generator, share: float = 0.15) -> Batch:
        """Measured is with BERT's own share, whatever is trained with."""
        ids, targets = masked(rows, draw, self.mask, self.words, self.spared, share)
        if (targets == IGNORED).all():  # of few and short rows; the mean of nothing is no number
            targets[0, 1] = rows[0, 1]
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def loss(self, batch: Batch) -> Tensor:
        ids, targets = batch
        at = targets != IGNORED
        hidden = self.module.hidden(ids, torch.ones_like(ids))
        logits = self.module.logits(hidden[at])  # of those that are asked for alone
        return F.cross_entropy(logits.float(), targets[at])


class NextToken(_Rows):
    def batch(self, draw: np.random.Generator) -> Batch:
        return self.asked(self.drawn(draw), draw)

    def asked(self, rows: Array, draw: np.random.Generator) -> Batch:
        return (torch.from_numpy(rows),)

    def loss(self, batch: Batch) -> Tensor:
        (ids,) = batch
        logits = self.module(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Classes:
    """Pictures of classes, some held out; moved a little while they are learned."""

    def __init__(self, module: nn.Module, found: Pictures, settings: Training) -> None:
        self.module, self.settings = module, settings
        order = np.random.default_rng(0).permutation(len(found.labels))  # the same for every seed
        kept = max(1, math.ceil(len(order) * settings.held_out))
        (self.pixels, self.labels), self.held_out = (
            (found.pixels[part], found.labels[part]) for part in (order[:-kept], order[-kept:])
        )
        if not len(self.labels):
            raise BadRequest(f"{len(order)} pictures are too few to hold {kept} of them out; give more")

    def batch(self, draw: np.random.Generator) -> Batch:
        at = draw.integers(0, len(self.labels), self.settings.batch)
        moved = shifted(self.pixels[at], draw, self.pixels.shape[-1] // 8)
        return torch.from_numpy(moved), torch.from_numpy(self.labels[at])

    def loss(self, batch: Batch) -> Tensor:
        pixels, labels = batch
        return F.cross_entropy(self.module(pixels).float(), labels)

    def measure(self) -> dict[str, float]:
        pixels, labels = self.held_out
        found = [
            self.module(torch.from_numpy(part)).argmax(-1) for part in np.array_split(pixels, -(-len(pixels) // 64))
        ]
        return {"top1": 100 * float((torch.cat(found).numpy() == labels).mean())}


class Captions:
    """Pictures and their captions, some pictures held out; a caption of each is drawn."""

    def __init__(
        self, module: "Pair", pixels: Array, captions: Sequence[Sequence[str]], tokens: TextPreparer, settings: Training
    ) -> None:
        self.module, self.settings, self.tokens = module, settings, tokens
        self.pixels, self.captions = pixels, captions
        order = np.random.default_rng(0).permutation(len(pixels))
        kept = max(2, math.ceil(len(order) * settings.held_out))
        self.trained, self.held_out = order[:-kept], order[-kept:]
        if len(self.trained) < 2:
            raise BadRequest(f"{len(pixels)} pictures are too few to hold {kept} of them out; give more")

    def batch(self, draw: np.random.Generator) -> Batch:
        at = draw.choice(self.trained, min(self.settings.batch, len(self.trained)), replace=False)
        return self.fed(at, [self.captions[i][int(draw.integers(len(self.captions[i])))] for i in at])

    def fed(self, at: Array, texts: Sequence[str]) -> Batch:
        return torch.from_numpy(self.pixels[at]), *map(torch.from_numpy, self.tokens.prepare(texts).values())

    def loss(self, batch: Batch) -> Tensor:
        logits = self.module(*batch).float()
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def measure(self) -> dict[str, float]:
        """How often a held-out picture's own first caption wins among those of all held-out pictures."""
        at = self.held_out
        logits = self.module(*self.fed(at, [self.captions[i][0] for i in at]))
        return {"recall1": 100 * float((logits.argmax(-1) == torch.arange(len(at))).double().mean())}


class Pair(nn.Module):
    """Two towers -> logits [B, B], pictures in rows: cosines times a scale that is learned, at most 100."""

    def __init__(self, image: nn.Module, text: nn.Module, scale: float) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, pixels: Tensor, *tokens: Tensor) -> Tensor:
        return self.logit_scale.exp().clamp(max=100.0) * self.image(pixels) @ self.text(*tokens).T
