"""Each op in plain numpy, float64 inside: the oracle of its kernels and of its local function."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import numpy as np
from PIL import Image

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.ops.spec import ACTIVATIONS, IMAGE_TO_PIXELS, METHODS, Activation, Method
from calmclip.models.preprocess.image import ImagePreparer


def softmax(x: Array, axis: int = -1, gamma: float = 0.0, zeta: float = 1.0) -> Array:
    """clamp((zeta - gamma) * softmax(x) + gamma, 0, 1) along ``axis``; rows are not normalized again.

    x float32 [...] -> float32 [...], float64 inside. gamma <= 0 and zeta >= 1 are read as float32; 0 and 1 are plain
    softmax. -inf counts as the lowest finite float32, so a row with only masked values is uniform. A row that holds NaN
    or +inf is NaN throughout. An empty axis gives an empty output.
    Raises `BadRequest` for an axis that x does not have, and for gamma and zeta out of range.
    Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4.
    """
    value = np.asarray(x, np.float32).astype(np.float64)
    low, high = float(np.float32(gamma)), float(np.float32(zeta))
    if not -value.ndim <= axis < value.ndim:
        raise BadRequest(f"axis is {axis} and x has the shape {list(value.shape)}; expected an axis that x has")
    most = float(np.float32(1e30))
    if not (-most <= low <= 0 and 1 <= high <= most):
        raise BadRequest(f"gamma is {gamma} and zeta {zeta}; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30")
    if value.size == 0:
        return value.astype(np.float32)
    value = np.maximum(value, float(np.finfo(np.float32).min))
    with np.errstate(invalid="ignore"):  # inf - inf gives the specified NaN
        power = np.exp(value - value.max(axis, keepdims=True))
        p = power / power.sum(axis, keepdims=True)
    result: Array = np.clip((high - low) * p + low, 0.0, 1.0).astype(np.float32)
    return result


def softmax_jacobian(p: Array) -> Array:
    """diag(p) - p p^T: the derivative of softmax where it is ``p`` [..., N], float64 [..., N, N].

    Its spectral norm is at most 1/2, so two outputs are at most half as far apart as their inputs.
    Source: Li et al. 2023 (arXiv 2304.13276), the gradient of softmax regression.
    """
    wide = np.asarray(p, np.float64)
    jacobian: Array = np.eye(wide.shape[-1]) * wide[..., None] - wide[..., :, None] * wide[..., None, :]
    return jacobian


class Kept(NamedTuple):
    """Best first. ``indices`` int64 [K] into the input, ``scores`` float32 [K] decayed, ``classes`` int64 [K]."""

    indices: Array
    scores: Array
    classes: Array


class Suppression(TypedDict, total=False):
    """The settings of `soft_nms` by name, for functions that pass them on."""

    method: Required[Method]
    per_class: bool
    iou_threshold: float
    sigma: float
    min_score: float
    max_output: int | None


def iou(box: Array, boxes: Array) -> Array:
    """IoU of ``box`` [4] with each of ``boxes`` [N, 4].

    0 for a box whose area is no normal, finite float32, and for two boxes if the sum of their areas overflows float32.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
        shared = np.prod(np.maximum(high - low, 0.0), axis=1)
        mine, areas = _area(box[None]), _area(boxes)
        good = (shared > 0) & _normal(mine) & _normal(areas) & _normal(mine + areas)
        return np.where(good, shared / np.where(good, mine + areas - shared, 1.0), 0.0)


def soft_nms(
    boxes: Array,
    scores: Array,
    classes: Array | None = None,
    *,
    method: Method,
    per_class: bool = False,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_output: int | None = None,
) -> Kept:
    """Take the best box, decay those that overlap it, drop those under ``min_score``; repeat.

    boxes [N, 4] x0 y0 x1 y1, scores [N], classes [N] (None: one class).
    Weight of a box with overlap o:   hard      0 where o > iou_threshold, else 1
                                      linear    1 - o where o > iou_threshold, else 1
                                      gaussian  exp(-o^2 / sigma)
    o is rounded to float32 before it is compared, so that float32 kernels agree on ties of whole pixels. A box whose
    weight is 0, or no normal float32, is dropped for any ``min_score``. Ties go to the lower index. N = 0 gives empty
    outputs.
    Raises `BadRequest` for a NaN score, naming its index, and for a sigma that is not positive.
    Source: Bodla et al. 2017 (arXiv 1704.04503), section 3; the score threshold as in mmcv, tested on every box.
    """
    box = np.asarray(boxes, np.float32).reshape(-1, 4).astype(np.float64)
    score = np.asarray(scores, np.float32).astype(np.float64)
    labels = np.zeros(len(score), np.int64) if classes is None else np.asarray(classes, np.int64)
    if (nan := np.flatnonzero(np.isnan(score))).size:
        raise BadRequest(f"score {nan[0]} is NaN; expected numbers")
    threshold, least, sigma = float(np.float32(iou_threshold)), float(np.float32(min_score)), float(np.float32(sigma))
    if not sigma > 0:
        raise BadRequest(f"sigma is {sigma}; expected more than 0")
    if method not in METHODS:
        raise BadRequest(f"method is {method!r}; expected one of {', '.join(METHODS)}")

    alive = score >= least
    kept: list[tuple[int, float]] = []
    while alive.any() and (max_output is None or len(kept) < max_output):
        candidates = np.flatnonzero(alive)
        best = int(candidates[np.argmax(score[candidates])])
        kept.append((best, score[best]))
        alive[best] = False
        others = np.flatnonzero(alive & (labels == labels[best])) if per_class else np.flatnonzero(alive)
        overlap = iou(box[best], box[others])
        if method == "gaussian":
            weight = np.exp(np.maximum(-(overlap**2) / sigma, -1e3))
        else:
            over = overlap.astype(np.float32) > threshold
            weight = np.where(over, 0.0 if method == "hard" else 1.0 - overlap, 1.0)
        stays = weight >= np.finfo(np.float32).tiny
        score[others] *= np.where(stays, weight, 1.0)
        alive[others] = stays & (score[others] >= least)
    indices = np.array([index for index, _ in kept], np.int64)
    return Kept(indices, np.array([s for _, s in kept], np.float32), labels[indices])


def soft_nms_batch(
    boxes: Array, scores: Array, classes: Array | None = None, **settings: Unpack[Suppression]
) -> tuple[Kept, Array]:
    """`soft_nms` of each image alone: boxes [B, N, 4], scores and classes [B, N].

    -> the kept boxes, one image after the other, ``indices`` into the N of their image, at most ``max_output`` of each;
    and batch_indices int64 [K], the image of each box. Raises `BadRequest` as `soft_nms` does, with the image.
    """
    images: list[Kept] = []
    for image in range(len(boxes)):
        try:
            labels = None if classes is None else classes[image]
            images.append(soft_nms(boxes[image], scores[image], labels, **settings))
        except BadRequest as error:
            raise BadRequest(f"image {image}: {error}") from None
    empty = Kept(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
    kept = Kept(*(np.concatenate(parts) for parts in zip(empty, *images, strict=True)))
    return kept, np.repeat(np.arange(len(images)), [len(image.indices) for image in images])


def _normal(area: Array) -> Array:
    limits = np.finfo(np.float32)
    normal: Array = (area >= limits.tiny) & (area <= limits.max)
    return normal


def image_to_pixels(image: Array, **attributes: Any) -> Array:
    """uint8 [H, W, 3] -> float32 [1, 3, h, w] by Pillow and numpy, as `ImagePreparer` without a library does it.

    ``attributes`` of `IMAGE_TO_PIXELS`; the others have their defaults. Of a picture over 40 million pixels
    `ImagePreparer` resizes only the visible part, and Pillow takes its position in float32, so the result may differ
    from the op by a grey level. Raises `BadRequest` for an array of another shape or type, and pydantic's
    ValidationError for attributes out of range.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise BadRequest(f"the picture is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]")
    values = IMAGE_TO_PIXELS.attributes | attributes
    values["shortest"] = values["shortest"] or None
    gain, bias = (np.array(values.pop(name), np.float32) for name in ("gain", "bias"))
    if gain.shape != (3,) or bias.shape != (3,) or not np.isfinite([gain, bias]).all():
        raise BadRequest(f"gain is {gain.tolist()} and bias {bias.tolist()}; expected 3 finite numbers each")
    preparer = ImagePreparer(ImagePreprocess.model_validate(values | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    preparer.gain, preparer.bias = gain.reshape(3, 1, 1), bias.reshape(3, 1, 1)
    return preparer.prepare(Image.fromarray(np.ascontiguousarray(image)))[0]


def image_to_quantized_pixels(image: Array, *, scale: float = 1.0, zero_point: int = 0, **attributes: Any) -> Array:
    """`image_to_pixels` -> uint8 by clip(rint(x / scale) + zero_point, 0, 255), in float32, half to even."""
    if not (np.isfinite(scale) and scale > 0):
        raise BadRequest(f"scale is {scale}; expected a finite number over 0")
    if not 0 <= zero_point <= 255:
        raise BadRequest(f"zero_point is {zero_point}; expected 0 to 255")
    steps = np.rint(image_to_pixels(image, **attributes) / np.float32(scale)) + np.float32(zero_point)
    quantized: Array = np.clip(steps, 0, 255).astype(np.uint8)
    return quantized


# on float64, by their names in `ACTIVATIONS`
_ACTIVATE: dict[Activation, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * 0.5 * (1 + np.tanh(1.702 / 2 * x)),  # a sigmoid without overflow
    "silu": lambda x: x * 0.5 * (1 + np.tanh(x / 2)),
}


def quant_linear(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array,
    y_scale: Array, y_zero: Array, *, activation: int = 0,
) -> Array:  # fmt: skip
    """A linear layer on uint8: f((x - x_zero) w * x_scale * weight_scale + bias), quantized.

    x uint8 [..., K], weight int8 [K, N]; x_scale float32 and x_zero uint8, one number each; weight_scale float32 [N] or
    one; bias float32 [N]; y_scale float32 and y_zero uint8, [N] or one each. -> uint8 [..., N].
    Sums are integers. The scaling is float32, two roundings. ``activation`` is an index into `ACTIVATIONS`; it is
    computed in float64 and rounded. Quantized as QuantizeLinear does it: clip(rint(y / y_scale) + y_zero, 0, 255), half
    to even.
    Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
    """
    y = _linear(x, x_scale, x_zero, weight, weight_scale, bias, activation)
    quantized: Array = np.clip(np.rint(y / y_scale) + np.asarray(y_zero, np.float32), 0, 255).astype(np.uint8)
    return quantized


def quant_pointwise(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array,
    y_scale: Array, y_zero: Array,
) -> Array:  # fmt: skip
    """`quant_linear` of each pixel of x uint8 [B, H, W, K]. -> uint8 [B, H, W, N]."""
    return quant_linear(x, x_scale, x_zero, weight, weight_scale, bias, y_scale, y_zero)


def quant_conv(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array, y_scale: Array,
    y_zero: Array, *, strides: tuple[int, int] = (1, 1), pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Array:  # fmt: skip
    """A convolution with channels last, quantized.

    x uint8 [B, H, W, C], weight int8 [h, w, C, N], bias float32 [N], y_scale and y_zero one or [N]; ``pads`` top, left,
    bottom, right -> uint8 [B, H', W', N]; no row or column if the window does not fit. Sums are integers; scale and
    bias are float32, two roundings; everything else is float64. Raises ValueError if x does not have C channels.
    Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
    """
    height, width, channels, columns = weight.shape
    if x.shape[-1] != channels:
        raise ValueError(f"x has {x.shape[-1]} channels; expected {channels}, because the weight is {weight.shape}")
    picture, sides = _padded(x, x_zero, (height, width), strides, pads)
    sums = np.zeros((len(x), *sides, columns), np.int64)
    for i, j in np.ndindex(height, width):
        sums += _taps(picture, (i, j), strides, sides) @ weight[i, j].astype(np.int64)
    return quantize(_scaled(sums, x_scale, weight_scale, bias).astype(np.float64), y_scale, y_zero)


def _padded(
    x: Array, x_zero: Array | int, window: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
) -> tuple[Array, tuple[int, ...]]:
    """-> x - x_zero, int64, with ``pads`` of 0; and how many windows fit along its height and width."""
    top, left, bottom, right = pads
    picture = x.astype(np.int64) - np.asarray(x_zero, np.int64)
    picture = np.pad(picture, ((0, 0), (top, bottom), (left, right), (0, 0)))
    steps = zip(picture.shape[1:3], window, strides, strict=True)
    return picture, tuple(max(0, (side - size) // stride + 1) for side, size, stride in steps)


def _taps(picture: Array, tap: tuple[int, int], strides: tuple[int, int], sides: tuple[int, ...]) -> Array:
    """The numbers that every window has at the place ``tap``: [B, *``sides``, C]."""
    rows, columns = (slice(at, None, stride) for at, stride in zip(tap, strides, strict=True))
    taps: Array = picture[:, rows, columns][:, : sides[0], : sides[1]]
    return taps


def _scaled(sums: Array, x_scale: Array, weight_scale: Array, bias: Array) -> Array:
    """Integer sums in float32, two roundings."""
    scale = np.asarray(x_scale, np.float32) * np.asarray(weight_scale, np.float32)
    scaled: Array = sums.astype(np.float32) * scale + bias
    return scaled


def quant_linear_to_float(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array,
    residual: Array, *, activation: int = 0,
) -> Array:  # fmt: skip
    """`quant_linear` before it is quantized, plus ``residual``, float32 [..., N] or one number. -> float32 [..., N]."""
    return _linear(x, x_scale, x_zero, weight, weight_scale, bias, activation) + np.asarray(residual, np.float32)


def quant_rows_linear(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array,
    residual: Array, *, activation: int = 0, gated: int = 0,
) -> Array:  # fmt: skip
    """`quant_linear_to_float` with a scale of x for each row, float32 [..., 1]. With ``gated``, the product of the two
    halves of the columns, the first behind the activation -> [..., N / 2]."""
    sums = (x.astype(np.int64) - np.asarray(x_zero, np.int64)) @ weight.astype(np.int64)
    y = sums.astype(np.float32) * np.asarray(x_scale, np.float32) * np.asarray(weight_scale, np.float32) + bias
    f, parts = _ACTIVATE[ACTIVATIONS[activation]], np.split(y.astype(np.float64), 2, -1) if gated else [y]
    first = f(parts[0].astype(np.float64))
    return (first * parts[1] if gated else first).astype(np.float32) + np.asarray(residual, np.float32)


def _linear(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array, activation: int
) -> Array:
    """`quant_linear` before it is quantized, float32."""
    sums = (x.astype(np.int64) - np.asarray(x_zero, np.int64)) @ weight.astype(np.int64)
    y = _scaled(sums, x_scale, weight_scale, bias)
    return _ACTIVATE[ACTIVATIONS[activation]](y.astype(np.float64)).astype(np.float32)


def quantize(x: Array, scale: Array | float, zero: Array | int) -> Array:
    """clip(rint(x / scale) + zero, 0, 255), half to even, in float64: [..., N] -> uint8 [..., N].

    ``scale`` and ``zero``: one for all, or one for each of the N columns. NaN gives 0.
    """
    steps = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64)) + np.asarray(zero, np.float64)
    quantized: Array = np.clip(np.where(np.isnan(steps), 0, steps), 0, 255).astype(np.uint8)
    return quantized


def quant_attention(
    q: Array, q_scale: float, q_zero: int, k: Array, k_scale: float, v: Array, v_scale: float, p_scale: float,
    mask: Array, y_scale: Array | float, y_zero: Array | int, *, heads: int, width: int,
    q_start: int = 0, k_start: int = 0, v_start: int = 0, gamma: float = 0.0, zeta: float = 1.0,
) -> Array:  # fmt: skip
    """softmax(q k^T + mask) v of each head, quantized.

    q uint8 [B, T, Q], k uint8 [B, S, K], v uint8 [B, S, V]; each uses the ``width`` columns from ``*_start`` on. mask
    float32 is added to [B, heads, T, S] as numpy broadcasts. -> uint8 [B, T, width]. Sums are int64, everything else
    is float64. Logits with their mask are at least the lowest float32; -inf counts as that.
    p is quantized at ``p_scale``. If that is 0, exp(logit - row maximum) is quantized at 1/255, and rows are divided by
    their sum afterwards. Raises `BadRequest` for a ``p_scale`` of 0 with gamma or zeta, ValueError for shapes that do
    not fit.
    Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5.
    """

    def heads_of(x: Array, start: int, zero: int) -> Array:
        """int64 [B, heads, tokens, width / heads]"""
        columns = x[..., start : start + width].astype(np.int64) - int(zero)
        return columns.reshape(*x.shape[:2], heads, width // heads).swapaxes(1, 2)

    queries, keys, values = heads_of(q, q_start, q_zero), heads_of(k, k_start, 128), heads_of(v, v_start, 128)
    scale = float(np.float32(q_scale)) * float(np.float32(k_scale))
    logits = (queries @ keys.swapaxes(2, 3)) * scale + np.asarray(mask, np.float64)
    logits = np.maximum(logits, float(np.finfo(np.float32).min))
    power = np.exp(logits - logits.max(-1, keepdims=True))
    low, high, step = (float(np.float32(number)) for number in (gamma, zeta, p_scale))
    if step == 0 and (low, high) != (0, 1):
        raise BadRequest(
            f"p_scale is 0, gamma {gamma} and zeta {zeta}; expected a p_scale over 0, or gamma 0 and zeta 1"
        )
    if step == 0:
        p = np.rint(power * 255).astype(np.int64)
        y = (p @ values) * (float(np.float32(v_scale)) / p.sum(-1, keepdims=True))
    else:
        wide = np.clip((high - low) * (power / power.sum(-1, keepdims=True)) + low, 0, 1)
        p = np.minimum(np.rint(wide / step), 255).astype(np.int64)
        y = (p @ values) * (float(np.float32(v_scale)) * step)
    return quantize(y.swapaxes(1, 2).reshape(*q.shape[:2], width), y_scale, y_zero)


def rotary_attention(
    q: Array, k: Array, v: Array, q_weight: Array, k_weight: Array, q_cos: Array, q_sin: Array, k_cos: Array,
    k_sin: Array, mask: Array, *, heads: int, groups: int, dims: int, q_start: int = 0, k_start: int = 0,
    v_start: int = 0, epsilon: float = 1e-6, cap: float = 0.0, gamma: float = 0.0, zeta: float = 1.0,
) -> Array:  # fmt: skip
    """Attention with grouped queries; q and k normalized and rotated. float64 inside.

    float32 q [B, T, Q], k and v [B, S, ...]; weights [d] or one number: none; tables [T, d], [B, 1, T, d] or one
    number: none; mask [B or 1, 1, T or 1, S] or one number 0 -> float32 [B, T, heads d].
    Source: Su et al. 2021 (arXiv 2104.09864), section 3.4; Ainslie et al. 2023 (arXiv 2305.13245), section 2.
    """

    def parts(x: Array, start: int, count: int) -> Array:
        wide = x[..., start : start + count * dims].astype(np.float64)
        return wide.reshape(*x.shape[:2], count, dims).transpose(0, 2, 1, 3)

    def prepared(x: Array, weight: Array, cos: Array, sin: Array) -> Array:
        if weight.size > 1:
            root = np.sqrt((x**2).mean(-1, keepdims=True) + float(np.float32(epsilon)))
            x = x / root * weight.astype(np.float64)
        if cos.size == 1:
            return x
        return np.asarray(x * cos.astype(np.float64) + np.roll(x, dims // 2, -1) * sin.astype(np.float64))

    queries = prepared(parts(q, q_start, heads), q_weight, q_cos, q_sin)
    keys = prepared(parts(k, k_start, groups), k_weight, k_cos, k_sin)
    keys, values = (x.repeat(heads // groups, 1) for x in (keys, parts(v, v_start, groups)))
    logits = queries @ keys.swapaxes(-1, -2)
    logits = float(np.float32(cap)) * np.tanh(logits) if cap else logits
    with np.errstate(invalid="ignore"):
        logits = np.where(np.asarray(mask) > np.float32(-1e4), logits + np.asarray(mask, np.float64), -1e30)
    power = np.exp(logits - logits.max(-1, keepdims=True))
    low, high = float(np.float32(gamma)), float(np.float32(zeta))
    p = np.clip((high - low) * power / power.sum(-1, keepdims=True) + low, 0, 1)
    return np.asarray((p @ values).transpose(0, 2, 1, 3).reshape(*q.shape[:2], heads * dims), np.float32)


def quant_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array, y_scale: Array | float, y_zero: Array | int,
    *, epsilon: float = 1e-5,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """x + residual, normalized along the last axis, times ``weight``, plus ``bias``; quantized and as float32.

    x float32 [..., W], residual like x or [1], weight and bias float32 [W]
    -> y uint8 [..., W], normed float32 [..., W], the sum float32 [..., W]. float64 inside, the sum rounded to float32.
    Source: Ba et al. 2016 (arXiv 1607.06450); LayerNormalization of ONNX.
    """
    total = np.asarray(x, np.float32) + np.asarray(residual, np.float32)
    wide = total.astype(np.float64)
    apart = wide - wide.mean(-1, keepdims=True)
    normed = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + float(np.float32(epsilon)))
    normed = normed * weight.astype(np.float64) + bias.astype(np.float64)
    return quantize(normed, y_scale, y_zero), normed.astype(np.float32), total


def quant_rows(x: Array, weight: Array, *, normalize: int = 0, epsilon: float = 1e-6) -> tuple[Array, Array]:
    """x [* rsqrt(mean of x^2 + epsilon)] * ``weight``, each row in steps of its own, 1/127 of its largest magnitude.

    x float32 [..., W], weight float32 [W] or one number -> y uint8 [..., W] around 128, scale float32 [..., 1].
    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    z = np.asarray(x, np.float64)
    if normalize:
        z = z / np.sqrt((z**2).mean(-1, keepdims=True) + float(np.float32(epsilon)))
    z = z * np.asarray(weight, np.float64)
    scale = np.maximum(np.abs(z).max(-1, keepdims=True) / 127, 1e-30).astype(np.float32)
    return quantize(z, scale, 128), scale


def quant_patches(
    x: Array, y_scale: float, y_zero: int, *, patch: tuple[int, int], strides: tuple[int, int] = (0, 0),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Array:  # fmt: skip
    """float32 [B, C, H, W] quantized -> uint8 [B, P, C h w]: patches of h x w, row by row, each channel by channel.

    ``strides``: their distance, 0 for their height or width. ``pads``: top, left, bottom, right, filled with y_zero.
    """
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))  # 0 is quantized to y_zero
    down, across = (
        [slice(at, at + size) for at in range(0, side - size + 1, stride or size)]
        for side, size, stride in zip(padded.shape[2:], patch, strides, strict=True)
    )
    rows = [padded[:, :, high, wide].reshape(len(x), -1) for high in down for wide in across]
    empty = np.zeros((len(x), 0, x.shape[1] * patch[0] * patch[1]), np.float32)
    return quantize(np.stack(rows, 1) if rows else empty, float(np.float32(y_scale)), y_zero)


def quant_depthwise(
    x: Array, x_scale: Array, x_zero: Array, weight: Array, weight_scale: Array, bias: Array, y_scale: Array,
    y_zero: Array, *, strides: tuple[int, int], pads: tuple[int, int, int, int], group: int,
) -> Array:  # fmt: skip
    """A depthwise convolution with channels last, quantized.

    x uint8 [B, H, W, C], weight int8 [h, w, C], bias float32 [C], the others one or [C]; ``pads`` top, left, bottom,
    right -> uint8 [B, H', W', C]; no row or column if the window does not fit. Sums are int64; scale and bias are
    float32, two roundings; quantized in float64. Raises ValueError if ``group`` is not C.
    Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
    """
    if x.shape[-1] != group:
        raise ValueError(f"group is {group} and x has {x.shape[-1]} channels; expected {x.shape[-1]}")
    picture, sides = _padded(x, x_zero, weight.shape[:2], strides, pads)
    sums = np.zeros((len(x), *sides, group), np.int64)
    for i, j in np.ndindex(weight.shape[:2]):
        sums += _taps(picture, (i, j), strides, sides) * weight[i, j].astype(np.int64)
    return quantize(_scaled(sums, x_scale, weight_scale, bias), y_scale, y_zero)


def quant_max_pool(
    x: Array, *, window: tuple[int, int] = (2, 2), strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Array:  # fmt: skip
    """The greatest number of each window: uint8 [B, H, W, C] -> uint8 [B, H', W', C]; ``pads`` top, left, bottom,
    right."""
    picture, sides = _padded(x, 0, window, strides, pads)
    y = np.zeros((len(x), *sides, x.shape[-1]), np.int64)
    for i, j in np.ndindex(window):
        y = np.maximum(y, _taps(picture, (i, j), strides, sides))
    return y.astype(np.uint8)


def quant_lookup(x: Array, table: Array) -> Array:
    """uint8 of any shape, table uint8 [256] -> table[x], uint8 of that shape.

    Raises IndexError if the table is too short for a byte.
    """
    y: Array = table[x]
    return y


def quant_add(
    a: Array, a_scale: Array, a_zero: Array, b: Array, b_scale: Array, b_zero: Array, y_scale: Array, y_zero: Array
) -> Array:
    """The sum of two uint8 tensors, quantized.

    a and b uint8 [..., C], the others one number or [C] -> uint8 [..., C]. float64 inside.
    Raises ValueError if a and b differ in shape.
    Source: Jacob et al. 2017 (arXiv 1712.05877), appendix A.2.
    """
    if a.shape != b.shape:
        raise ValueError(f"b has the shape {list(b.shape)}; expected that of a, {list(a.shape)}")
    terms = [
        (x.astype(np.float64) - np.asarray(zero, np.float64)) * np.asarray(scale, np.float64)
        for x, scale, zero in ((a, a_scale, a_zero), (b, b_scale, b_zero))
    ]
    return quantize(terms[0] + terms[1], y_scale, y_zero)


def _area(boxes: Array) -> Array:
    """[N, 4] -> [N]: 0 for an inverted box, infinite for a box with a side that overflows float32."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    area: Array = np.prod(np.where(sides > np.finfo(np.float32).max, np.inf, sides), axis=1)
    return area
