"""`calmclip distil`: a student's texts move to the vectors of another bundle, the teacher's.

Two stages, as in DC-CLIP (Zhang et al. 2024, arXiv 2404.11249): first features alone, a SmoothL1 loss between the
vectors of student and teacher; then alignment, InfoNCE between both within a batch (van den Oord et al. 2018, arXiv
1807.03748), and between texts and pictures if there are some. The teacher reads a text in its own language, the student
reads the same in any (Reimers and Gurevych 2020, arXiv 2004.09813).

The teacher's vectors, and the features of a student whose encoder is frozen, are computed once and kept in ``--out``.
Each stage is a training of `loop`, with a state to resume from.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.training.corpus import Corpus, read_corpus, taught_vectors
from calmclip.export.training.loop import train
from calmclip.export.training.objectives import Batch
from calmclip.export.training.settings import Distillation
from calmclip.export.training.students import open_student
from calmclip.models.errors import BadRequest
from calmclip.models.evals.samples import write
from calmclip.models.flow import Array
from calmclip.models.runner import Runner

FACTS = "distil.json"
STAGES = ("features", "alignment")
_MAX_SCALE = 60.0  # of the cosines, as in `calmclip.export.align`


# Losses


def feature_loss(vectors: Tensor, goals: Tensor) -> Tensor:
    """SmoothL1 between unit rows [b, D], times the root of D: then numbers are around 1, where the loss bends."""
    scale = goals.shape[1] ** 0.5
    return F.smooth_l1_loss(vectors * scale, goals * scale)


def targets(goals: Tensor, soft: float, temperature: float) -> Tensor:
    """The target probabilities [b, b] of unit rows [b, D], the teacher's; rows sum to 1.

    Equal goals are right for each other and share ``1 - soft``. ``soft`` is spread by the similarity of goals, because
    a text also fits what is like it (compare Andonian et al. 2022, arXiv 2204.02960).
    """
    cosines = goals @ goals.T
    right = (cosines > cosines.diagonal()[:, None] - 1e-5).to(goals.dtype)  # rounding may shorten a row
    right = right / right.sum(dim=1, keepdim=True)
    return (1 - soft) * right + soft * F.softmax(cosines / temperature, dim=-1)


def alignment_loss(vectors: Tensor, others: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit rows [b, D]; ``wanted`` [b, b], symmetric in its right answers: see `targets`."""
    logits = scale * vectors @ others.T
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


# The task


class Joined(nn.Module):
    """The student, and the scale of its cosines."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, *inputs: Tensor) -> Tensor:
        """-> unit rows [b, D]."""
        return F.normalize(self.student(*inputs), dim=-1)

    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=_MAX_SCALE)


class Distil:
    """One stage, as a task of `loop`."""

    def __init__(
        self, module: Joined, inputs: Callable[[Array], tuple[Tensor, ...]], corpus: Corpus,
        vectors: tuple[Array, Array], settings: Distillation, stage: str,
    ) -> None:  # fmt: skip
        self.module, self.inputs, self.corpus, self.settings = module, inputs, corpus, settings
        self.goals, self.pictures = map(torch.from_numpy, vectors)
        self.aligns = stage == "alignment"
        self.trained: list[Array] = []
        self.held_out: list[Array] = []
        for source in corpus.sources:
            number = max(1, round(len(source.groups) * settings.held_out))
            if len(source.groups) - number < 2:
                raise BadRequest(
                    f"{len(source.groups)} texts are too few to hold out {number}; give more, or a smaller held_out"
                )
            order = np.random.default_rng(0).permutation(len(source.groups))  # the same for every seed
            self.trained.append(order[number:])
            self.held_out.append(order[:number])

    def batch(self, draw: np.random.Generator) -> Batch:
        """Inputs of the student, then the places of goals int64 [b] and of pictures int64 [b], -1 for none."""
        shares = [1 - self.settings.share, self.settings.share] if len(self.trained) > 1 else [1.0]
        places, pictures = [], []
        for source, trained, share in zip(self.corpus.sources, self.trained, shares, strict=True):
            number = min(round(self.settings.batch * share), len(trained))
            for group in draw.choice(trained, number, replace=False):
                places.append(source.groups[group][int(draw.integers(len(source.groups[group])))])
                pictures.append(source.pictures[group] if source.pictures else -1)
        chosen = np.array(places)
        return *self.inputs(chosen), torch.from_numpy(self.corpus.goals[chosen]), torch.tensor(pictures)

    def loss(self, batch: Batch) -> Tensor:
        *inputs, places, pictures = batch
        vectors, goals, how = self.module(*inputs), self.goals[places], self.settings
        features = feature_loss(vectors, goals)
        if not self.aligns:
            return features + 0 * self.module.log_scale  # so that the optimizer knows all parameters
        scale = self.module.scale()
        wanted = targets(goals, how.soft, how.soft_temperature)
        total = how.feature_weight * features + alignment_loss(vectors, goals, wanted, scale)
        shown = pictures >= 0
        if how.picture_weight and shown.any():
            wanted = targets(goals[shown], how.soft, how.soft_temperature)
            seen = self.pictures[pictures[shown]]
            total = total + how.picture_weight * alignment_loss(vectors[shown], seen, wanted, scale)
        return total

    def measure(self) -> dict[str, float]:
        """The mean cosine of held-out texts with their goals, and the percentage of held-out groups whose first text is
        nearest to its own goal; with ``parallel`` by language too."""
        figures: dict[str, float] = {}
        for source, held in zip(self.corpus.sources, self.held_out, strict=True):
            groups = [source.groups[group] for group in held]
            for language in dict.fromkeys(self.corpus.languages[place] for group in groups for place in group):
                spoken = [next((p for p in group if self.corpus.languages[p] == language), None) for group in groups]
                chosen = np.array([place for place in spoken if place is not None])
                goals = self.goals[self.corpus.goals[chosen]]
                cosines = self._vectors(chosen) @ goals.T
                first = cosines.diagonal()
                end = f"_{language}" if language else ""
                figures[f"cosine{end}"] = float(first.mean())
                figures[f"recall1{end}"] = 100 * float((cosines <= first[:, None]).all(dim=1).double().mean())
        return figures

    def _vectors(self, places: Array) -> Tensor:
        size = self.settings.batch
        parts = [self.module(*self.inputs(places[i : i + size])) for i in range(0, len(places), size)]
        return torch.cat(parts)


def distil(teacher: Runner, checkpoint: str, settings: Distillation, out: Path) -> dict[str, Any]:
    """Train the student in ``checkpoint`` and write it to ``out``; -> the content of distil.json.

    Raises `BadRequest` for data and students that do not fit, and as `train`.
    """
    corpus = read_corpus(settings)
    vectors = taught_vectors(teacher, corpus, out)
    torch.manual_seed(settings.seed)
    student = open_student(checkpoint, settings.projection, corpus.texts, vectors[0][corpus.goals], out)
    module = Joined(student.module).train()
    figures: Mapping[str, Any] = {}
    for stage, steps in zip(STAGES, (settings.feature_steps, settings.steps), strict=True):
        if steps:
            task = Distil(module, student.inputs, corpus, vectors, settings, stage)
            figures = train(task, settings.model_copy(update={"steps": steps}), out / stage)
    module.eval()
    with torch.no_grad():
        student.write(out)
    bundle = teacher.bundle
    facts = {
        "teacher": {"name": bundle.name, "digest": bundle.digest},
        "student": Path(checkpoint).name,
        "texts": len(corpus.texts),
        "pictures": len(corpus.pictures),
        "settings": _public(settings),
        "figures": dict(figures),
    }
    write(out / FACTS, lambda stream: stream.write((json.dumps(facts, indent=1) + "\n").encode()))
    return facts


def _public(settings: Distillation) -> dict[str, Any]:
    """The settings, with the names of files alone."""
    data = settings.model_dump(mode="json")
    files = {name: data[name] for name in ("texts", "parallel", "pictures")}
    return data | {name: Path(file).name for name, file in files.items() if file}
