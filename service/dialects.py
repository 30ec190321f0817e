"""`Dialect`: how clients of another protocol read a problem; `Endpoint.dialect` says which one an endpoint speaks.

A problem document (RFC 9457) stays whole. A dialect adds fields beside it, and may answer with other statuses, because
libraries choose their exception and whether they retry by the status.

Source: OpenAI's API reference, "Error codes"; `specification/protocol/inference_rest.md` of
https://github.com/kserve/open-inference-protocol.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """A problem that is about to be answered. ``where``: the first place in the body that is wrong, "" if unknown."""

    slug: str
    status: int
    detail: str
    where: str


@dataclass(frozen=True, eq=False)
class Dialect:
    """``fields``: what stands beside the problem document. ``statuses``: our status -> the protocol's."""

    fields: Callable[[Fault], Mapping[str, Any]] = lambda fault: {}
    statuses: Mapping[int, int] = field(default_factory=dict)

    def status(self, status: int) -> int:
        return self.statuses.get(status, status)


# Our slugs -> the codes that OpenAI has for the same; another slug is its own code, with underscores.
OPENAI_CODES = {"unauthorized": "invalid_api_key", "text-too-long": "context_length_exceeded"}
# The field of a request that such a problem is about, if the document does not list places.
OPENAI_PARAMS = {"model-not-found": "model", "task-not-served": "model"} | dict.fromkeys(
    ("text-too-long", "unsupported-image", "image-too-large", "picture-not-fetched"), "input"
)


def _openai(fault: Fault) -> dict[str, Any]:
    return {
        "error": {
            "message": fault.detail,
            "type": "server_error" if fault.status >= 500 else "invalid_request_error",
            "param": fault.where or OPENAI_PARAMS.get(fault.slug),
            "code": OPENAI_CODES.get(fault.slug, fault.slug.replace("-", "_")),
        }
    }


OURS = Dialect()
# OpenAI answers 400 to a wrong request. Its library repeats a 409, which it takes for a lock that will be free soon.
OPENAI = Dialect(_openai, {409: 400, 415: 400, 422: 400})
INFERENCE = Dialect(lambda fault: {"error": fault.detail})
