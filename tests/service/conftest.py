"""A bundle whose answers are worked out by hand, and a service over real sockets.

`colours-int8`: the vector of a picture is its mean colour, the vector of a text is the sum of its words' colours; both
are unit vectors. `regions` are the four quarters of the picture, `dense` the mean colours of 4 x 4 cells. So a red
picture has cosine 1 with "red", 0 with "blue", and 1/sqrt(2) with "yellow" = red + green.
"""

import io
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import jsonschema
import numpy as np
import onnx.parser
import onnxruntime  # noqa: F401  starts its threads before uvicorn does
import pytest
import uvicorn
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import Sealed, seal, stage
from calmclip.service.app import create_app
from calmclip.service.logs import JsonLines, TextLines
from calmclip.service.server import Protocol
from calmclip.service.settings import Settings
from tests.service.browsing import browser, file  # noqa: F401  fixtures

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
WORDS = ["[UNK]", *COLOURS, "a", "photo", "of", "thing"]
CONTEXT = 12

IMAGE = """
<ir_version: 8, opset_import: ["" : 18]>
image (float[B, 3, 8, 8] pixels) => (float[B, 3] image_embeds)
<int64[2] area = {2, 3}, int64[1] last = {1}, float tiny = {1e-9}> {
    mean = ReduceMean <keepdims = 0> (pixels, area)
    length = ReduceL2 <keepdims = 1> (mean, last)
    safe = Max(length, tiny)
    image_embeds = Div(mean, safe)
}
"""
TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
text (int64[B, T] ids, int64[B, T] mask) => (float[B, 3] text_embeds) <int64[1] tokens = {1}, float tiny = {1e-9}> {
    rows = Gather(table, ids)
    real = Cast <to = 1> (mask)
    column = Unsqueeze(real, minus)
    masked = Mul(rows, column)
    sum = ReduceSum <keepdims = 0> (masked, tokens)
    length = ReduceL2 <keepdims = 1> (sum, tokens)
    safe = Max(length, tiny)
    text_embeds = Div(sum, safe)
}
"""
REGIONS = """
<ir_version: 8, opset_import: ["" : 18]>
regions (float[B, 3, 8, 8] pixels) => (float[B, 4, 3] class_embeds, float[B, 4, 4] boxes, float[B, 4] objectness)
<int64[3] flat = {0, 3, 4}, int64[1] last = {2}, float tiny = {1e-9},
 float[1, 4, 4] quarters = {0, 0, 4, 4, 4, 0, 8, 4, 0, 4, 4, 8, 4, 4, 8, 8}> {
    means = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (pixels)
    rows = Reshape(means, flat)
    colours = Transpose <perm = [0, 2, 1]> (rows)
    length = ReduceL2 <keepdims = 1> (colours, last)
    safe = Max(length, tiny)
    class_embeds = Div(colours, safe)
    zero = Mul(colours, nought)
    sum = ReduceSum <keepdims = 1> (zero, last)
    boxes = Add(sum, quarters)
    flat_sum = ReduceSum <keepdims = 0> (zero, last)
    objectness = Add(flat_sum, one)
}
"""
DENSE = """
<ir_version: 8, opset_import: ["" : 18]>
dense (float[B, 3, 8, 8] pixels) => (float[B, 4, 4, 3] patches) {
    means = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (pixels)
    patches = Transpose <perm = [0, 2, 3, 1]> (means)
}
"""


# Sums of the mean of a pixel's three colours; their first part is the mean of the whole picture, and the map is that.
LEVELS = """
<ir_version: 8, opset_import: ["" : 18]>
levels (float[1, 3, height, width] pixels, float[12, height] rows, float[width, 12] columns)
=> (float[1, 1, 12, 12] sums) <int64[1] colours = {1}> {
    grey = ReduceMean(pixels, colours)
    averaged = MatMul(rows, grey)
    sums = MatMul(averaged, columns)
}
"""
ENHANCE = """
<ir_version: 8, opset_import: ["" : 18]>
enhance (float[1, 3, height, width] pixels, float[1, 1, 12, 12] levels, float[height, 12] rows,
         float[12, width] columns)
=> (float[1, 1, height, width] light_map)
<int64[1] zero = {0}, int64[1] one = {1}, int64[2] start = {0, 0}, int64[2] end = {1, 1},
 int64[2] axes = {2, 3}> {
    first_row = Slice(columns, zero, one, zero)
    first_column = Slice(rows, zero, one, one)
    whole = Slice(levels, start, end, axes)
    down = MatMul(first_column, whole)
    light_map = MatMul(down, first_row)
}
"""


def _outliers(norm: float) -> dict[str, object]:
    facts = {"max_inf_norm": norm, "avg_inf_norm": norm / 2, "max_kurtosis": 2 * norm, "avg_kurtosis": norm}
    return facts | {"inputs": 4, "worst": ["mean"], "tensors": {"mean": [norm, 2 * norm], "length": [0, 0]}}


GRAPHS = {role: {"outliers": _outliers(norm)} for role, norm in (("image", 40), ("text", 6))}
REPORT = json.dumps({"measured": "nothing", "graphs": GRAPHS})  # invented
# No suppression: every pair of box and label with at least min_score, the best first.
DETECT = """
<ir_version: 8, opset_import: ["" : 18]>
detect (float[1, P, 3] class_embeds, float[1, P, 4] boxes, float[1, P] objectness, float[Q, 3] text_embeds,
        int64[1] method, int64[1] per_class, float[1] iou_threshold, float[1] sigma, float[1] min_score,
        int64[1] max_output)
=> (float[K, 4] kept_boxes, float[K] scores, float[K] raw_scores, int64[K] classes, int64[1] candidates)
<int64[1] first = {0}, int64[1] all = {-1}> {
    vectors = Squeeze(class_embeds, first)
    labels = Transpose(text_embeds)
    cosines = MatMul(vectors, labels)
    over = GreaterOrEqual(cosines, min_score)
    counted = Cast <to = 7> (over)
    candidates_2d = ReduceSum <keepdims = 0> (counted)
    candidates = Reshape(candidates_2d, all)
    most = Min(candidates, max_output)
    flat = Reshape(cosines, all)
    scores, at = TopK(flat, most)
    raw_scores = Identity(scores)
    columns = Shape <start = 1, end = 2> (cosines)
    row = Div(at, columns)
    classes = Mod(at, columns)
    places = Squeeze(boxes, first)
    kept_boxes = Gather(places, row)
}
"""


def _graph(text: str, **tensors: np.ndarray) -> Any:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def _tensor(dtype: str, *shape: int | str) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape}


def make_bundle(
    bundles: Path,
    name: str = "colours-int8",
    *,
    note: str = "",
    family: str | None = None,
    report: str = REPORT,
    mean: tuple[float, float, float] = (0, 0, 0),
    dimensions: tuple[int, ...] = (),
    prompts: Mapping[str, str] = MappingProxyType({}),
    replace: bool = False,
) -> Sealed:
    """Seal the bundle. ``note`` changes its digest and not what embeds; ``mean``, taken from each picture, does.
    ``dimensions``: the prefixes that it says hold."""
    picture = {"kind": "image", "size": (8, 8), "resample": "bilinear", "mean": mean, "std": (1, 1, 1)}
    settings = {"method": "int64", "per_class": "int64", "iou_threshold": "float32", "sigma": "float32",
                "min_score": "float32", "max_output": "int64"}  # fmt: skip
    pixels = {"pixels": _tensor("float32", "B", 3, 8, 8)}
    manifest = Manifest.model_validate(
        {
            "name": name,
            "precision": "int8" if name.endswith("int8") else "float",
            "tasks": ["classify", "embed", "detect", "enhance"],
            "source": {"net": "hand", "model": "colours", "license": "Apache-2.0", "notes": note},
            "graphs": {
                "image": {
                    "file": "image.onnx",
                    "inputs": pixels,
                    "outputs": {"image_embeds": _tensor("float32", "B", 3)},
                    "preprocess": {**picture, "resize": "exact"},
                },
                "text": {
                    "file": "text.onnx",
                    "inputs": {"ids": _tensor("int64", "B", "T"), "mask": _tensor("int64", "B", "T")},
                    "outputs": {"text_embeds": _tensor("float32", "B", 3)},
                    "preprocess": {"kind": "text", "mask": "mask", "context": CONTEXT, "prompts": {**prompts}},
                },
                "regions": {
                    "file": "regions.onnx",
                    "inputs": pixels,
                    "outputs": {
                        "class_embeds": _tensor("float32", "B", 4, 3),
                        "boxes": _tensor("float32", "B", 4, 4),
                        "objectness": _tensor("float32", "B", 4),
                    },
                    "preprocess": {**picture, "resize": "letterbox"},
                },
                "dense": {
                    "file": "dense.onnx",
                    "inputs": pixels,
                    "outputs": {"patches": _tensor("float32", "B", 4, 4, 3)},
                    "preprocess": {**picture, "resize": "letterbox"},
                },
                "detect": {
                    "file": "detect.onnx",
                    "batch": False,
                    "inputs": {
                        "class_embeds": _tensor("float32", 1, "P", 3),
                        "boxes": _tensor("float32", 1, "P", 4),
                        "objectness": _tensor("float32", 1, "P"),
                        "text_embeds": _tensor("float32", "Q", 3),
                        **{key: _tensor(dtype, 1) for key, dtype in settings.items()},
                    },
                    "outputs": {
                        "kept_boxes": _tensor("float32", "K", 4),
                        "scores": _tensor("float32", "K"),
                        "raw_scores": _tensor("float32", "K"),
                        "classes": _tensor("int64", "K"),
                        "candidates": _tensor("int64", 1),
                    },
                },
                "levels": {
                    "file": "levels.onnx",
                    "batch": False,
                    "inputs": {
                        "pixels": _tensor("float32", 1, 3, "height", "width"),
                        "rows": _tensor("float32", 12, "height"),
                        "columns": _tensor("float32", "width", 12),
                    },
                    "outputs": {"sums": _tensor("float32", 1, 1, 12, 12)},
                },
                "enhance": {
                    "file": "enhance.onnx",
                    "batch": False,
                    "inputs": {
                        "pixels": _tensor("float32", 1, 3, "height", "width"),
                        "levels": _tensor("float32", 1, 1, 12, 12),
                        "rows": _tensor("float32", "height", 12),
                        "columns": _tensor("float32", 12, "width"),
                    },
                    "outputs": {"light_map": _tensor("float32", 1, 1, "height", "width")},
                },
            },
            "classifier": {"templates": ["a photo of a {}"], "head": {"name": "cosine", "params": {"scale": 10.0}}},
            "family": family,
            "dimensions": dimensions,
            "quantization": {"name": "none"},
            "created": "2026-01-01T00:00:00+00:00",
        }
    )
    table = np.zeros((len(WORDS), 3), np.float32)
    for word, colour in COLOURS.items():
        table[WORDS.index(word)] = colour
    with stage(bundles, name) as directory:
        (directory / "image.onnx").write_bytes(_graph(IMAGE))
        (directory / "text.onnx").write_bytes(_graph(TEXT, table=table, minus=np.array([-1])))
        numbers = {"nought": np.zeros(1, np.float32), "one": np.ones(1, np.float32)}
        (directory / "regions.onnx").write_bytes(_graph(REGIONS, **numbers))
        (directory / "dense.onnx").write_bytes(_graph(DENSE))
        (directory / "detect.onnx").write_bytes(_graph(DETECT))
        (directory / "levels.onnx").write_bytes(_graph(LEVELS))
        (directory / "enhance.onnx").write_bytes(_graph(ENHANCE))
        _tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "report.json").write_text(report)
        return seal(directory, manifest, replace=replace)


def paint(*colours: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A picture file of one colour, or of four: top left, top right, bottom left, bottom right."""
    grid = np.array([COLOURS[c] for c in (colours if len(colours) == 4 else colours[:1] * 4)], np.uint8) * 255
    image = Image.fromarray(grid.reshape(2, 2, 3)).resize(size, Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return content.getvalue()


def declared(answer: httpx.Response, spec: dict[str, Any]) -> None:
    """Assert that the specification declares the status, content type, `Retry-After` and body of ``answer``."""
    path, method = answer.url.path, answer.request.method.lower()
    matching = [t for t in spec["paths"] if re.fullmatch(re.sub(r"{\w+}", "[^/]+", t), path)]
    templates = [path] if path in matching else matching  # as in the router, a fixed path comes first
    operations = [spec["paths"][t][method] for t in templates if method in spec["paths"][t]]
    if not operations:  # an unknown path or verb, or the page
        return
    (operation,) = operations
    response = operation["responses"].get(str(answer.status_code))
    assert response, (
        f"{method} {path} answered {answer.status_code}, which /openapi.json does not declare: {answer.read()!r}"
    )
    if "content-type" in answer.headers:
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in response["content"], f"{method} {path} answered {answer.status_code} as {kind}"
        if kind.endswith("json") and method != "head":
            schema = {"components": spec["components"], **response["content"][kind]["schema"]}
            content = answer.read()
            for document in content.splitlines() if kind.endswith("ndjson") else [content]:
                jsonschema.Draft202012Validator(schema).validate(json.loads(document))
    assert ("retry-after" in answer.headers) == ("Retry-After" in response.get("headers", {})), f"{method} {path}"


def is_open(answer: httpx.Response) -> bool:
    """Whether this answer of `/readyz` says that bundles are loaded and the store is no longer being opened."""
    return answer.status_code == 200 and "is being opened" not in answer.text


@contextmanager
def serving(settings: Settings, *, ready: bool = True) -> Iterator[httpx.Client]:
    """Run the app under uvicorn in a thread, on a free port. The client checks every answer by `declared`."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        hooks = {"response": [lambda answer: declared(answer, app.openapi())]}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False, event_hooks=hooks
        ) as client:
            latest = time.monotonic() + 60
            while ready and not is_open(answer := client.get("/readyz")):
                assert time.monotonic() < latest, answer.text
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def logging_of_the_tests() -> Iterator[None]:
    """`calmclip serve` sets up the logging of its process, which in a test is the process of all tests."""
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h.formatter, TextLines | JsonLines)]:
        root.removeHandler(handler)
        root.setLevel(logging.WARNING)
        logging.captureWarnings(False)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles")
    make_bundle(directory)
    return directory


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return paint


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    return serving


@pytest.fixture(scope="session")
def bundle_maker() -> Callable[..., Sealed]:
    return make_bundle


@pytest.fixture
def settings(bundles: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings for the hand-made bundle and a new data directory; keywords change them."""

    def make(**changes: Any) -> Settings:
        return Settings(
            **{"bundles_dir": bundles, "data_dir": tmp_path / "data", "threads": 1, "min_relevance": 0, **changes}
        )

    return make


@pytest.fixture(scope="module")
def client(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One service for all tests of a file."""
    data = tmp_path_factory.mktemp("data")
    with serving(Settings(bundles_dir=bundles, data_dir=data, threads=1, min_relevance=0)) as client:
        yield client
