"""The built-in model: pretrained encoders from ordinary Python packages, joined by heads that we trained.

Source: Tan & Le 2019 (arXiv 1905.11946), EfficientNet, its Lite2 form; Wang et al. 2020 (arXiv 2002.10957), MiniLM;
Norouzi et al. 2013 (arXiv 1312.5650), ConSE. The training is in `calmclip.export.align`.

It is no CLIP but has its interface: pixels -> unit vector, ids + mask -> unit vector, 384 numbers each. A checkpoint
directory of it is written by `calmclip align`: ``heads.safetensors``, and beside it the files of the packages in
weights.txt if these are not installed.
"""

import hashlib
import json
from pathlib import Path

from calmclip.export.checkpoints import Weights
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, bucketed, float32
from calmclip.export.nets.mini import backbone, boxhead, minilm
from calmclip.export.nets.mini.features import PIXELS
from calmclip.export.nets.mini.regions import add_detection
from calmclip.export.nets.mini.towers import SHIPPED, Heads, ImageTower, TextTower
from calmclip.export.nets.mini.weights import BACKBONE, MINILM, backbone_state, minilm_state, tokenizer_json
from calmclip.models.bundle.manifest import DefaultClassifier, Plugin, Source, Tensor, TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import SOFTMAX

RANGES = Path(__file__).with_name("ranges.json")
BOXES = Path(__file__).with_name("boxhead.safetensors")
TEMPLATES = ("a photo of a {}.", "a {}", "a picture of a {}.", "a close-up photo of a {}.", "a {} in the scene.")
TEXTS = bucketed(TextPreprocess(ids="ids", mask="mask", context=minilm.CONTEXT, pad="longest", pad_id=0))
_EMBEDS = float32("B", minilm.WIDTH)
_TOKENS = Tensor(dtype="int64", shape=("B", "T"))
_NOTES = (
    "The heads derive from research-use photographs (Flickr8k, ImageNet samples, COCO crops) and WordNet; "
    "the image encoder was trained on ImageNet by its authors."
)


def recognise(checkpoint: str) -> bool:
    return checkpoint == "mini" or (Path(checkpoint) / SHIPPED.name).is_file()


def load(checkpoint: str, weights: Weights = Weights()) -> Net:  # noqa: B008 - frozen
    """Raises `WeightsMissing`, which says what to install; `BadRequest` if the recipe has a section on weights."""
    if weights != Weights():
        raise BadRequest("the built-in model has its own activation; leave out the recipe's [weights]")
    directory = None if checkpoint == "mini" else Path(checkpoint)
    file = (directory or SHIPPED.parent) / SHIPPED.name
    boxes = directory / BOXES.name if directory and (directory / BOXES.name).is_file() else BOXES
    heads = Heads.load(file)
    image = ImageTower(backbone.frozen(backbone_state(directory)), heads).eval()
    text = TextTower(minilm.from_state(minilm_state(directory)), heads).eval()
    net = Net(
        name="mini",
        source=Source(
            net="mini",
            model="EfficientNet-Lite2 and all-MiniLM-L6-v2 with aligned heads",
            weights={
                BACKBONE.origin: BACKBONE.sha256,
                MINILM.origin: MINILM.sha256,
                **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, boxes)},
            },
            license="Apache-2.0",
            notes=_NOTES,
        ),
        tasks=("classify", "embed"),
        towers={
            "image": Tower(
                image,
                {"pixels": float32("B", 3, *PIXELS.size)},
                {"image_embeds": _EMBEDS},
                PIXELS,
                quantizer="search",
                quantizer_params=backbone.QUANTIZE,
                promises={SOFTMAX.name: 1},  # of the backbone's classes
            ),
            "text": Tower(
                text,
                {"ids": _TOKENS, "mask": _TOKENS},
                {"text_embeds": _EMBEDS},
                TEXTS,
                quantizer="search",
                promises={SOFTMAX.name: minilm.LAYERS},
            ),
        },
        files={"tokenizer.json": _unlimited(tokenizer_json(directory))},
        classifier=DefaultClassifier(templates=tuple(TEMPLATES), head=Plugin(name="cosine", params={"scale": SCALE})),
        ranges=dict.fromkeys(("image", "text", "regions"), RANGES),
        keep_float=True,
        bars={"min_image_cosine": 0.99, "min_text_cosine": 0.99, "min_output_cosine": 0.98, "max_megabytes": 35.0},
    )
    return add_detection(net, image, text, boxhead.load(boxes))


SCALE = (
    15.0  # of the cosines in a softmax over labels: it has the least log loss on labelled photographs, see README.md
)


def _unlimited(tokenizer: bytes) -> bytes:
    """Without the package's own padding and truncation to 128 tokens: the service does both, by the manifest."""
    data = json.loads(tokenizer)
    return json.dumps(data | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


NETS.register("mini")(NetPlugin(recognise, load))
