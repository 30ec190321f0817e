"""The graph `dense` over a picture, and the graph `guide` whose map it may read.

    guide: pixels -> patches float32 [B, h2, w2, C]
    dense: pixels, guide float32 [B, h2, w2, C] -> patches float32 [B, h, w, D], ...

Both graphs see the same part of the picture, each by its own preprocessing.
"""

from collections.abc import Mapping
from functools import partial

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import GUIDE, ImagePreprocess, Manifest
from calmclip.models.flow import Arrays, Call, Flow, Work
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks.features import unit

DENSE = "dense"
Views = Mapping[str, Arrays]  # role -> the feeds that show one part of a picture; `dense` is the last


def roles(bundle: Bundle) -> tuple[str, ...]:
    """The graphs that see a picture, in the order in which they run."""
    return (GUIDE, DENSE) if GUIDE in bundle.graph(DENSE).inputs else (DENSE,)


def views(bundle: Bundle, image: Picture) -> Flow[tuple[Views, Frame]]:
    """The whole picture, and the `Frame` that maps it to the input of `dense`. Raises `BadImage`, `ImageTooLarge`."""
    picture = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    feeds: dict[str, Arrays] = {}
    for role in roles(bundle):
        preparer = bundle.image(role)
        pixels, frame = yield Work("preprocess", partial(preparer.prepare, picture))
        feeds[role] = {preparer.spec.input: pixels}
    return feeds, frame


def look(feeds: Views) -> Flow[Arrays]:
    """Outputs of `dense`. A guide's unit patches are its ``keys``."""
    outputs: Arrays
    if GUIDE not in feeds:
        outputs = yield Call(DENSE, feeds[DENSE])
        return outputs
    patches = (yield Call(GUIDE, feeds[GUIDE]))["patches"]
    outputs = yield Call(DENSE, {**feeds[DENSE], GUIDE: patches})
    return {"keys": unit(patches), **outputs}


def check_guide(manifest: Manifest) -> None:
    """Raises `ValueError` if `dense` reads a guide and the manifest's graph of it is not one that `views` can feed."""
    wanted = manifest.graphs[DENSE].inputs.get(GUIDE)
    if wanted is None:
        return
    graph = manifest.graphs.get(GUIDE)
    given = graph and graph.outputs.get("patches")
    if graph is None or not isinstance(graph.preprocess, ImagePreprocess) or given != wanted:
        raise ValueError(
            f"graph 'dense' has an input 'guide', {wanted.dtype} {list(wanted.shape)}: it needs a graph 'guide' that "
            "takes pictures, and whose output 'patches' is the same"
        )
