"""The contract of every layout from end to end: one command makes a sealed bundle of a checkpoint, `calmclip check`
accepts it, and a real server answers from it like the layout's reference.

All are slow. Of the fast suite, `test_walk` and `test_walk_detect` walk so.
A test is one walk, so that workers share the layouts and each layout is exported once.
"""

import base64
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calmclip.export import samples
from calmclip.export.layouts import LAYOUTS
from calmclip.models.bundle.store import read
from calmclip.models.classifier import Classifier
from calmclip.models.cli import main
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import decode
from calmclip.models.preprocess.vectors import label_rows
from calmclip.models.runner import Runner, open_bundle
from tests.test_walk import serving
from tests.tiny_layouts import llm2clip
from tests.tiny_layouts.checkpoints import CHECKPOINTS, LAYOUT, MORE
from tests.tiny_layouts.references import REFERENCES

ROUTED = "clip_moe_routed"
FLAGS = {ROUTED: ["--experts", "routed"]}  # all other checkpoints need no flag
EACH = pytest.mark.parametrize("name", [*LAYOUTS.names(), *MORE, ROUTED])
TEXTS = ["a photo of a cat.", "two dogs", "red"]
PRECISIONS = ("int8", "float")


@dataclass(frozen=True)
class Walk:
    """``name``: of a checkpoint of the tests; ``path``: where it is; its bundles are in ``out``."""

    name: str
    path: Path
    out: Path

    @property
    def kind(self) -> str:
        return self.name.removesuffix("_routed")

    @cached_property
    def runners(self) -> dict[str, Runner]:
        return {kind: open_bundle(self.out / f"{self.name}-{kind}", threads=1) for kind in PRECISIONS}

    @property
    def words(self) -> list[Any]:
        """`TEXTS`, or as many vectors for a bundle that reads those in place of texts."""
        return llm2clip.vectors(len(TEXTS)).tolist() if self.runners["float"].bundle.reads_vectors else TEXTS

    @property
    def kind_of_words(self) -> str:
        return "vector" if self.runners["float"].bundle.reads_vectors else "text"

    @cached_property
    def want(self) -> tuple[Array, Array]:
        """Unit rows of `samples.pictures` and of `words`: the layout's reference on the bundle's inputs."""
        bundle, reference = self.runners["float"].bundle, REFERENCES[self.kind](self.path)
        with torch.inference_mode():
            pixels = [bundle.image().prepare(decode(path.read_bytes()))[0] for path in samples.pictures()]
            images = [reference.image(torch.from_numpy(array)) for array in pixels]
            prepare = bundle.vectors().prepare if bundle.reads_vectors else bundle.text().prepare
            fed = [{key: torch.from_numpy(value) for key, value in prepare([t]).items()} for t in self.words]
            texts = [reference.text(feeds) for feeds in fed]
            return tuple(F.normalize(torch.cat(rows), dim=-1).numpy() for rows in (images, texts))


@pytest.mark.slow
@EACH
def test_a_checkpoint_walks_from_one_command_to_answers_over_http(name: str, tmp_path: Path):
    walk = Walk(name, (CHECKPOINTS | MORE)[name.removesuffix("_routed")](tmp_path / name), tmp_path / "bundles")
    command = ["export", str(walk.path), "--out", str(walk.out), "--name", name, "--keep-float"]
    assert main([*command, *FLAGS.get(name, [])]) == 0
    the_bundles_pass(walk)
    images, texts = walk.want
    assert (images @ images.T).min() < 0.999  # the inputs differ, so the comparison means something
    assert (texts @ texts.T).min() < 0.999
    with serving(walk.out, tmp_path / "data") as server:
        vectors_are_the_references(walk, server)
        classify_applies_the_head_to_the_references_cosines(walk, server)


def the_bundles_pass(walk: Walk) -> None:
    for precision in PRECISIONS:
        assert main(["check", f"{walk.name}-{precision}", "--bundles", str(walk.out)]) == 0
    bundle = walk.out / f"{walk.name}-int8"
    assert f"layout {LAYOUT.get(walk.kind, walk.kind)}:" in read(bundle).manifest.source.notes
    report = json.loads((bundle / "report.json").read_text())
    assert report["int8"]["coverage"] >= 0.9
    assert report["embeddings"]["image"]["inputs"] == len(samples.pictures())
    for role, statistics in report["embeddings"].items():
        assert statistics["cosine_mean"] >= 0.99, role
        assert report["graphs"][role]["float_against_torch"][f"{role}_embeds"]["max_abs"] <= 1e-4, role


def vectors_are_the_references(walk: Walk, server: httpx.Client) -> None:
    pictures = [{"image": {"b64": base64.b64encode(path.read_bytes()).decode()}} for path in samples.pictures()]
    for precision, runner in walk.runners.items():
        vectors = []
        for entry in [*pictures, *({walk.kind_of_words: word} for word in walk.words)]:
            answer = server.post("/v1/embed", json={"model": f"{walk.name}-{precision}", "inputs": [entry]})
            assert answer.status_code == 200, answer.text
            vectors += answer.json()["embeddings"]
        split = np.split(np.array(vectors), [len(pictures)])
        for rows, wanted in zip(split, walk.want, strict=True):
            if precision == "float":
                assert np.abs(rows - wanted).max() <= 1e-4
            else:
                assert np.sum(rows * wanted, axis=1).mean() >= 0.99
        assert split[0] == pytest.approx(runner.embed(images=samples.pictures()), abs=1e-5)
        alone = [runner.embed(**{f"{walk.kind_of_words}s": [word]}) for word in walk.words]
        assert split[1] == pytest.approx(np.concatenate(alone), abs=1e-5)


def classify_applies_the_head_to_the_references_cosines(walk: Walk, server: httpx.Client) -> None:
    picture = samples.pictures()[0]
    images, texts = walk.want
    head = read(walk.out / f"{walk.name}-float").manifest.classifier.head
    logits = head.params["scale"] * (texts @ images[0]).astype(np.float64)
    if head.name == "sigmoid":
        want = 1 / (1 + np.exp(-(logits + head.params["bias"])))
    else:
        want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    given: dict[str, Any] = {"labels": TEXTS, "templates": ["{}"]}
    if walk.kind_of_words == "vector":
        rows = {label: [vector] for label, vector in zip(TEXTS, walk.words, strict=True)}
        given = {"label_vectors": json.dumps(rows)}
    for precision, runner in walk.runners.items():
        form = {**given, "model": f"{walk.name}-{precision}"}
        answer = server.post("/v1/classify", files={"image": picture.read_bytes()}, data=form)
        assert answer.status_code == 200, answer.text
        scores, cosines = ({row["label"]: row[key] for row in answer.json()["labels"]} for key in ("score", "cosine"))
        if precision == "float":
            assert cosines == pytest.approx(dict(zip(TEXTS, texts @ images[0], strict=True)), abs=1e-4)
            assert scores == pytest.approx(dict(zip(TEXTS, want, strict=True)), abs=1e-3)
        if walk.kind_of_words == "vector":
            same = runner.classify(picture, classifier=Classifier(tuple(TEXTS), label_vectors=label_rows(rows)))
        else:
            same = runner.classify(picture, TEXTS, templates=["{}"])
        assert scores == pytest.approx({entry.label: entry.score for entry in same}, abs=1e-5)
