"""The contract of every layout from end to end: one command makes a sealed bundle of a checkpoint, `calmclip check`
accepts it, and a real server answers from it like the layout's reference.

Only one checkpoint runs in the fast suite; the others are slow. `test_walk` and `test_walk_detect` add two more kinds.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calmclip.export import samples
from calmclip.export.layouts import LAYOUTS
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner, open_bundle
from tests.test_walk import serving
from tests.tiny_layouts.checkpoints import CHECKPOINTS
from tests.tiny_layouts.references import REFERENCES

FLAGS = {"clip_moe_routed": ["--experts", "routed"]}  # all other checkpoints need no flag
FAST = ("openai_resnet",)
SLOW = tuple(name for name in (*LAYOUTS.names(), "clip_moe_routed") if name not in FAST)
EACH = pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
TEXTS = ["a photo of a cat.", "two dogs", "red"]


def _layout(name: str) -> str:
    return name.removesuffix("_routed")


@dataclass(frozen=True)
class Walk:
    """``checkpoints`` and the exit ``codes`` of their exports by name; a ``server`` of all bundles in ``out``."""

    checkpoints: dict[str, Path]
    codes: dict[str, int]
    out: Path
    server: httpx.Client

    def runner(self, name: str, precision: str) -> Runner:
        return open_bundle(self.out / f"{name}-{precision}", threads=1)

    def want(self, name: str) -> tuple[Array, Array]:
        """Unit rows of `samples.pictures` and of `TEXTS`: the layout's reference on the bundle's inputs."""
        bundle = self.runner(name, "float").bundle
        reference = REFERENCES[_layout(name)](self.checkpoints[name])
        with torch.inference_mode():
            pixels = [bundle.image().prepare(decode(path.read_bytes()))[0] for path in samples.pictures()]
            images = [reference.image(torch.from_numpy(array)) for array in pixels]
            ids = [{key: torch.from_numpy(value) for key, value in bundle.text().prepare([t]).items()} for t in TEXTS]
            texts = [reference.text(feeds) for feeds in ids]
            return tuple(F.normalize(torch.cat(rows), dim=-1).numpy() for rows in (images, texts))


@pytest.fixture(scope="module")
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """Bundles of the layouts whose tests run in this session."""
    root = tmp_path_factory.mktemp("walk")
    chosen = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    checkpoints, codes, out = {}, {}, root / "bundles"
    for name in dict.fromkeys(chosen):
        checkpoints[name] = CHECKPOINTS[_layout(name)](root / name)
        command = ["export", str(checkpoints[name]), "--out", str(out), "--name", name, "--keep-float"]
        codes[name] = main([*command, *FLAGS.get(name, [])])
    with serving(out, root / "data") as client:
        yield Walk(checkpoints, codes, out, client)


@EACH
def test_one_command_seals_an_int8_bundle_that_passes_the_check(name: str, walk: Walk):
    assert walk.codes[name] == 0
    for precision in ("int8", "float"):
        assert main(["check", f"{name}-{precision}", "--bundles", str(walk.out)]) == 0
    bundle = walk.out / f"{name}-int8"
    assert f"layout {_layout(name)}:" in read(bundle).manifest.source.notes
    report = json.loads((bundle / "report.json").read_text())
    assert report["int8"]["coverage"] >= 0.9
    assert report["embeddings"]["image"]["inputs"] == len(samples.pictures())
    for role, statistics in report["embeddings"].items():
        assert statistics["cosine_mean"] >= 0.99, role
        assert report["graphs"][role]["float_against_torch"][f"{role}_embeds"]["max_abs"] <= 1e-4, role


@EACH
def test_vectors_over_http_are_the_references(name: str, walk: Walk):
    images, texts = walk.want(name)
    assert (images @ images.T).min() < 0.999  # the inputs differ, so the comparison means something
    assert (texts @ texts.T).min() < 0.999
    pictures = [{"image": {"b64": base64.b64encode(path.read_bytes()).decode()}} for path in samples.pictures()]
    for precision in ("float", "int8"):
        vectors = []
        for entry in [*pictures, *({"text": text} for text in TEXTS)]:
            answer = walk.server.post("/v1/embed", json={"model": f"{name}-{precision}", "inputs": [entry]})
            assert answer.status_code == 200, answer.text
            vectors += answer.json()["embeddings"]
        split = np.split(np.array(vectors), [len(pictures)])
        if precision == "float":
            for rows, wanted in zip(split, (images, texts), strict=True):
                assert np.abs(rows - wanted).max() <= 1e-4
        else:
            assert np.sum(split[0] * images, axis=1).mean() >= 0.99
            assert np.sum(split[1] * texts, axis=1).mean() >= 0.99
        runner = walk.runner(name, precision)
        assert split[0] == pytest.approx(runner.embed(images=samples.pictures()), abs=1e-5)
        assert split[1] == pytest.approx(np.concatenate([runner.embed(texts=[t]) for t in TEXTS]), abs=1e-5)


@EACH
def test_classify_over_http_applies_the_head_to_the_references_cosines(name: str, walk: Walk):
    picture = samples.pictures()[0]
    images, texts = walk.want(name)
    head = read(walk.out / f"{name}-float").manifest.classifier.head
    logits = head.params["scale"] * (texts @ images[0]).astype(np.float64)
    if head.name == "sigmoid":
        want = 1 / (1 + np.exp(-(logits + head.params["bias"])))
    else:
        want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for precision in ("float", "int8"):
        form = {"labels": TEXTS, "templates": ["{}"], "model": f"{name}-{precision}"}
        answer = walk.server.post("/v1/classify", files={"image": picture.read_bytes()}, data=form)
        assert answer.status_code == 200, answer.text
        scores, cosines = ({row["label"]: row[key] for row in answer.json()["labels"]} for key in ("score", "cosine"))
        if precision == "float":
            assert cosines == pytest.approx(dict(zip(TEXTS, texts @ images[0], strict=True)), abs=1e-4)
            assert scores == pytest.approx(dict(zip(TEXTS, want, strict=True)), abs=1e-3)
        same = walk.runner(name, precision).classify(picture, TEXTS, templates=["{}"])
        assert scores == pytest.approx({entry.label: entry.score for entry in same}, abs=1e-5)
