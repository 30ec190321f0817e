"""Pictures and an instruction -> scores by the graph `rank`, for bundles that were trained to order pictures.

Graphs: image -> image_tokens [B, N, D]; text -> text_tokens [B, T, D]; rank reads both -> scores [B]. The instruction's
tokens are computed once and cached; each picture is a row of the calls, which a driver merges.

Source: Yu et al. 2024 (arXiv 2412.06760).
"""

from collections.abc import Callable

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.flow import Array, CacheGet, CachePut, Call, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import exactly
from calmclip.models.tasks.features import prepared

RANK = "rank"  # the graph
IMAGE, TEXT, SCORES = "image_tokens", "text_tokens", "scores"
INSTRUCTIONS = "tokens of text"  # the cache's name for the tokens of an instruction


def scorer(bundle: Bundle, instruction: str) -> Flow[Callable[[Picture], Flow[float]]]:
    """-> the flow from a picture to its score. Raises `TextTooLong`."""
    tokens = yield from _tokens(bundle, instruction)

    def score(image: Picture) -> Flow[float]:
        feeds, _ = yield from prepared(bundle, image)
        seen = yield Call("image", feeds)
        answer = yield Call(RANK, {IMAGE: seen[IMAGE], TEXT: tokens})
        return float(answer[SCORES][0])

    return score


def _tokens(bundle: Bundle, instruction: str) -> Flow[Array]:
    """-> float32 [1, T, D]. In the cache they count as T rows."""
    tokens: Array
    if cached := (yield CacheGet(INSTRUCTIONS, (instruction,))):
        tokens = cached[instruction]["tokens"]
        return tokens
    preparer = bundle.text()
    answer = yield Call("text", preparer.padded([preparer.tokens(instruction, 0)]))
    tokens = answer[TEXT]
    yield CachePut(INSTRUCTIONS, instruction, {"tokens": tokens}, tokens.shape[1])
    return tokens


def check(manifest: Manifest) -> None:
    """Raises `ValueError` if the graphs do not fit together."""
    graphs = manifest.graphs
    exactly(RANK, "inputs", graphs[RANK].inputs, (IMAGE, TEXT))
    exactly(RANK, "outputs", graphs[RANK].outputs, (SCORES,))
    for role, name in (("image", IMAGE), ("text", TEXT)):
        exactly(role, "outputs", graphs[role].outputs, (name,))
        if graphs[role].outputs[name] != graphs[RANK].inputs[name]:
            raise ValueError(f"the input {name!r} of `rank` and the output of {role!r} differ in dtype or shape")
