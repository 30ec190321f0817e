"""The built-in model: pretrained networks from ordinary Python packages, joined by heads that we trained.

Source: Tan & Le 2019 (arXiv 1905.11946), EfficientNet, its Lite2 form; Wang et al. 2020 (arXiv 2002.10957), MiniLM;
RangiLyu 2021, NanoDet-g; Norouzi et al. 2013 (arXiv 1312.5650), ConSE. `calmclip.export.align` and
`calmclip.export.regions` train the heads.

It is no CLIP but has its interface: pixels -> unit vector, ids + mask -> unit vector, 384 numbers each. Its graphs
ship without weights (`graphs`), and numpy fills them (`parameters`), so that no torch is needed. A checkpoint directory
of it holds heads.safetensors, detector.safetensors or both, and beside them the files of the packages in weights.txt if
these are not installed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from calmclip.export.checkpoints import Weights
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, bucketed, float32
from calmclip.export.nets.common.attribution import ROLE as ATTRIBUTION
from calmclip.export.nets.common.attribution import borrower
from calmclip.export.nets.mini import e5, graphs, multilingual, parameters
from calmclip.export.nets.mini.detection import MIN_SCORE, detect_graph, summary
from calmclip.export.nets.mini.facts import (
    BACKGROUND,
    CELLS,
    CONTEXT,
    FINE_CELLS,
    LAYERS,
    MASK_WIDTH,
    PIXELS,
    PROPOSALS,
    QUANTIZE,
    QUANTIZE_REGIONS,
    REGION_PIXELS,
    SIDE,
    TEMPLATES,
    WIDTH,
    WIDTH16,
)
from calmclip.export.nets.mini.segmentation import dense_summary, known_graph, masks_graph
from calmclip.export.nets.mini.sentences import embed
from calmclip.export.nets.mini.weights import BACKBONE, E5, MINILM, backbone_state, minilm_state, tokenizer_json
from calmclip.models.bundle.manifest import (
    DefaultClassifier,
    ExplainDefaults,
    Fitted,
    Plugin,
    SegmentationDefaults,
    Source,
    SuppressionDefaults,
    Tensor,
    TextPreprocess,
)
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.ops.spec import SOFTMAX

RANGES = Path(__file__).with_name("ranges.json")
SHIPPED = Path(__file__).with_name("heads.safetensors")
DETECTOR = Path(__file__).with_name("detector.safetensors")
MASKS = Path(__file__).with_name("masks.safetensors")
ROLES = ("image", "text", "regions", "dense")  # of the towers
SCALE = (
    15.0  # of the cosines in a softmax over labels: it has the least log loss on labelled photographs, see README.md
)
# Of the words of captions. The photographs that the heads were trained on fit their captions better than others do. So
# this is fitted to 500 photographs of the training split, with heads that were trained without them; see the page
# docs/evaluation.md.
MARGINS = Fitted(expected=0.25, threshold=-0.225)
# For bundles with the graph `attribution`: to 399 such photographs, but with the heads that ship.
GRADIENT = Fitted(threshold=-0.068)
TEXTS = bucketed(TextPreprocess(ids="ids", mask="mask", context=CONTEXT, pad="longest", pad_id=0))
BARS = {"min_image_cosine": 0.99, "min_text_cosine": 0.99, "min_output_cosine": 0.98}
_EMBEDS = float32("B", WIDTH)
_TOKENS = Tensor(dtype="int64", shape=("B", "T"))
_NOTES = (
    "The heads derive from research-use photographs (Flickr8k, ImageNet samples, COCO crops) and WordNet; "
    "the image encoder was trained on ImageNet and the box network on COCO by their authors."
)


def recognise(checkpoint: str) -> bool:
    files = (SHIPPED, DETECTOR, MASKS, multilingual.PROJECTION)
    return checkpoint == "mini" or any((Path(checkpoint) / path.name).is_file() for path in files)


def load(checkpoint: str, weights: Weights = Weights()) -> Net:  # noqa: B008 - frozen
    """Raises `WeightsMissing`, which says what to install; `BadRequest` if the recipe has a section on weights."""
    if weights != Weights():
        raise BadRequest("the built-in model has its own activation; leave out the recipe's [weights]")
    directory = None if checkpoint == "mini" else Path(checkpoint)
    heads, detector, masks = (trained(directory, path) for path in (SHIPPED, DETECTOR, MASKS))
    arrays = constants(heads, detector, masks, directory)
    tokenizer = tokenizer_json(directory)
    return Net(
        name="mini",
        source=Source(
            net="mini",
            model="EfficientNet-Lite2, all-MiniLM-L6-v2 and NanoDet-g with aligned heads",
            weights={
                BACKBONE.origin: BACKBONE.sha256,
                MINILM.origin: MINILM.sha256,
                **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (heads, detector, masks)},
            },
            license="Apache-2.0",
            notes=_NOTES,
        ),
        tasks=("classify", "embed", "detect", "segment"),
        towers=towers_of({role: graphs.filled(role, arrays[role]) for role in ROLES}),
        files={"tokenizer.json": _unlimited(tokenizer)},
        suppression=SuppressionDefaults(min_score=MIN_SCORE),
        segmentation=SegmentationDefaults(method="boxes"),
        explain=ExplainDefaults(fitted={"leave_one_out": MARGINS}),
        built={
            "detect": detect_graph(embed(arrays["text"], tokenizer, BACKGROUND)),
            "masks": masks_graph(graphs.filled("masks", arrays["masks"])),
            "known": known_graph(arrays["regions"]["names"]),
        },
        classifier=DefaultClassifier(templates=TEMPLATES, head=Plugin(name="cosine", params={"scale": SCALE})),
        ranges=dict.fromkeys(ROLES, RANGES),
        offers={
            ATTRIBUTION: lambda net: with_attribution(net, graphs.filled(ATTRIBUTION, arrays[ATTRIBUTION])),
            multilingual.NAME: lambda net: with_languages(net, directory),
        },
        keep_float=True,
        bars=BARS if directory else {**BARS, "max_megabytes": 42.0},
    )


def trained(directory: Path | None, shipped: Path) -> Path:
    """The file of trained weights: the one in ``directory`` if there is one, else the one that ships."""
    return directory / shipped.name if directory and (directory / shipped.name).is_file() else shipped


def constants(heads: Path, detector: Path, masks: Path, directory: Path | None = None) -> dict[str, dict[str, Array]]:
    """The constants of each graph, by role. Raises `WeightsMissing`."""
    head = parameters.read(heads, parameters.HEAD_SHAPES, "calmclip align")
    boxes = parameters.read(detector, None, "python -m calmclip.export.regions")
    mask_head = parameters.read(masks, None, "python -m calmclip.export.masks")
    folded = parameters.backbone(backbone_state(directory))
    text = parameters.text(head, parameters.minilm(minilm_state(directory)))
    names = parameters.known(text, tokenizer_json(directory), TEMPLATES)
    return {
        "image": parameters.image(head, folded),
        "text": text,
        ATTRIBUTION: text,
        "regions": parameters.regions(head, folded, boxes, names, mask_head),
        "dense": parameters.image(head, folded),
        "masks": parameters.masks(mask_head),
    }


def towers_of(drawn: Mapping[str, onnx.ModelProto]) -> dict[str, Tower]:
    """The four towers, with the graphs ``drawn``."""
    pixels, boxes = float32("B", 3, *PIXELS.size), float32("B", 3, SIDE, SIDE)
    regions = {
        "class_embeds": float32("B", PROPOSALS, WIDTH),
        "boxes": float32("B", PROPOSALS, 4),
        "objectness": float32("B", PROPOSALS),
        "mask_features": float32("B", MASK_WIDTH, FINE_CELLS, FINE_CELLS),
    }
    classes = {SOFTMAX.name: 1}  # of the backbone
    return {
        "image": Tower.drawn(
            drawn.get("image"),
            {"pixels": pixels},
            {"image_embeds": _EMBEDS},
            PIXELS,
            quantizer="search",
            quantizer_params=QUANTIZE,
            promises=classes,
        ),
        "text": Tower.drawn(
            drawn.get("text"),
            {"ids": _TOKENS, "mask": _TOKENS},
            {"text_embeds": _EMBEDS},
            TEXTS,
            quantizer="search",
            promises={SOFTMAX.name: LAYERS},
        ),
        "regions": Tower.drawn(
            drawn.get("regions"),
            {"pixels": boxes},
            regions,
            REGION_PIXELS,
            summary=summary,
            quantizer="search",
            quantizer_params=QUANTIZE_REGIONS,
            promises=classes,
        ),
        "dense": Tower.drawn(
            drawn.get("dense"),
            {"pixels": boxes},
            {"patches": float32("B", CELLS, CELLS, WIDTH), "map16": float32("B", 2 * CELLS, 2 * CELLS, WIDTH16)},
            REGION_PIXELS,
            summary=dense_summary,
            quantizer="search",
            quantizer_params=QUANTIZE,
            promises=classes,
        ),
    }


def with_attribution(net: Net, drawn: onnx.ModelProto) -> Net:
    """``net`` with the graph `attribution`, and what was fitted to the method of explain that reads it."""
    explain = ExplainDefaults(fitted={"leave_one_out": MARGINS, "gradient": GRADIENT})
    return replace(net, towers={**net.towers, ATTRIBUTION: attribution_tower(drawn)}, explain=explain)


def with_languages(net: Net, directory: Path | None = None) -> Net:
    """``net`` whose text tower is that of many languages. Raises `WeightsMissing`.

    What was fitted to the English text tower is left out: the margins of words, and the graph `attribution`.
    """
    file = trained(directory, multilingual.PROJECTION)
    head = multilingual.projection(file)
    encoder = multilingual.encoder(head["pieces"], directory)
    text = multilingual.tower(graphs.filled(multilingual.NAME, multilingual.constants(head, encoder.state)))
    weights = {E5.origin: E5.sha256, file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    source = net.source.model_copy(
        update={
            "model": net.source.model.replace("all-MiniLM-L6-v2", "multilingual-e5-small"),
            "license": f"{net.source.license} and MIT",
            "weights": {**net.source.weights, **weights},
        }
    )
    largest = net.bars.get("max_megabytes")
    return replace(
        net,
        source=source,
        variant="multi",
        languages=multilingual.TAGS,
        towers={**net.towers, "text": text},
        files={**net.files, "tokenizer.json": e5.tokenizer_json(encoder)},
        ranges={**net.ranges, "text": multilingual.RANGES},
        offers={name: offer for name, offer in net.offers.items() if name not in (ATTRIBUTION, multilingual.NAME)},
        explain=None,
        bars=net.bars if largest is None else {**net.bars, "max_megabytes": largest + 20.0},
    )


def attribution_tower(drawn: onnx.ModelProto | None) -> Tower:
    """Of the last layer, with the graph ``drawn``; it is no part of a bundle unless an export asks for it."""
    return replace(borrower(towers_of({})["text"], _EMBEDS), graph=drawn)


def _unlimited(tokenizer: bytes) -> bytes:
    """Without the package's own padding and truncation to 128 tokens: the service does both, by the manifest."""
    data = json.loads(tokenizer)
    return json.dumps(data | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


NETS.register("mini")(NetPlugin(recognise, load))
