"""Direction head: the difference of two sets of pictures, as one direction; a picture's score is how far it goes along.

Source: Gaintseva et al. 2024 (arXiv 2404.01889), RAVE: the residual vector, the words nearest to it, and the removal of
         its bias. The authors' threshold is the first mean along the direction; here it is the middle of both means, so
         that both labels are treated alike.
In:     image [B, D], unit rows.
Assets: direction float32 [C, D]: for two labels r and -r, with r = unit(unit(mean of the first set) - unit(mean of the
        second)); offset float32 [C]: minus and plus the middle of the two means along r.
Out:    logits float32 [B, C] = scale * (image . direction + offset): the first label's logit sorts pictures from the
        second set's side to the first's; scores sum to 1 over C.

With ``bias_words`` k, the part along q is removed from r: q is the unit sum of the k words of the vocabulary that r is
most aligned with and the k that it is least aligned with, each times its alignment. The paper takes 15.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

SHOWN = 10  # words in a note
LEAST = 1e-6  # the length of a difference that has a direction


class Params(FrozenModel):
    scale: float | None = Field(default=None, gt=0, le=1e4)  # None: the bundle's
    bias_words: int = Field(default=0, ge=0, le=1000)  # at each end


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    return {"scale": (examples.scale,)}


def fit(examples: Examples, params: Params) -> Arrays:
    """Raises `BadRequest` if the sets have one mean, and for bias words without a vocabulary."""
    first, second = (_unit(examples.image[examples.truth == i].astype(np.float64).mean(axis=0)) for i in (0, 1))
    r = difference(first, second, examples.labels)
    if params.bias_words:
        r = without(r, bias(examples, r, params.bias_words)[0])
    middle = (first @ r + second @ r) / 2
    return {
        "direction": np.stack([r, -r]).astype(np.float32), "offset": np.array([-middle, middle], np.float32)
    }  # fmt: skip


def difference(first: Array, second: Array, labels: Sequence[str]) -> Array:
    """float64 [D], a unit vector from ``second`` to ``first``."""
    gap = first - second
    if np.linalg.norm(gap) < LEAST:
        raise BadRequest(
            f"the pictures of {labels[0]!r} and {labels[1]!r} have the same mean, so there is no direction between "
            "them; send two sets that differ"
        )
    return _unit(gap)


def bias(examples: Examples, r: Array, count: int) -> tuple[Array, list[str]]:
    """-> q float64 [D], a unit vector, and the words that it consists of, the most aligned first."""
    vectors = examples.word_vectors
    if vectors is None or len(vectors) < 2 * count:
        raise BadRequest(
            f"bias_words is {count}, and the vocabulary has {len(examples.words)} words; expected at least {2 * count}"
        )
    alignment = vectors.astype(np.float64) @ r
    order = np.argsort(-alignment, kind="stable")
    ends = [*order[:count], *order[-count:]]
    return _unit(alignment[ends] @ vectors[ends].astype(np.float64)), [examples.words[i] for i in ends]


def without(r: Array, q: Array) -> Array:
    """``r`` without its part along ``q``; all are float64 [D] and unit vectors."""
    rest = r - (r @ q) * q
    rest -= (rest @ q) * q  # the first difference loses digits if most of r goes along q
    if np.linalg.norm(rest) < LEAST:
        raise BadRequest("the bias words explain the whole difference of the two sets; remove fewer words")
    return _unit(rest)


def notes(examples: Examples, params: Params, assets: Arrays) -> Sequence[str]:
    """The nearest words of each side, and those whose direction was removed."""
    if examples.word_vectors is None:
        return ()
    r = assets["direction"][0]
    order = [examples.words[i] for i in np.argsort(-(examples.word_vectors @ r), kind="stable")]
    ends = zip(examples.labels, (order[:SHOWN], order[::-1][:SHOWN]), strict=True)
    lines = [f"words nearest to {label!r}: {', '.join(words)}" for label, words in ends]
    if params.bias_words:
        whole = fit(examples, params.model_copy(update={"bias_words": 0}))["direction"][0].astype(np.float64)
        lines.append(f"removed: {', '.join(bias(examples, whole, params.bias_words)[1])}")
    return lines


def logits(image: Array, columns: Columns, params: Params) -> Array:
    along = image @ columns.assets["direction"].T + columns.assets["offset"]
    scaled: Array = np.float32(params.scale or 0) * along
    return scaled


def _unit(vector: Array) -> Array:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


ASSETS = {"direction": Asset(("C", "D")), "offset": Asset(("C",))}
FIT = Fit(fit, grid, reads=("words",), labels=2, notes=notes)
HEADS.register("direction")(Head(Params, logits, softmax, ASSETS, FIT))
