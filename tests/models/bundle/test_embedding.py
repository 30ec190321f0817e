"""The digest of what embeds: what changes it, and what does not."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.embedding import embedding_digest
from calmclip.models.bundle.manifest import (
    ExplainDefaults,
    ImagePreprocess,
    Manifest,
    SegmentationDefaults,
    SuppressionDefaults,
    TextPreprocess,
)
from calmclip.models.bundle.store import load, read

Json = dict[str, Any]
FILES = ("image.onnx", "text.onnx", "regions.onnx", "detect.onnx", "weights.bin", "tokenizer.json", "labels.json",
         "words.json", "rows.npy", "report.json")  # fmt: skip
IMAGE = {"kind": "none", "input": "x", "in_graph": True, "size": (4, 5), "resize": "exact", "shortest": 5,
         "keep_square": True, "crop_offset": "floor", "resample": "bilinear", "mean": (0.0, 0.0, 0.1),
         "std": (1.0, 1.0, 0.9), "pad": 1}  # fmt: skip
TEXT = {"kind": "none", "tokenizer": "words.json", "clean": "lower", "ids": "x", "mask": "m", "context": 7,
        "pad": "context", "multiple": 2, "pad_id": 1, "truncate": True, "prompts": {"q": "find: "},
        "prompt": "q", "pooled": "p"}  # fmt: skip


@pytest.fixture
def manifest(colours: Json) -> Manifest:
    """Of a detector with weights that graphs share, a report, and a classifier with files; the hashes are invented."""
    image = colours["graphs"]["image"]
    embeds = {"embeds": {"dtype": "float32", "shape": ["B", 3]}}
    colours["graphs"] |= {
        "regions": {**image, "file": "regions.onnx", "outputs": embeds},
        "detect": {"file": "detect.onnx", "inputs": {}, "outputs": embeds},
    }
    colours["classifier"] |= {"labels": "labels.json", "descriptions": "words.json"}
    colours["classifier"]["head"]["assets"] = {"rows": "rows.npy"}
    colours["files"] = {name: {"sha256": f"{place:064x}", "bytes": 1} for place, name in enumerate(FILES)}
    return load(json.dumps(colours).encode(), "colours")


def with_file(manifest: Manifest, name: str) -> Manifest:
    """The manifest after the contents of the file have changed."""
    changed = manifest.files[name].model_copy(update={"sha256": "f" * 64})
    return manifest.model_copy(update={"files": {**manifest.files, name: changed}})


def with_graph(manifest: Manifest, role: str, **changes: Any) -> Manifest:
    graph = manifest.graphs[role].model_copy(update=changes)
    return manifest.model_copy(update={"graphs": {**manifest.graphs, role: graph}})


def with_preprocess(manifest: Manifest, role: str, **changes: Any) -> Manifest:
    spec = manifest.graphs[role].preprocess
    assert spec is not None
    return with_graph(manifest, role, preprocess=spec.model_copy(update=changes))


def test_the_digest_is_the_one_that_the_page_defines(sealed: Path):
    """Written out by hand, from the bytes on disk."""
    sha = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sealed.iterdir()}
    text = (
        '{"graphs":{"image":{"file":"' + sha["image.onnx"] + '","output":"image_embeds","preprocess":'
        '{"mean":[0.0,0.0,0.0],"shortest":4,"size":[4,4],"std":[1.0,1.0,1.0]}},'
        '"text":{"file":"' + sha["text.onnx"] + '","output":"text_embeds","preprocess":'
        '{"context":6,"tokenizer":"' + sha["tokenizer.json"] + '"}}},"weights":{}}'
    )
    assert Bundle(read(sealed)).embedding_digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json", "weights.bin"])
def test_a_file_that_embeds_changes_the_digest(manifest: Manifest, name: str):
    assert embedding_digest(with_file(manifest, name)) != embedding_digest(manifest)


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [("image", *change) for change in IMAGE.items()] + [("text", *change) for change in TEXT.items()],
)
def test_every_field_of_preprocess_changes_the_digest(manifest: Manifest, role: str, field: str, value: object):
    assert embedding_digest(with_preprocess(manifest, role, **{field: value})) != embedding_digest(manifest)


def test_the_fields_above_are_all_fields():
    assert IMAGE.keys() == ImagePreprocess.model_fields.keys()
    assert TEXT.keys() == TextPreprocess.model_fields.keys()


def test_a_graph_less_and_another_output_change_the_digest(manifest: Manifest):
    tensors = manifest.graphs["image"].outputs
    image = manifest.model_copy(update={"graphs": {r: g for r, g in manifest.graphs.items() if r != "text"}})
    renamed = with_graph(manifest, "image", outputs={"vectors": tensors["image_embeds"]})
    assert len({embedding_digest(m) for m in (manifest, image, renamed)}) == 3


@pytest.mark.parametrize(
    "name", ["regions.onnx", "detect.onnx", "report.json", "labels.json", "words.json", "rows.npy"]
)
def test_a_file_that_does_not_embed_leaves_the_digest(manifest: Manifest, name: str):
    assert embedding_digest(with_file(manifest, name)) == embedding_digest(manifest)


def without_detection(manifest: Manifest) -> Manifest:
    gone = ("regions.onnx", "detect.onnx")
    files = {name: file for name, file in manifest.files.items() if name not in gone}
    graphs = {role: graph for role, graph in manifest.graphs.items() if graph.file not in gone}
    return manifest.model_copy(update={"graphs": graphs, "files": files})


def with_renamed_tokenizer(manifest: Manifest) -> Manifest:
    files = {{"tokenizer.json": "words_2.json"}.get(name, name): file for name, file in manifest.files.items()}
    return with_preprocess(manifest.model_copy(update={"files": files}), "text", tokenizer="words_2.json")


def with_another_output(manifest: Manifest) -> Manifest:
    outputs = manifest.graphs["image"].outputs
    return with_graph(manifest, "image", outputs={**outputs, "more": outputs["image_embeds"]})


UNRELATED: dict[str, Callable[[Manifest], Manifest]] = {
    "name": lambda m: m.model_copy(update={"name": "other"}),
    "precision": lambda m: m.model_copy(update={"precision": "int8"}),
    "tasks": lambda m: m.model_copy(update={"tasks": ("embed",)}),
    "source": lambda m: m.model_copy(update={"source": m.source.model_copy(update={"notes": "another"})}),
    "family": lambda m: m.model_copy(update={"family": "f" * 64}),
    "ops": lambda m: m.model_copy(update={"ops": m.ops.model_copy(update={"used": ("Softmax",)})}),
    "classifier": lambda m: m.model_copy(
        update={"classifier": m.classifier and m.classifier.model_copy(update={"temperature": 2.0})}
    ),
    "suppression": lambda m: m.model_copy(update={"suppression": SuppressionDefaults(sigma=0.4)}),
    "segmentation": lambda m: m.model_copy(update={"segmentation": SegmentationDefaults(threshold=0.4)}),
    "explain": lambda m: m.model_copy(update={"explain": ExplainDefaults(method="leave_one_out")}),
    "quantization": lambda m: m.model_copy(update={"quantization": m.quantization.model_copy(update={"name": "x"})}),
    "created": lambda m: m.model_copy(update={"created": "2027-01-01T00:00:00+00:00"}),
    "preprocessing of regions": lambda m: with_preprocess(m, "regions", pad=3),
    "no detection": without_detection,
    "another output": with_another_output,
    "the name of the tokenizer's file": with_renamed_tokenizer,
    "the order of files": lambda m: m.model_copy(update={"files": dict(reversed(m.files.items()))}),
}


@pytest.mark.parametrize("what", UNRELATED)
def test_nothing_else_changes_the_digest(manifest: Manifest, what: str):
    other = UNRELATED[what](manifest)
    assert other.model_dump_json() != manifest.model_dump_json()
    assert embedding_digest(other) == embedding_digest(manifest)


def test_a_bundle_that_does_not_embed_has_no_digest(manifest: Manifest):
    assert embedding_digest(manifest.model_copy(update={"tasks": ("raw",)})) is None
