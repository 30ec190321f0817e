"""The method gradient of the task explain: signed gradient x attention, read from the graph `attribution`.

The contribution of a word is the sum over its tokens; a token belongs to the first word that has a character of it.
Tokens of no word (the start and the end of a text, punctuation) belong to no word. `export.towers.attribution` has the
formula. The graph runs once for a picture and a caption, and its contributions need not sum to the cosine.
"""

from collections.abc import Sequence

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.tasks.contributions import Scene, Told
from calmclip.models.tasks.words import Span, words

ROLE = "attribution"


def gradient(bundle: Bundle, scene: Scene) -> Flow[Told]:
    """Raises `BadRequest` for a caption whose words the text's cleaning joins or splits."""
    text = bundle.text()
    tokens = text.located(scene.caption)
    spans = scene.spans if tokens.text == scene.caption else words(tokens.text)
    if len(spans) != len(scene.spans):
        raise BadRequest(
            f"the caption {scene.caption[:40]!r} is cleaned to {tokens.text[:40]!r}, which has {len(spans)} words "
            f"instead of {len(scene.spans)}; write it in plain characters, or take the method leave_one_out"
        )
    feeds = text.padded([tokens.ids])
    outputs = yield Call(ROLE, {**feeds, "image_embeds": scene.image[None]})
    return Told(float(outputs["score"][0]), of_words(outputs["contributions"][0], tokens.offsets, spans))


def of_words(contributions: Array, offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Array:
    """``contributions`` [T] of tokens, the first of which have ``offsets`` -> float64 [N], of ``spans`` in their order.
    A token without characters is a special one."""
    sums = np.zeros(len(spans))
    for value, (start, end) in zip(contributions, offsets, strict=False):
        places = (place for place, span in enumerate(spans) if start < span.end and span.start < end)
        if start < end and (place := next(places, None)) is not None:
            sums[place] += float(value)
    return sums
