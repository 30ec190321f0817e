"""Zero-shot classification by a net's torch modules: logits, accuracy and loss, with gradients where they are wanted.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3 and section 3.1.4: a label's vector is the normalized mean of
the unit vectors of its sentences. Pictures and texts are prepared as in the service. The loss is the cross-entropy of a
softmax over the labels. A sigmoid head's bias is the same for all labels, so it changes neither accuracy nor this loss.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calmclip.export.nets import Net
from calmclip.export.training.data import prepared
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.classifier import fill
from calmclip.models.datasets import read_classes
from calmclip.models.errors import BadRequest
from calmclip.models.evals import zero_shot
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.preprocess.text import TextPreparer

DATA = f"{zero_shot.DATA}, or a folder of pictures for each class"
_BATCH = 64  # pictures or sentences that run at once without gradients


@dataclass(frozen=True)
class DataSet:
    """``pixels`` float32 [N, 3, H, W]; ``truth`` int64 [N], indices of ``labels``; ``tokens``: the inputs of the text
    tower for the sentences, int64 [C T, length], those of a label together."""

    name: str
    pixels: Tensor
    truth: Tensor
    labels: tuple[str, ...]
    tokens: tuple[Tensor, ...]

    def some(self, count: int) -> "DataSet":
        """At most ``count`` pictures, evenly spaced; all labels."""
        rows = spaced(len(self.truth), count)
        return replace(self, pixels=self.pixels[rows], truth=self.truth[rows])


def spaced(number: int, count: int | None) -> list[int]:
    """``count`` indices below ``number``, evenly spaced; all if there are fewer, or if it is None."""
    count = min(count or number, number)
    return [i * number // count for i in range(count)]


def read(name: str, directory: Path, net: Net, templates: Sequence[str] = (), limit: int | None = None) -> DataSet:
    """``limit``: at most so many pictures, evenly spaced, so that every class keeps its share. ``templates``: with a {}
    each; if empty, the net's own.

    Raises `BadRequest` for another data set than `DATA`, for less than two labels, a picture that cannot be read, and a
    template without {}; `TextTooLong`.
    """
    if (directory / "labels.json").is_file():
        data = zero_shot.read(directory, zero_shot.Params())
        files, labels, truth = [*data.pictures], tuple(data.labels), [*data.truth]
    elif directory.is_dir():
        classes = read_classes(directory)
        labels = tuple(classes)
        pairs = [(file, index) for index, pictures_of in enumerate(classes.values()) for file in pictures_of]
        files, truth = [file for file, _ in pairs], [index for _, index in pairs]
    else:
        raise BadRequest(f"{directory} is no directory; expected {DATA}")
    if len(labels) < 2:
        raise BadRequest(f"{directory} has the label {labels[0]!r} alone; expected two or more")
    assert net.classifier is not None  # of a CLIP
    templates = tuple(templates or net.classifier.templates)
    if wrong := [template for template in templates if "{}" not in template]:
        raise BadRequest(f"the template {wrong[0]!r} has no {{}} for the label")
    image, text = net.towers["image"], net.towers["text"]
    assert isinstance(image.preprocess, ImagePreprocess)
    assert isinstance(text.preprocess, TextPreprocess)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / text.preprocess.tokenizer).write_bytes(net.files[text.preprocess.tokenizer])
        feeds = TextPreparer(text.preprocess, Path(folder)).prepare(
            [fill(template, label) for label in labels for template in templates]
        )
    tokens = tuple(torch.from_numpy(feeds[key]) for key in text.inputs)
    rows = spaced(len(files), limit)
    preparer = ImagePreparer(image.preprocess)
    bar = progress(rows, f"reading {name}", "picture", len(rows))
    pixels = np.concatenate([prepared(Path(str(files[row])), preparer) for row in bar])
    return DataSet(name, torch.from_numpy(pixels), torch.tensor([truth[row] for row in rows]), labels, tokens)


def pictures(net: Net, data: DataSet) -> Tensor:
    """float32 [N, D], unit rows, without gradients."""
    with torch.inference_mode():
        return torch.cat([net.towers["image"].module(part) for part in torch.split(data.pixels, _BATCH)])


def labels(net: Net, data: DataSet, *, gradients: bool = False) -> Tensor:
    """float32 [C, D], unit rows. With ``gradients`` all sentences are in one graph."""
    module = net.towers["text"].module
    if gradients:
        rows = module(*data.tokens)
    else:
        with torch.inference_mode():
            parts = zip(*(torch.split(tokens, _BATCH) for tokens in data.tokens), strict=True)
            rows = torch.cat([module(*part) for part in parts])
    return F.normalize(rows.unflatten(0, (len(data.labels), -1)).mean(dim=1), dim=-1)


def scale(net: Net) -> float:
    """exp(logit_scale)"""
    assert net.classifier is not None
    assert net.classifier.head is not None
    return float(net.classifier.head.params["scale"])


def loss(logits: Tensor, truth: Tensor) -> Tensor:
    """The sum over the pictures, float64."""
    return F.cross_entropy(logits.double(), truth, reduction="sum")


@dataclass(frozen=True)
class Score:
    """``right`` bool [N]; ``loss``: the mean cross-entropy in nats."""

    right: Array
    loss: float

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * float(self.right.mean())


def score(net: Net, data: DataSet) -> Score:
    """Equal logits count for the first label."""
    logits = scale(net) * pictures(net, data) @ labels(net, data).T
    right = logits.numpy().argmax(axis=1) == data.truth.numpy()
    return Score(right, float(loss(logits, data.truth)) / len(right))
