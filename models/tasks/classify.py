"""Picture + labels -> ranked labels.

Source: Radford et al. 2021 (arXiv 2103.00020), zero-shot prediction; the head is the bundle's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Call, Flow, Work
from calmclip.models.preprocess.image import decode
from calmclip.models.tasks.texts import choose, embed_labels, only_output


@dataclass(frozen=True)
class ClassifyRequest:
    """``templates`` (each with a ``{}``) replace the bundle's prompts; ``top_k`` None: all labels.

    ``temperature`` divides the logits: over 1 the scores are less sure of themselves (Guo et al. 2017, arXiv
    1706.04599). ``none_below``: with no score of at least that, none of the labels fits (Ming et al. 2022, arXiv
    2211.13445); None: that is not asked.
    """

    image: bytes
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    top_k: int | None = None
    temperature: float = 1.0
    none_below: float | None = None


@dataclass(frozen=True)
class Ranked:
    label: str
    index: int  # in the request's labels
    score: float  # of the head: softmax over the labels, or a sigmoid for each
    cosine: float  # of picture and label, before temperature


@dataclass(frozen=True)
class Ranking:
    """Best first; ties go to the lower index. ``none``: whether none of them fits, None where that was not asked."""

    labels: tuple[Ranked, ...]
    none: bool | None = None

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.labels)


def classify(bundle: Bundle, request: ClassifyRequest) -> Flow[Ranking]:
    bundle.require("classify")
    labels = choose(bundle, request.labels)
    if request.top_k is not None and request.top_k < 1:
        raise BadRequest(f"top_k is {request.top_k}; expected at least 1")
    if not 0.01 <= request.temperature <= 100:
        raise BadRequest(f"temperature is {request.temperature}; expected 0.01 to 100")
    if request.none_below is not None and not 0 < request.none_below <= 1:
        raise BadRequest(f"none_below is {request.none_below}; expected over 0, at most 1")
    picture = yield Work("decode", lambda: decode(request.image, max_pixels=bundle.max_pixels))
    pixels, _ = bundle.image().prepare(picture)
    text = yield from embed_labels(bundle, labels, request.templates)
    image = yield Call("image", {bundle.image().spec.input: pixels})
    image = image[only_output(bundle, "image")]

    scores = bundle.head.scores(bundle.head.logits(image, text) / np.float32(request.temperature))[0]
    cosines = (image @ text.T)[0]
    order = np.argsort(-scores, kind="stable")[: request.top_k].tolist()
    none = None if request.none_below is None else bool(scores.max() < request.none_below)
    score, cosine = scores.tolist(), cosines.tolist()
    return Ranking(tuple(Ranked(labels[i], i, score[i], cosine[i]) for i in order), none)
