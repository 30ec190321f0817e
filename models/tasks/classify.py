"""Picture + labels -> ranked labels.

Source: Radford et al. 2021 (arXiv 2103.00020), zero-shot prediction; the head is the bundle's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from models.bundle.bundle import Bundle
from models.errors import BadRequest
from models.flow import Call, Flow, Work
from models.preprocess.image import decode
from models.tasks.texts import choose, embed_labels, only_output


@dataclass(frozen=True)
class ClassifyRequest:
    """``templates`` (each with a ``{}``) replace the bundle's prompts; ``top_k`` None: all labels."""

    image: bytes
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    top_k: int | None = None


@dataclass(frozen=True)
class Ranked:
    label: str
    index: int  # in the request's labels
    score: float  # of the head: softmax over the labels, or a sigmoid for each
    cosine: float  # of picture and label, before temperature


@dataclass(frozen=True)
class Ranking:
    """Best first; ties go to the lower index."""

    labels: tuple[Ranked, ...]

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.labels)


def classify(bundle: Bundle, request: ClassifyRequest) -> Flow[Ranking]:
    bundle.require("classify")
    labels = choose(bundle, request.labels)
    if request.top_k is not None and request.top_k < 1:
        raise BadRequest(f"top_k is {request.top_k}; expected at least 1")
    picture = yield Work("decode", lambda: decode(request.image, max_pixels=bundle.max_pixels))
    pixels, _ = bundle.image().prepare(picture)
    text = yield from embed_labels(bundle, labels, request.templates)
    image = yield Call("image", {bundle.image().spec.input: pixels})
    image = image[only_output(bundle, "image")]

    scores = bundle.head.scores(bundle.head.logits(image, text))[0]
    cosines = (image @ text.T)[0]
    order = np.argsort(-scores, kind="stable")[: request.top_k]
    return Ranking(tuple(Ranked(labels[i], int(i), float(scores[i]), float(cosines[i])) for i in order))
