"""The fifteen corruptions of ImageNet-C, in severities 1 to 5.

Source: Hendrycks & Dietterich 2019 (arXiv 1903.12261), section 4 and its code, as kept up in imagecorruptions-imaug,
which also brings the photographs of frost. Their constants hold for pictures with a short side of 224 pixels, so every
picture is resized to that before. A severity then means the same for 32 pixels and for 4,000.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
from PIL import Image

from calmclip.models.extras import missing
from calmclip.models.flow import Array

SIDE = 224  # pixels
# name -> where its random numbers come from: numpy's global generator, a parameter `seed`, or none
_DRAWS: dict[str, str | None] = {
    "gaussian_noise": "global", "shot_noise": "global", "impulse_noise": "seed",
    "defocus_blur": None, "glass_blur": "seed", "motion_blur": "global", "zoom_blur": None,
    "snow": "global", "frost": "global", "fog": "global", "brightness": None,
    "contrast": None, "elastic_transform": "global", "pixelate": None, "jpeg_compression": None,
}  # fmt: skip
NAMES = tuple(_DRAWS)
SEVERITIES = (1, 2, 3, 4, 5)
_generator = threading.Lock()  # over numpy's global generator


def require() -> None:
    """Raises `ExtraMissing` without imagecorruptions."""
    try:
        import imagecorruptions  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing("the eval robustness", error.name or "imagecorruptions", "eval") from None


def standard(picture: Image.Image) -> Array:
    """An RGB picture -> uint8 [H, W, 3] with a short side of `SIDE` pixels, resampled as by most preprocessing."""
    scale = SIDE / min(picture.size)
    width, height = (max(SIDE, round(side * scale)) for side in picture.size)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))


def corrupted(pixels: Array, name: str, severity: int, seed: int = 0) -> Array:
    """uint8 [H, W, 3] of `standard` -> the same shape. ``name``: one of `NAMES`; ``severity``: one of `SEVERITIES`.

    The random numbers depend on ``seed``, the pixels and the name alone. So all severities of a picture have the same
    noise in another strength, and both bundles of a comparison see the same pixels. Threads may call it. Raises
    `ExtraMissing`.
    """
    require()
    from imagecorruptions import corrupt

    own_seed = crc32(f"{seed} {name}".encode(), crc32(pixels.tobytes()))  # 32 bits, as numpy's older generator wants
    if _DRAWS[name] == "global":
        with _seeded(own_seed):
            changed = corrupt(pixels, severity, name)
    else:
        changed = corrupt(pixels, severity, name, **({"seed": own_seed} if _DRAWS[name] else {}))
    return np.ascontiguousarray(changed, np.uint8)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """numpy's global generator, for one thread at a time; its state before comes back."""
    with _generator:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
