"""GDA head: zero-shot logits plus those of Gaussians with one covariance, fitted to a few pictures of each label.

Source: Wang et al. 2024 (arXiv 2402.04087): the classifier, labels without a picture (base to new), and pictures
         without a label (expectation maximization). Kubokawa and Srivastava 2008 for the shrunk precision.
In:     image [B, D], columns.text [C, D], unit rows.
Assets: weight float32 [C, D] = P mu_c, and bias float32 [C] = ln(1 / C) - mu_c P mu_c / 2, for the means mu_c of the
        labels; P = D ((N - 1) S + shrinkage tr(S) I)^-1, where S is their common covariance.
Out:    logits float32 [B, C] = scale * cosine + alpha * (image . weight + bias); scores sum to 1 over C.

With pictures that have no label, each of them counts for a label by the probability that the labels have for it. The
first probabilities are those of zero-shot; in later ones both terms have equal spread.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

NEAREST, COPIES = 64, 16  # of a label without a picture, for 16 pictures of each other label, as published
ROUNDS = 10  # of expectation maximization
HALF_DECADES = 10 ** (np.arange(-8, 1) / 2)  # of the zero-shot scale


class Params(FrozenModel):
    scale: float | None = Field(default=None, gt=0, le=1e4)  # None: the bundle's
    alpha: float | None = Field(default=None, ge=0, le=1e6)  # None: the pictures choose
    shrinkage: float = Field(default=1.0, ge=0, le=1e6)


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    """`alpha` grows with the scale of zero-shot, beside which it stands; 0 is zero-shot. Without labelled pictures the
    middle value gives both terms the same spread."""
    if len(examples.truth):
        alphas = [0.0, *(examples.scale * HALF_DECADES).tolist()]
    else:
        weight, bias = maximized(examples, Params().shrinkage)
        alphas = (equal_alpha(examples, weight, bias) * 10 ** (np.arange(-3, 4) / 2)).tolist()
    return {"scale": (examples.scale,), "alpha": alphas}


def fit(examples: Examples, params: Params) -> Arrays:
    if examples.unlabelled is not None:
        weight, bias = maximized(examples, params.shrinkage)
    else:
        shares = np.eye(len(examples.labels))[examples.truth]
        counts = shares.sum(axis=0)
        if counts.all():
            weight, bias = gaussians(examples.image, shares, params.shrinkage)
        else:
            weight, bias = with_new(examples, counts, params.shrinkage)
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def gaussians(image: Array, shares: Array, shrinkage: float) -> tuple[Array, Array]:
    """``shares`` float [N, C]: the part of each picture that counts for each label -> weight [C, D], bias [C]."""
    means = _means(image, shares)
    return _classifier(means, precise(means, image, shares, shrinkage))


def precise(rows: Array, image: Array, shares: Array, shrinkage: float) -> Array:
    """``rows`` float64 [R, D] times P of the pictures. Fewer pictures than dimensions: by the matrix identity of
    Woodbury, a system of N instead of D equations.

    Pictures that equal the mean of their label have no spread; then that around the mean of all stands for it.
    """
    wide = image.astype(np.float64)
    count, dim = wide.shape
    means = _means(wide, shares)
    scatter_of = shares / np.maximum(shares.sum(axis=0), 1e-12)
    trace = (wide**2).sum() - ((scatter_of.T @ wide) * (shares.T @ wide)).sum()
    if trace < 1e-9 * count:
        spread = ((wide - wide.mean(axis=0)) ** 2).sum() or 1.0
        alike: Array = rows * (dim * max(count - 1, 1) / spread)
        return alike
    ridge = shrinkage * trace / max(count - 1, 1)
    if ridge and count < dim:
        centred = np.eye(count) - scatter_of @ shares.T  # scatter = image^T centred image
        inner = np.linalg.solve(centred @ (wide @ wide.T) + ridge * np.eye(count), centred @ wide)
        dual: Array = dim / ridge * (rows - (rows @ wide.T) @ inner)
        return dual
    scatter = wide.T @ wide - (means.T * shares.sum(axis=0)) @ means
    product: Array
    if ridge:
        product = np.linalg.solve(scatter + ridge * np.eye(dim), dim * rows.T).T
    else:
        product = dim * rows @ np.linalg.pinv(scatter, hermitian=True)
    return product


def with_new(examples: Examples, counts: Array, shrinkage: float) -> tuple[Array, Array]:
    """Labels without a picture get the pictures nearest to their text, and copies of the text. `NEAREST` and `COPIES`
    shrink with the number of pictures that the other labels have. The two precisions are averaged."""
    size = min(1.0, counts[counts > 0].mean() / COPIES)
    nearest, copies = min(len(examples.image), round(NEAREST * size)), max(1, round(COPIES * size))
    new = np.flatnonzero(counts == 0)
    texts = examples.text[new]
    order = np.argsort(-(texts @ examples.image.T), axis=1, kind="stable")[:, :nearest]
    rows = np.concatenate([examples.image[order], texts[:, None].repeat(copies, axis=1)], axis=1)
    image, shares = rows.reshape(-1, rows.shape[2]), np.eye(len(new)).repeat(rows.shape[1], axis=0)
    of_shown = np.eye(len(counts))[examples.truth][:, counts > 0]
    means = np.empty(examples.text.shape)
    means[counts > 0], means[new] = _means(examples.image, of_shown), _means(image, shares)
    both = precise(means, examples.image, of_shown, shrinkage), precise(means, image, shares, shrinkage)
    return _classifier(means, (both[0] + both[1]) / 2)


def maximized(examples: Examples, shrinkage: float) -> tuple[Array, Array]:
    """Weight and bias after `ROUNDS` of expectation maximization; labelled pictures keep their label."""
    assert examples.unlabelled is not None
    image = np.concatenate([examples.image, examples.unlabelled])
    known = np.eye(len(examples.labels))[examples.truth]
    zero_shot = examples.scale * (examples.unlabelled @ examples.text.T).astype(np.float64)
    posterior = softmax(zero_shot)
    for _ in range(ROUNDS):
        weight, bias = gaussians(image, np.concatenate([known, posterior]), shrinkage)
        alpha = equal_alpha(examples, weight, bias)
        posterior = softmax(zero_shot + alpha * (examples.unlabelled @ weight.T + bias))
    return weight, bias


def equal_alpha(examples: Examples, weight: Array, bias: Array) -> float:
    """The alpha at which both terms have the same spread over labels, for the unlabelled pictures."""
    assert examples.unlabelled is not None
    zero_shot = (examples.unlabelled @ examples.text.T).astype(np.float64)
    gaussian = examples.unlabelled @ weight.T + bias
    return float(examples.scale * zero_shot.std(axis=1).mean() / max(gaussian.std(axis=1).mean(), 1e-12))


def notes(examples: Examples, params: Params, assets: Arrays) -> Sequence[str]:
    without = [label for i, label in enumerate(examples.labels) if i not in set(examples.truth.tolist())]
    if examples.unlabelled is not None:
        return (f"{len(examples.unlabelled)} pictures without a label were used, by expectation maximization",)
    return tuple(f"{label!r} has no picture; it got those nearest to its text" for label in without)


def logits(image: Array, columns: Columns, params: Params) -> Array:
    zero_shot = np.float32(params.scale or 0) * (image @ columns.text.T)
    gaussian = image @ columns.assets["weight"].T + columns.assets["bias"]
    return zero_shot + np.float32(params.alpha or 0) * gaussian


def _means(image: Array, shares: Array) -> Array:
    means: Array = shares.T @ image.astype(np.float64) / np.maximum(shares.sum(axis=0), 1e-12)[:, None]
    return means


def _classifier(means: Array, weight: Array) -> tuple[Array, Array]:
    return weight, np.log(1 / len(means)) - (weight * means).sum(axis=1) / 2


ASSETS = {"weight": Asset(("C", "D")), "bias": Asset(("C",))}
FIT = Fit(fit, grid, affine=("alpha",), reads=("unlabelled",), open=True, notes=notes)
HEADS.register("gda")(Head(Params, logits, softmax, ASSETS, FIT))
