"""Things by the boxes of a detector and a mask in each box; other labels by the dense map.

1. The graph `regions` proposes boxes with vectors. A box has the label of its best softmax among labels and background
   words; its score is that chance times its objectness. Boxes above a threshold stay.
2. The graph `masks` says for each place of a box whether the thing lies there, whatever it is called.
3. A box covers what is behind it. With the chance a of its mask at a pixel, and its label c:

       p <- (1 - a) p,   p_c <- p_c + a      from the least score / sqrt(area) to the largest

   so a small thing lies before a large one. What no box covers belongs to the background.
4. A detector finds only what it was trained to find. The graph `known` tells how near a label is to the nearest such
   name. Below `sure` a label begins with the chances of the dense map, over which the boxes are painted: a pony is
   found by a box, and snow, which is as near to a name, by the map. There the softmax of each cell, scale * cosine with
   all texts, is averaged over the cells that look alike:

       A_ij = relu(cos(f_i - mean f, f_j - mean f) - margin), rows normalized;   f: the backbone's map at stride 16

   The background is the best of its words and of the known labels, plus a bias.

If all labels are at least at `sure`, `dense` does not run; if all are below `near`, `regions` and `masks` do not.

Source: for masks, He et al. 2017 (arXiv 1703.06870) and Bolya et al. 2019 (arXiv 1904.02689); for the affinity,
Wysoczanska et al. 2024 (arXiv 2312.12359), section 3.2. How they are joined was measured: docs/segmentation.md.
Reads:  `regions` with `mask_features`, `masks`, `known`; `dense` with `map16`.
Out:    logarithms of chances, on a plane of its own of at most `CELLS` cells.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel, Manifest
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, Flow, Work
from calmclip.models.heads.cosine import softmax
from calmclip.models.preprocess.image import whole_size
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, Segmenter
from calmclip.models.segmenters.maps import in_cells
from calmclip.models.tasks import elongated
from calmclip.models.tasks.features import prepared, unit

CELLS = 1 << 13  # of the plane: about 105 x 78 of a photograph
MARGIN = 0.1  # of a box's sides, around it, that its mask covers, too
LEAST = 1e-4  # of a chance: its logarithm is finite, so that it can be interpolated
STRIDE16 = 2  # cells of `map16` for one of `patches`, in each direction


class Params(FrozenModel):
    min_score: float = Field(default=0.3, ge=0, le=1, description="of a box, from which on it is painted")
    most: int = Field(default=40, ge=1, le=100, description="boxes at most, the best")
    box_scale: float = Field(default=15.0, gt=0, le=1e4, description="times the cosine of a box and a text")
    near: float = Field(
        default=0.55, ge=-1, le=2, description="cosine with a name of the detector from which on boxes are looked for"
    )
    sure: float = Field(
        default=0.8, ge=-1, le=2, description="the same cosine from which on the dense map is not asked for a label"
    )
    scale: float = Field(default=20.0, gt=0, le=1e4, description="times the cosine of a cell and a text")
    bias: float = Field(default=1.0, ge=-100, le=100, description="added to the logit of a cell's background")
    margin: float = Field(default=0.2, ge=0, lt=1, description="cosine above which two cells look alike")


@dataclass(frozen=True)
class Painting:
    """Boxes to paint, the hindmost first: ``boxes`` float32 [N, 4] in pixels of the upright picture, ``names`` int [N],
    ``masks``: of each float32 [S, S], logits over the enlarged box."""

    boxes: Array
    names: Array
    masks: Sequence[Array]


def flow(bundle: Bundle, scene: Scene, params: Params) -> Flow[ScoreMap]:
    if scene.windows is not None:
        raise BadRequest("method 'boxes' has no windows: it looks at parts of an elongated picture by itself; leave "
                         "`windows` out, or choose another method")  # fmt: skip
    nearest = (yield Call("known", {"text_embeds": scene.text}))["nearest"]
    known = nearest >= max(params.near, params.sure)
    start = None
    if not known.all():
        start = yield from dense_chances(bundle, scene, known, params)
    if not (nearest >= params.near).any():
        assert start is not None
        return score_map(*start)
    painting = yield from things(bundle, scene, params)
    answer: ScoreMap = yield Work("postprocess", lambda: painted(scene, start, painting, known))
    return answer


def things(bundle: Bundle, scene: Scene, params: Params) -> Flow[Painting]:
    """The boxes of the picture and of its slices, with their masks."""
    views = yield from elongated.views(bundle, scene.image)
    answers = yield from elongated.run(views)
    outputs, frame, view = elongated.merged(views, answers)
    chances = softmax(np.float32(params.box_scale) * (outputs["class_embeds"][0] @ _texts(scene).T))
    names = chances[:, : len(scene.labels)].argmax(axis=1)
    scores = chances[np.arange(len(names)), names] * outputs["objectness"][0]
    boxes = frame.to_original(outputs["boxes"][0])
    area = np.maximum((boxes[:, 2:] - boxes[:, :2]).clip(0, None).prod(axis=1), 1.0)
    best = np.argsort(-scores, kind="stable")[: params.most]
    best = best[(scores[best] >= params.min_score) & (boxes[best, :2] < boxes[best, 2:]).all(axis=1)]
    order = best[np.argsort(scores[best] / np.sqrt(area[best]), kind="stable")]
    masks: dict[int, Array] = {}
    seen = view[order]
    for number in np.unique(seen).tolist():  # the features are those of one view
        rows = np.flatnonzero(seen == number)
        placed = views[number].frame.to_input(boxes[order[rows]])
        feeds = {"mask_features": answers[number]["mask_features"], "boxes": placed[None]}
        masks |= zip(rows.tolist(), (yield Call("masks", feeds))["mask_logits"][0], strict=True)
    return Painting(boxes[order], names[order], [masks[row] for row in range(len(order))])


def _texts(scene: Scene) -> Array:
    texts: Array = np.concatenate((scene.text, scene.background))
    return texts


def painted(scene: Scene, start: tuple[Array, Frame] | None, painting: Painting, known: Array) -> ScoreMap:
    """The boxes over ``start``, the chances of the dense map and their frame; None: over the background alone."""
    width, height = whole_size(scene.image)
    scale = (CELLS / (width * height)) ** 0.5
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    frame = Frame(width, height, (columns / width, rows / height), (0.0, 0.0))
    chances = np.zeros((len(scene.labels) + 1, rows, columns), np.float32)
    if start is None:
        chances[-1] = 1
        used = {len(scene.labels)}
    else:
        down, across = (_resampled(count, axis, start) for axis, count in ((1, rows), (0, columns)))
        chances[:] = down @ start[0] @ across.T
        used = {*np.flatnonzero(~known).tolist(), len(scene.labels)}
    for box, name, mask in zip(frame.to_input(painting.boxes), painting.names.tolist(), painting.masks, strict=True):
        used.add(name)
        cover(chances, used, name, box, mask)
    return score_map(chances, frame)


def cover(chances: Array, used: Iterable[int], name: int, box: Array, mask: Array) -> None:
    """Paint one mask float32 [S, S] over ``box`` [4] in cells, in place. ``used``: the planes that may not be 0."""
    size = box[2:] - box[:2]
    low, high = box[:2] - MARGIN * size, box[2:] + MARGIN * size
    first = np.floor(low).astype(int).clip(0, None)
    last = np.ceil(high).astype(int).clip(None, (chances.shape[2], chances.shape[1]))
    samples = len(mask) / (high - low)  # in a cell
    across, down = (
        between((np.arange(first[axis], last[axis]) + 0.5 - low[axis]) * samples[axis], len(mask)) for axis in (0, 1)
    )
    share = 1 / (1 + np.exp(-(down @ mask @ across.T).clip(-30, 30)))
    part = (slice(first[1], last[1]), slice(first[0], last[0]))
    for plane in used:
        chances[plane][part] *= 1 - share
    chances[name][part] += share


def between(places: Array, cells: int) -> Array:
    """float32 [n, cells]: the bilinear weights of ``places``, in cells from the first cell's edge on. What lies
    outside has the values of the border."""
    inner = (places - 0.5).clip(0, cells - 1)
    weights: Array = (1 - np.abs(inner[:, None] - np.arange(cells))).clip(0, None).astype(np.float32)
    return weights


def _resampled(count: int, axis: int, start: tuple[Array, Frame]) -> Array:
    """[count, cells]: from the dense map's rows or columns to the plane's. ``axis``: 0 for x, 1 for y."""
    chances, frame = start
    pixels = (np.arange(count) + 0.5) * ((frame.width, frame.height)[axis] / count)
    return between(pixels * frame.scale[axis] + frame.offset[axis], chances.shape[2 - axis])


def dense_chances(bundle: Bundle, scene: Scene, known: Array, params: Params) -> Flow[tuple[Array, Frame]]:
    """-> chances float32 [C + 1, h, w], the background last, and the frame of their cells, all in the picture."""
    feeds, frame = yield from prepared(bundle, scene.image, "dense")
    outputs: Arrays = yield Call("dense", feeds)
    patches, map16 = outputs["patches"][0], outputs["map16"][0]
    cells = in_cells(frame, bundle.image("dense").spec.size, map16.shape[:2])
    chances = yield Work("postprocess", lambda: mixed(patches, map16, scene, known, cells, params))
    return chances, cells


def mixed(patches: Array, map16: Array, scene: Scene, known: Array, frame: Frame, params: Params) -> Array:
    """patches [h, w, D] and map16 [2 h, 2 w, C] -> chances float32 [C + 1, rows, columns], without the padding."""
    grid = map16.shape[:2]
    rows, columns = (
        min(grid[axis], max(1, int(np.ceil(pixels * frame.scale[1 - axis] - 1e-6))))
        for axis, pixels in ((0, frame.height), (1, frame.width))
    )
    units = unit(patches.reshape(-1, patches.shape[-1]))
    logits = np.float32(params.scale) * units @ scene.text.T
    others = np.concatenate((scene.background, scene.text[known]))
    rest = np.full(len(units), -np.inf, np.float32)
    if len(others):
        rest = np.float32(params.scale) * (units @ others.T).max(axis=1) + np.float32(params.bias)
    logits[:, known] = -np.inf  # boxes find them
    chances = softmax(np.concatenate((logits, rest[:, None]), axis=1)).reshape(*patches.shape[:2], -1)
    down = between((np.arange(rows) + 0.5) / STRIDE16, patches.shape[0])
    across = between((np.arange(columns) + 0.5) / STRIDE16, patches.shape[1])
    fine = down @ chances.transpose(2, 0, 1) @ across.T
    alike = affinity(map16[:rows, :columns], params.margin)
    planes: Array = (fine.reshape(len(fine), -1) @ alike.T).reshape(fine.shape)
    return planes


def affinity(features: Array, margin: float) -> Array:
    """features [h, w, C] -> float32 [h w, h w], rows of sum 1: step 4 of the module's docstring. A cell that is like no
    cell, as in a picture of one colour, is like itself."""
    rows = features.reshape(-1, features.shape[-1])
    centred = unit(rows - rows.mean(axis=0))
    weights = np.maximum(centred @ centred.T - np.float32(margin), 0)
    alone = weights.sum(axis=1) <= 0
    weights[alone, alone] = 1
    normalized: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalized


def score_map(chances: Array, frame: Frame) -> ScoreMap:
    """chances [C + 1, h, w], the background last."""
    logits = np.log(np.maximum(chances, np.float32(LEAST)))
    return ScoreMap(logits[:-1], logits[-1], frame)


def why_not(manifest: Manifest) -> str | None:
    needed = {"regions": ("boxes", "class_embeds", "objectness", "mask_features"), "masks": ("mask_logits",)}
    needed |= {"known": ("nearest",), "dense": ("patches", "map16"), "text": ()}
    for role, outputs in needed.items():
        graph = manifest.graphs.get(role)
        if graph is None or not {*outputs} <= {*graph.outputs}:
            lacking = f"a graph {role!r}" + (f" with the outputs {', '.join(outputs)}" if outputs else "")
            return f"it has not {lacking}, as the built-in model has"
    return None


SEGMENTERS.register("boxes")(
    Segmenter(Params, "masks in the boxes of a detector; other labels by the dense map", why_not, flow, rank=1)
)
