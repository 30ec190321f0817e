"""The text tower of many languages: multilingual-e5-small with the pieces of `TAGS`, projected into the vectors of the
built-in model, so that its other graphs stay as they are.

Source: Wang et al. 2024 (arXiv 2402.05672), the encoder; Carlsson et al. 2022 (LREC), distillation of a CLIP's text
tower into an encoder of many languages. `calmclip distil --student mini` trains the projection:

    text = unit(B (unit(E5) - centre))     B [384, 384]
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from calmclip.export.nets import Tower, bucketed, float32
from calmclip.export.nets.mini import e5, parameters
from calmclip.export.nets.mini.facts import CONTEXT, E5_LAYERS, WIDTH
from calmclip.export.nets.mini.weights import E5
from calmclip.models.bundle.manifest import Tensor, TextPreprocess
from calmclip.models.flow import Array
from calmclip.models.ops.spec import SOFTMAX

NAME = "languages"  # of the adapter, and of the drawn graph
TAGS = ("en", "de", "fr", "es", "zh")
PROJECTION = Path(__file__).with_name("languages.safetensors")
RANGES = Path(__file__).with_name("languages.json")
PIECES = 250_002  # of XLM-R, without <mask>'s row and those that fill the table
SHAPES = {"weight": (WIDTH, WIDTH), "centre": (WIDTH,), "pieces": (-(-PIECES // 8),)}  # the pieces as bits
TEXTS = bucketed(
    TextPreprocess(ids="ids", mask="mask", context=CONTEXT, pad="longest", pad_id=e5.SPECIAL.index("<pad>"))
)
NOTES = (
    f"texts in {', '.join(TAGS)}: multilingual-e5-small in 4 bits (MIT) with a projection that was distilled from the "
    "English text tower on Flickr8k captions (research use), CLDR names and calmclip's own phrases"
)


def tower(graph: onnx.ModelProto | None) -> Tower:
    """The tower with its ``graph``."""
    tokens = Tensor(dtype="int64", shape=("B", "T"))
    return Tower.drawn(
        graph,
        {"ids": tokens, "mask": tokens},
        {"text_embeds": float32("B", WIDTH)},
        TEXTS,
        quantizer="search",
        promises={SOFTMAX.name: E5_LAYERS},
    )


def projection(file: Path) -> dict[str, Array]:
    """float32 ``weight`` [384, 384] and ``centre`` [384], and ``pieces`` bool [n]: which pieces are kept. Raises
    `WeightsMissing`."""
    arrays = parameters.read(file, SHAPES, "calmclip distil --student mini")
    return arrays | {"pieces": np.unpackbits(arrays["pieces"].astype(np.uint8)).astype(bool)}


def encoder(pieces: Array, directory: Path | None = None) -> e5.Encoder:
    """From the package, or the file in ``directory``. Raises `WeightsMissing`."""
    return e5.read(E5.locate(directory), pieces)


def constants(head: Mapping[str, Array], state: Mapping[str, Array]) -> dict[str, Array]:
    """The constants of the graph."""
    named = {"text_weight": head["weight"], "text_centre": head["centre"]}
    return parameters.text(named, parameters.minilm(state, E5_LAYERS))
