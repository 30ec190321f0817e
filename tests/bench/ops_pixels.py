"""Pictures to pixels: the op library's kernel against Pillow and the processors that CLIP models come with.

    python -m tests.bench.ops_pixels

Photographs of export/samples, enlarged to 640 x 480 and 4000 x 3000; from a decoded picture to the normalised tensor
[1, 3, 224, 224] (bicubic, shortest side 224, centre crop), then from the bytes of a JPEG; one thread each, taking
turns. "off by" is the largest difference to Pillow's path in grey levels.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.flow import Array
from calmclip.models.ops.spec import IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS
from calmclip.models.preprocess.image import ImagePreparer, decode
from tests.bench.alternate import alternate, line, machine
from tests.bench.ops import library, options

OPS = (IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS)
SAMPLES = Path(__file__).parents[2] / "export" / "samples"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021
SIZES = ((640, 480), (4000, 3000))
SPEC = ImagePreprocess(size=(224, 224), shortest=224, mean=MEAN, std=STD)

Side = Callable[[Any], Array]


def main() -> None:
    given = options(__doc__, 4.0, "less time").parse_args()
    seconds = 0.5 if given.quick else given.seconds
    torch.set_num_threads(1)
    sides = _sides()
    print(machine(1))
    for width, height in SIZES:
        photographs = [photograph(name, width, height) for name in ("coffee", "temple", "rocket")]
        files = [_jpeg(image) for image in photographs]
        worst = {name: max(_off(side(i), sides["pillow"](i)) for i in photographs) for name, side in sides.items()}
        print("off by " + "   ".join(f"{name} {levels:.2f}" for name, levels in worst.items()))
        case = f"{width} x {height}"
        turns = {name: _in_turn(side, photographs) for name, side in sides.items()}
        print(line(f"{case} picture", alternate(turns, seconds=seconds), "calmclip"))
        turns = {name: _in_turn(side, files, decode) for name, side in sides.items()}
        print(line(f"{case} JPEG", alternate(turns, seconds=seconds), "calmclip"))
        alone = alternate({"decode": _in_turn(decode, files)}, seconds=seconds / 4)
        print(line(f"{case} decode alone", alone, "decode"))


def photograph(name: str, width: int, height: int) -> Image.Image:
    """A sample, enlarged; as a decoder would hand it over."""
    image = Image.open(SAMPLES / f"{name}.jpg").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return decode(_jpeg(image))


def _sides() -> dict[str, Side]:
    from open_clip.transform import image_transform
    from torchvision.transforms import v2
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    ours, pillow = ImagePreparer(SPEC, library()), ImagePreparer(SPEC)
    open_clip = image_transform(224, is_train=False, mean=MEAN, std=STD)
    square = {"height": 224, "width": 224}
    kwargs: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": square, "image_mean": MEAN, "image_std": STD}
    torchvision_backend, pillow_backend = CLIPImageProcessor(**kwargs), CLIPImageProcessorPil(**kwargs)
    resize = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(224, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return {
        "calmclip": lambda image: ours.prepare(image)[0],
        "pillow": lambda image: pillow.prepare(image)[0],
        "open_clip": lambda image: open_clip(image)[None].numpy(),
        "transformers-torchvision": lambda image: torchvision_backend(image, return_tensors="np")["pixel_values"],
        "transformers-pillow": lambda image: pillow_backend(image, return_tensors="np")["pixel_values"],
        "torchvision-v2": lambda image: resize(image)[None].numpy(),
    }


def _in_turn(
    do: Callable[[Any], object], things: Sequence[Any], before: Callable[[Any], Any] = lambda thing: thing
) -> Callable[[], object]:
    """Each call takes the next picture, so a processor never sees one twice in a row."""
    place = 0

    def call() -> object:
        nonlocal place
        place = (place + 1) % len(things)
        return do(before(things[place]))

    return call


def _off(pixels: Array, expected: Array) -> float:
    """In grey levels."""
    std = np.array(STD).reshape(3, 1, 1)
    return float(np.abs((pixels.astype(np.float64) - expected) * std * 255).max())


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
