"""`Suppression`: the settings of soft-NMS, with their bounds, defaults and descriptions.

The manifest, the task `detect`, its command, the op's promise and the service's schemas read them here.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array

Method = Literal["hard", "linear", "gaussian"]
METHODS: tuple[Method, ...] = get_args(Method)  # the op SoftNMS codes a method as its index here


class Bounds(NamedTuple):
    low: float
    high: float
    description: str


NUMBERS = {
    "sigma": Bounds(1e-6, 1e6, "gaussian: a larger value suppresses less"),
    "iou_threshold": Bounds(0.0, 1.0, "hard and linear: the overlap (IoU) above which a box is suppressed"),
    "min_score": Bounds(0.0, 1.0, "boxes with a lower score are removed, before and after suppression"),
    "max_output": Bounds(1, 1000, "at most this many boxes"),
}


def _bounded(name: str) -> Any:
    low, high, description = NUMBERS[name]
    return Field(ge=low, le=high, description=description)


Sigma = Annotated[float, _bounded("sigma")]
IouThreshold = Annotated[float, _bounded("iou_threshold")]
MinScore = Annotated[float, _bounded("min_score")]
MaxOutput = Annotated[int, _bounded("max_output")]
PerClass = Annotated[bool, Field(description="boxes of different labels do not suppress each other")]


@dataclass(frozen=True)
class Suppression:
    """Soft-NMS as the op SoftNMS runs it (Bodla et al. 2017, arXiv 1704.04503).

    A box loses score to each better box. hard: the score becomes 0 if their IoU is above ``iou_threshold``; linear: it
    is multiplied by 1 - IoU above that threshold; gaussian: by exp(-IoU^2 / sigma) at every IoU.
    """

    method: Method = "gaussian"
    sigma: Sigma = 0.5
    iou_threshold: IouThreshold = 0.3
    min_score: MinScore = 0.15
    max_output: MaxOutput = 100
    per_class: PerClass = True

    def tensors(self) -> dict[str, Array]:
        """The op's inputs, each of shape [1]. Raises `BadRequest` naming the value out of range."""
        if self.method not in METHODS:
            raise BadRequest(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        for name, (low, high, _) in NUMBERS.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise BadRequest(f"{name} is {value}; expected {low} to {high}")
        integers = {"method": METHODS.index(self.method), "per_class": self.per_class, "max_output": self.max_output}
        floats = {"iou_threshold": self.iou_threshold, "sigma": self.sigma, "min_score": self.min_score}
        tensors = {name: np.array([value], np.int64) for name, value in integers.items()}
        return tensors | {name: np.array([value], np.float32) for name, value in floats.items()}


DEFAULT = Suppression()  # of a request and a bundle that set nothing
