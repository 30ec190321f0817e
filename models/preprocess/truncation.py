"""`Truncation`: the treatment of a text with more tokens than the context of its graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from calmclip.models.errors import BadRequest, suggestion

Method: TypeAlias = Literal["none", "end", "compress", "chunk"]
Pooling: TypeAlias = Literal["mean", "max"]
METHODS: tuple[Method, ...] = get_args(Method)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
NAMED: Mapping[bool, Method] = MappingProxyType({False: "none", True: "end"})  # a manifest's and TEI's booleans
LEAST_STRIDE = 8  # a stride is at least this part of a window, so that a text runs at most so many times


@dataclass(frozen=True)
class Truncation:
    """``method``:

    none      an error
    end       the first tokens are read, and the last one, which ends a text
    compress  sentences that stay near the vector of the whole are read (`tasks.compression`)
    chunk     windows of ``context`` tokens are read; their unit vectors are pooled, and the result has length 1

    ``stride``: tokens between the starts of two windows; None: the windows touch. ``pooling``: the mean, weighted by
    the tokens of a window, or the maximum of each dimension. Raises `BadRequest`: an unknown name, or options of
    ``chunk`` with another method.
    """

    method: Method = "none"
    stride: int | None = None
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        for key, value, known in (("truncate", self.method, METHODS), ("pooling", self.pooling, POOLINGS)):
            if value not in known:
                raise BadRequest(f"{key} is {value!r}; {suggestion(str(value), known)}", known=known)
        if self.method != "chunk" and (self.stride, self.pooling) != (None, "mean"):
            raise BadRequest(f"truncate is {self.method!r}; `stride` and `pooling` need truncate = chunk")
        if self.stride is not None and self.stride < 1:
            raise BadRequest(f"stride is {self.stride}; expected at least 1 token")

    @classmethod
    def of(cls, value: "bool | Method | Truncation") -> "Truncation":
        """Of a name, or of a boolean: true is ``end``, false is ``none``."""
        if isinstance(value, Truncation):
            return value
        return cls(NAMED[value] if isinstance(value, bool) else value)

    @property
    def whole(self) -> bool:
        """Whether a long text is read to its end."""
        return self.method in ("compress", "chunk")

    @property
    def cached(self) -> str:
        """The cache's name for the vectors of texts that were too long."""
        return f"text, {self.method} {self.stride} {self.pooling}"
