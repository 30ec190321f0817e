"""bundle.json: valid values are read, invalid values are refused with their path."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from calmclip.models.bundle import manifest as module
from calmclip.models.bundle.manifest import FrozenModel, Graph, ImagePreprocess, Manifest, Plugin, parse, schema
from calmclip.models.bundle.store import load
from calmclip.models.errors import BundleInvalid, BundleTooNew
from calmclip.models.suppression import Suppression

HERE = Path(module.__file__).parent
Json = dict[str, Any]


def read(data: Any) -> Manifest:
    return load(json.dumps(data).encode(), "bundle.json")


def at(data: Json, path: str) -> tuple[Json, str]:
    *way, last = path.split("/")
    for key in way:
        data = data[key]
    return data, last


def test_a_manifest_survives_the_round_trip(colours: Json):
    manifest = read(colours)
    assert parse(manifest.model_dump_json(exclude_none=True).encode(), "again") == manifest


@pytest.mark.parametrize(
    "place",
    [
        "",
        "source/",
        "graphs/image/",
        "graphs/image/inputs/pixels/",
        "graphs/image/preprocess/",
        "graphs/text/preprocess/",
        "classifier/",
        "classifier/head/",
        "quantization/",
    ],
)
def test_an_unknown_key_is_named_at_any_depth(colours: Json, place: str):
    parent, key = at(colours, f"{place}surprise")
    parent[key] = 1
    with pytest.raises(
        BundleInvalid, match=rf"{re.escape(place.rstrip('/').replace('/', '.'))}.*surprise: unknown key"
    ):
        read(colours)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("name", "Colours", "name: "),
        ("name", "../colours", "name: "),
        ("name", "colours\n", "name: "),
        ("name", "c" * 65, "name: "),
        ("precision", "int4", "precision: "),
        ("tasks", [], "tasks: "),
        ("tasks", ["Segment!"], r"tasks\.0: "),
        ("family", "0" * 63, "family: "),
        ("tasks", ["detect"], "needs a graph 'detect'"),
        ("graphs", {}, "graphs: "),
        ("graphs/text/preprocess", None, r"`graphs\.text\.preprocess` to be an? TextPreprocess"),
        ("graphs/image/preprocess/size", [4, 0], "not within 1 to 4096"),
        ("graphs/image/preprocess/size", [5000, 5000], "not within 1 to 4096"),
        ("graphs/image/preprocess/size", [2, 4], r"makes 'pixels' as float32 \['B', 3, 2, 4\]"),
        ("graphs/image/preprocess/shortest", 3, "needs `shortest` from 4 to 4096; it is 3"),
        ("graphs/image/preprocess/shortest", 10**9, "needs `shortest` from 4 to 4096"),
        ("graphs/image/preprocess/shortest", None, "it is None"),
        ("graphs/image/preprocess/std", [1.0, 0.0, 1.0], "at least 0.001"),
        ("graphs/image/preprocess/std", [1.0, -1.0, 1.0], "at least 0.001"),
        ("graphs/image/preprocess/mean", [0.0, 0.0], r"mean\.2: "),
        ("graphs/image/preprocess/input", "picture", r"makes the inputs \['picture'\]; the graph takes \['pixels'\]"),
        ("graphs/image/preprocess/kind", "sound", "does not match any of the expected tags"),
        ("graphs/image/inputs/pixels/dtype", "uint8", "makes 'pixels' as float32"),
        ("graphs/image/inputs/pixels/shape", [-1, 3, 4, 4], "greater than or equal to 1"),
        ("graphs/image/outputs", {}, "outputs: "),
        ("graphs/image/outputs/image_embeds/shape", ["B", 5], "embeddings differ in length"),
        ("graphs/image/outputs/image_embeds/shape", ["B", "D"], r"one output, float32 \[B, D\]"),
        (
            "graphs/image/outputs",
            {name: {"dtype": "float32", "shape": ["B", 3]} for name in ("vectors", "patches")},
            r"has the outputs \['patches', 'vectors'\].*called 'image_embeds'",
        ),
        ("graphs/text/preprocess/context", 0, "context: "),
        ("graphs/text/preprocess/context", 10**12, "context: "),
        ("graphs/text/preprocess/pad_id", -1, "pad_id: "),
        ("graphs/text/preprocess/mask", "mask", r"makes the inputs \['ids', 'mask'\]; the graph takes \['ids'\]"),
        ("classifier", None, "'classify' needs `classifier` with a `head`"),
        ("classifier/head", None, "'classify' needs `classifier` with a `head`"),
        ("classifier/templates", ["a photo"], r"classifier\.templates\.0: "),
        ("classifier/temperature", 0, r"classifier\.temperature: "),
        ("classifier/none_below", 1.5, r"classifier\.none_below: "),
        ("graphs/image/batch", "yes", "batch: "),  # types are strict
        ("graphs/image/batch", 1, "batch: "),
        ("graphs/text/preprocess/context", "6", "context: "),
        ("graphs/text/preprocess/context", 6.5, "context: "),
        ("files", {"image.onnx": {"sha256": "0" * 63, "bytes": 1}}, r"files\.image\.onnx\.sha256: "),
        ("files", {"image.onnx": {"sha256": "0" * 64, "bytes": -1}}, r"files\.image\.onnx\.bytes: "),
        ("files", {"a": {"sha256": "0" * 64, "bytes": 1}}, "not listed under `files`: image.onnx, text.onnx"),
    ],
)
def test_a_wrong_value_is_refused_by_name(colours: Json, place: str, value: Any, says: str):
    parent, key = at(colours, place)
    parent[key] = value
    with pytest.raises(BundleInvalid, match=says):
        read(colours)


def test_a_graph_that_prepares_pictures_takes_one_at_a_time(colours: Json):
    image = colours["graphs"]["image"]
    image["preprocess"]["in_graph"] = True
    with pytest.raises(
        BundleInvalid, match=r"makes 'pixels' as uint8 \['height', 'width', 3\]; the graph takes float32"
    ):
        read(colours)
    image["inputs"] = {"pixels": {"dtype": "uint8", "shape": ["height", "width", 3]}}
    with pytest.raises(BundleInvalid, match="`batch` must be false"):
        read(colours)
    image["batch"] = False
    assert read(colours).graphs["image"].preprocess.in_graph


PATHS = [
    "../image.onnx",
    "a/../../image.onnx",
    "/etc/passwd",
    "a//b",
    "a/./b",
    ".",
    "..",
    ".hidden",
    "a/.hidden",
    "a\\b",
    "C:\\image.onnx",
    "C:image.onnx",
    "image.onnx\0.txt",
    "image.onnx\n",
    "image onnx",
    "a/",
    "",
    "~/image.onnx",
    "ímage.onnx",
    "a" * 201,
    "bundle.json",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["graphs/image/file", "graphs/text/preprocess/tokenizer", "classifier/labels"])
def test_a_path_that_could_leave_its_folder_is_refused(colours: Json, place: str, path: str):
    parent, key = at(colours, place)
    parent[key] = path
    with pytest.raises(BundleInvalid, match=rf"{key}: .*(not a path inside the bundle|cannot name itself)"):
        read(colours)


@pytest.mark.parametrize("path", PATHS)
def test_such_a_path_is_refused_in_files_and_assets(colours: Json, path: str):
    listed = colours | {"files": {path: {"sha256": "0" * 64, "bytes": 1}}}
    with pytest.raises(BundleInvalid, match=r"files\."):
        read(listed)
    colours["classifier"]["head"]["assets"] = {"keys": path}
    with pytest.raises(BundleInvalid, match=r"classifier\.head\.assets\.keys"):
        read(colours)


def test_plain_paths_are_allowed():
    assert Plugin(name="x", assets={"a": "deep/er/weights-1.0_b.npy"}).assets["a"] == "deep/er/weights-1.0_b.npy"


def test_a_newer_format_is_refused_by_its_number(colours: Json):
    with pytest.raises(BundleTooNew, match=r"has format 3; this calmclip reads up to 2\. Install a newer calmclip"):
        read(colours | {"format": 3, "key of a later format": {}})


def test_the_format_before_the_first_release_is_refused_with_a_remedy(colours: Json):
    with pytest.raises(BundleInvalid, match=r"has format 1, .* reads from 2 on\. Export the checkpoint again"):
        read(colours | {"format": 1})


def test_a_graph_that_embeds_may_answer_more(colours: Json):
    outputs = colours["graphs"]["image"]["outputs"]
    outputs["patches"] = {"dtype": "float32", "shape": ["B", 2, 2, 3]}
    assert read(colours).graphs["image"].outputs.keys() == {"image_embeds", "patches"}


def test_an_unknown_task_is_not_checked(colours: Json):
    assert read(colours | {"tasks": ["embed", "levitate"]}).tasks == ("embed", "levitate")


@pytest.mark.parametrize("number", [True, "1", 1.0, 0, -1, None, [1]])
def test_format_is_a_whole_number(colours: Json, number: Any):
    with pytest.raises(BundleInvalid, match=r"`format` is .*; expected a whole number from 2 to 2"):
        read(colours | {"format": number})


def test_a_manifest_without_format_is_refused(colours: Json):
    del colours["format"]
    with pytest.raises(BundleInvalid, match="`format` is None"):
        read(colours)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "is an empty list; expected an object"),
        (b"null", "is null; expected an object"),
        (b'{"format": 1, "format": 2}', "the key 'format' appears 2 times"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' appears 2 times"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not JSON in UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": 1} {"a": 1}', "Extra data"),
    ],
)
def test_what_is_not_plain_json_is_refused(text: bytes, says: str):
    with pytest.raises(BundleInvalid, match=says):
        parse(text, "bundle.json")


@pytest.mark.parametrize("depth", [*range(200, 1100, 10), 10_000, 500_000])
def test_deep_nesting_ends_in_a_refusal(colours: Json, depth: int):
    text = json.dumps(colours | {"quantization": {"name": "none", "calibration": {"deep": "HERE"}}})
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        parse(text.replace('"HERE"', "[" * depth + "]" * depth).encode(), "bundle.json")


def test_a_lone_surrogate_is_refused(colours: Json):
    colours["source"]["notes"] = "\ud800"
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        read(colours)


def test_many_faults_are_reported_briefly(colours: Json):
    with pytest.raises(BundleInvalid, match=r"and \d+ more") as refused:
        read(colours | {f"k{i}": i for i in range(5_000)})
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(colours: Json, number: float):
    for name in ("mean", "std"):
        with pytest.raises(ValidationError, match="finite number"):
            ImagePreprocess(size=(4, 4), shortest=4, **{"mean": (0, 0, 0), "std": (1, 1, 1)} | {name: (1, 1, number)})
    manifest = read(colours)
    head = manifest.classifier.model_copy(update={"head": Plugin(name="cosine", params={"scale": number})})
    broken = manifest.model_copy(update={"classifier": head})
    with pytest.raises(BundleInvalid, match="not a finite number"):  # and not written as null
        parse(broken.model_dump_json().encode(), "bundle.json")


def test_a_manifest_cannot_be_changed(colours: Json):
    manifest = read(colours)
    for thing, name in ((manifest, "name"), (manifest.graphs["image"], "file"), (manifest.source, "license")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, "other")


def regions(colours: Json) -> Json:
    """The hand-made bundle with the two graphs of detection."""

    def tensors(*names: str) -> Json:
        return {name: {"dtype": "float32", "shape": ["N"]} for name in names}

    pixels = dict(colours["graphs"]["image"])
    graphs = colours["graphs"] | {
        "regions": pixels | {"outputs": tensors("boxes", "class_embeds", "objectness")},
        "detect": {
            "file": "detect.onnx",
            "inputs": tensors("boxes", "class_embeds", "objectness", "text_embeds", *Suppression().tensors()),
            "outputs": tensors("kept_boxes", "scores", "raw_scores", "classes", "candidates"),
        },
    }
    return colours | {"graphs": graphs, "tasks": ["detect"]}


def test_detection_needs_graphs_by_role_and_tensors_by_name(colours: Json):
    data = regions(colours)
    assert read(data).tasks == ("detect",)
    for role, side in (("regions", "outputs"), ("detect", "inputs"), ("detect", "outputs")):
        names = data["graphs"][role][side]
        lost = names.popitem()
        with pytest.raises(BundleInvalid, match=rf"`graphs\.{role}\.{side}` are .*; expected .*{lost[0]}"):
            read(data)
        names[lost[0]] = lost[1]
    del data["classifier"]
    with pytest.raises(BundleInvalid, match="'detect' needs `classifier`"):
        read(data)


def test_regions_may_have_more_outputs_and_detect_may_take_any_of_them(colours: Json):
    data = regions(colours)
    outputs, inputs = data["graphs"]["regions"]["outputs"], data["graphs"]["detect"]["inputs"]
    outputs["shift"] = {"dtype": "float32", "shape": ["B", 7]}
    assert read(data).tasks == ("detect",)
    inputs["shift"] = {"dtype": "float32", "shape": [1, 7]}
    del inputs["objectness"]
    assert read(data).tasks == ("detect",)
    for wrong in ({"dtype": "float32", "shape": [1, 8]}, {"dtype": "int64", "shape": [1, 7]}):
        inputs["shift"] = wrong
        with pytest.raises(BundleInvalid, match="'shift' of `detect` and the output of `regions` differ"):
            read(data)
    del inputs["shift"]
    inputs["scale"] = outputs["shift"]
    with pytest.raises(BundleInvalid, match=r"`graphs\.detect\.inputs` are .*'scale'.*; expected .*, and any of"):
        read(data)


def test_a_bundle_may_set_defaults_of_suppression(colours: Json):
    assert read(colours).suppression is None
    colours["suppression"] = {"min_score": 0.1}
    assert read(colours).suppression.model_dump(exclude_none=True) == {"min_score": 0.1}
    for name, value in (("min_score", 1.5), ("sigma", 0), ("max_output", 0), ("method", "soft"), ("per_class", 1)):
        colours["suppression"] = {name: value}
        with pytest.raises(BundleInvalid, match=rf"suppression\.{name}"):
            read(colours)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resize": "square"}, "square and gaussian need each other"),
        ({"resample": "gaussian"}, "square and gaussian need each other"),
        ({"resize": "square", "resample": "gaussian", "in_graph": True}, "`in_graph` must be false"),
    ],
)
def test_square_and_gaussian_need_each_other(change: Json, says: str):
    with pytest.raises(ValidationError, match=says):
        ImagePreprocess(**{"size": (4, 4), "shortest": 4, "mean": (0, 0, 0), "std": (1, 1, 1)} | change)


def test_embed_needs_a_graph_that_embeds(colours: Json):
    colours["tasks"] = ["embed"]
    del colours["graphs"]["text"]
    assert read(colours).tasks == ("embed",)
    colours["graphs"]["other"] = colours["graphs"].pop("image")
    with pytest.raises(BundleInvalid, match="task 'embed' needs a graph 'image'"):
        read(colours)


def test_dimensions_are_prefixes_of_the_vectors(colours: Json):
    assert read(colours).dimensions == ()
    colours["dimensions"] = [1, 2]
    assert read(colours).dimensions == (1, 2)
    for wrong, says in (
        ([2, 1], "expected ascending numbers"),
        ([1, 1], "expected ascending numbers"),
        ([0, 1], r"dimensions\.0"),
        ([1, 3], "`dimensions` has 3; expected less than 3"),
        (["1"], r"dimensions\.0"),
    ):
        colours["dimensions"] = wrong
        with pytest.raises(BundleInvalid, match=says):
            read(colours)


def test_the_schema_on_disk_is_the_one_printed():
    assert (HERE / "bundle.schema.json").read_text(encoding="utf-8") == schema()


def test_the_schema_accepts_and_refuses_the_same_manifests(colours: Json, sealed: Path):
    check = jsonschema.Draft202012Validator(json.loads(schema()))
    check.check_schema(check.schema)
    assert check.is_valid(json.loads((sealed / "bundle.json").read_bytes()))
    assert check.is_valid(regions(colours))
    for change in ({"name": "A"}, {"format": 1}, {"tasks": ["X"]}, {"surprise": 1}, {"graphs": {"image": {}}}):
        assert not check.is_valid(colours | change), change


def keys(model: type[FrozenModel], prefix: str = "") -> dict[str, type[FrozenModel]]:
    return {prefix + name: model for name in model.model_fields}


def test_the_format_page_has_a_row_for_every_key():
    page = (HERE.parent / "README.md").read_text(encoding="utf-8").split("\n### Keys\n")[1].split("\n### ")[0]
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    rows = {key for cell in first for key in re.findall(r"`([^`]+)`", cell)}
    expected = {
        *keys(Manifest),
        *keys(module.Source, "source."),
        *keys(Graph, "graphs.*."),
        *keys(module.Tensor, "graphs.*.inputs.*."),
        *keys(ImagePreprocess, "graphs.*.preprocess."),
        *keys(module.TextPreprocess, "graphs.*.preprocess."),
        *keys(module.VectorPreprocess, "graphs.*.preprocess."),
        *keys(module.Ops, "ops."),
        *keys(module.DefaultClassifier, "classifier."),
        *keys(Plugin, "classifier.head."),
        *keys(module.Quantization, "quantization."),
        *keys(module.SuppressionDefaults, "suppression."),
        *keys(module.SegmentationDefaults, "segmentation."),
        *keys(module.AnomalyDefaults, "anomaly."),
        *keys(module.ExplainDefaults, "explain."),
        *keys(module.Fitted, "explain.fitted.*."),
        *keys(module.File, "files.*."),
    }
    assert rows == expected


def test_an_older_format_is_upgraded_step_by_step(colours: Json, monkeypatch: pytest.MonkeyPatch):
    """As if the format were 3, and format 2 had named `precision` `kind`."""

    def old_to_new(data: Json) -> Json:
        return {**{k: v for k, v in data.items() if k != "kind"}, "precision": data["kind"], "format": 2}

    monkeypatch.setattr(module, "FORMAT", 3)
    monkeypatch.setitem(module.UPGRADES, 2, old_to_new)
    colours["kind"] = colours.pop("precision")
    assert read(colours).precision == "float"
