"""The descriptions of a label are looked for in the regions of a picture.

Source: Halbe et al. 2024 (arXiv 2412.04429), GRAIN, the scoring rule. With the vector img of the picture, obj_q of its
regions, t_c of a label and d_{c,d} of the label's descriptions:

    score(c) = alpha sim(img, t_c) + (1 - alpha) mean_q max_d sim(obj_q, d_{c,d})

GRAIN has 5 region queries of its own; here the regions are the 5 proposals of the graph `regions` with the highest
objectness. A bundle without that graph has the windows `HALVES` of the graph `dense`. Of a picture without proposals,
the whole picture is the only region. The rule is applied to the logits of a head. For `cosine` and `sigmoid`, which
scale and shift a cosine, that is the rule itself.
"""

from collections.abc import Sequence

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.features import means
from calmclip.models.tasks.regions import Grid, located, region_vectors, vectors_of

REGIONS = 5
HALVES = Grid(sizes=(0.5,), ratios=(1.0,), stride=1.0)  # the picture, and squares of half its side: 5 of a square


def regions_of(bundle: Bundle, image: Picture) -> Flow[Array]:
    """-> float32 [Q, D] unit rows; of a picture without proposals, Q = 0. Raises `TaskNotServed` if the bundle has
    neither graph, and the `InputError`s of pictures."""
    if "regions" in bundle.manifest.graphs:
        vectors, _ = yield from region_vectors(bundle, image)
        return vectors[:REGIONS]
    return (yield from vectors_of(bundle, (yield from located(bundle, image, HALVES))))


def check(classifier: Classifier, alpha: float) -> None:
    """Raises `BadRequest` for alpha outside of 0 to 1, a label without descriptions, a head with arrays of its own."""
    if not 0 <= alpha <= 1:
        raise BadRequest(f"alpha is {alpha}; expected 0 to 1")
    bare = [label for label in classifier.labels if not classifier.descriptions.get(label)]
    if bare:
        raise BadRequest(
            f"alpha is {alpha}, but the label {bare[0]!r} has no descriptions. Send `descriptions` for each label, or "
            "leave out `alpha`; templates in a request replace the descriptions of its classifier"
        )
    classifier.require_sentences("alpha")


def grounded(bundle: Bundle, classifier: Classifier, regions: Array) -> Flow[Array]:
    """``regions`` float32 [Q, D], unit rows, Q >= 1 -> logits float32 [1, C], before temperature: mean_q max_d.

    ``classifier`` passes `check`.
    """
    text = yield from described(bundle, classifier)
    lists = [classifier.descriptions[label] for label in classifier.labels]
    names = tuple(label for label, each in zip(classifier.labels, lists, strict=True) for _ in each)
    head = classifier.bound
    return best(head.logits(regions, head.columns(names, text)), [*map(len, lists)])


def described(bundle: Bundle, classifier: Classifier) -> Flow[Array]:
    """-> float32 [N, D], the unit rows of all descriptions, those of a label together.

    Time and memory grow with the number of descriptions at first use; then the driver caches their rows.
    """
    lines = [line for label in classifier.labels for line in classifier.descriptions[label]]
    return (yield from means(bundle, f"descriptions {classifier.text_key}", lambda: [(line,) for line in lines]))


def best(logits: Array, counts: Sequence[int]) -> Array:
    """``logits`` [Q, N], the columns of each label together, ``counts`` of them -> float32 [1, C]: mean_q max_d."""
    maxima = np.maximum.reduceat(logits, np.cumsum([0, *counts[:-1]]), axis=1)
    mean: Array = maxima.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    return mean
