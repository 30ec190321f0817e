"""Two exports of one checkpoint, each in its own process: the same files, but for `created` in bundle.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calmclip.export.weights import SHARED, save
from tests.export.graphs import parse

# The order of a set depends on the hash seed, a sum of floats on the number of threads. One process also seals the
# float bundle, which must not change the INT8 bundle.
PROCESSES = (
    ({"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}, "--keep-float"),
    ({"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2"}, "--no-keep-float"),
)


def exported(checkpoint: Path | str, out: Path) -> list[dict[str, bytes]]:
    """The files of each process's export, path -> contents."""
    folders = [out / str(place) for place in range(len(PROCESSES))]
    running = []
    for folder, (environment, flag) in zip(folders, PROCESSES, strict=True):
        command = [sys.executable, "-m", "calmclip.models.cli", "export", str(checkpoint), "--out", str(folder), flag]
        running.append(subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    return [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    ]


def compare(checkpoint: Path | str, out: Path) -> None:
    first, second = exported(checkpoint, out)
    floats = {name for name in first if name.split("/")[0].endswith("-float")}
    assert floats
    assert first.keys() - floats == second.keys()
    (manifest,) = (name for name in second if name.endswith("/bundle.json"))
    assert {name for name in second if first[name] != second[name]} <= {manifest}
    texts = [json.loads(side[manifest]) for side in (first, second)]
    for text in texts:
        assert text.pop("created")  # equal only within one second
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_two_exports_of_a_checkpoint_differ_in_created_alone(tiny_vit: Path, tmp_path: Path):
    compare(tiny_vit, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mini", "hf_clip", "owl", "bert", "opt"])
def test_two_exports_of_each_net_differ_in_created_alone(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    compare("mini" if kind == "mini" else request.getfixturevalue(f"tiny_{kind}"), tmp_path)


def test_another_box_head_changes_no_file_of_what_embeds(tmp_path: Path):
    """`image` and `regions` share a backbone in weights.bin, as in the built-in model."""
    random = torch.Generator().manual_seed(0)
    backbone, projection, *heads = (torch.rand(64, 64, generator=random).numpy() for _ in range(4))
    for place, head in enumerate(heads):
        text = "g (float[B, 64] x) => (float[B, 64] y) { h = MatMul (x, common) y = MatMul (h, private) }"
        graphs = {
            role: parse(text, common=backbone, private=private)
            for role, private in (("image", projection), ("regions", head))
        }
        (tmp_path / str(place)).mkdir()
        save(graphs, tmp_path / str(place))
    same = {
        name: (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
        for name in ("image.onnx", "regions.onnx", SHARED)
    }
    assert same == {"image.onnx": True, "regions.onnx": False, SHARED: True}
