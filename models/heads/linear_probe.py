"""Linear probe head: logistic regression on the pictures' vectors, without the texts.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.2 and appendix A.3; the solver is scikit-learn's.
In:     image [B, D], unit rows.
Assets: weight float32 [C, D], bias float32 [C].
Out:    logits float32 [B, C] = image . weight + bias; scores sum to 1 over C.

The fit needs scikit-learn, of the extra `eval`; the head itself does not.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.extras import missing
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

CS = (0.1, 1.0, 10.0, 100.0, 1000.0)
ITERATIONS = 1000


class Params(FrozenModel):
    C: float | None = Field(default=None, gt=0, le=1e9)  # scikit-learn's name: the inverse of the L2 penalty


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    return {"C": CS}


def ready() -> None:
    """Raises `ExtraMissing` without scikit-learn."""
    if not find_spec("sklearn"):
        raise missing("the fit of 'linear_probe'", "scikit-learn", "eval")


def fit(examples: Examples, params: Params) -> Arrays:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=params.C, max_iter=ITERATIONS).fit(examples.image, examples.truth)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two labels it has the second one's log-odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def logits(image: Array, columns: Columns, params: Params) -> Array:
    return image @ columns.assets["weight"].T + columns.assets["bias"]


ASSETS = {"weight": Asset(("C", "D")), "bias": Asset(("C",))}
HEADS.register("linear_probe")(Head(Params, logits, softmax, ASSETS, Fit(fit, grid, ("C",), ready=ready)))
