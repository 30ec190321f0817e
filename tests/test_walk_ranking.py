"""All steps of the ranking adapter: its authors' names in a directory, one command, a sealed INT8 and float bundle, and
pictures in order over HTTP and on the command line, as the definition in torch scores them. The weights are random."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from calmclip.export import samples
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import open_bundle
from tests.test_walk import serving
from tests.tiny_layouts.ranking import Model

INSTRUCTION = "rank the numbers of cats"


def scores_over_http(server: httpx.Client, bundle: str, pictures: list[Path]) -> np.ndarray:
    """In the order of ``pictures``."""
    images = [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in pictures]
    answer = server.post("/v1/rank", json={"model": bundle, "images": images, "instruction": INSTRUCTION})
    assert answer.status_code == 200, answer.text
    assert answer.json()["scale"] == "learned"
    rows = answer.json()["pictures"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    return np.array([row["score"] for row in sorted(rows, key=lambda row: row["index"])])


@pytest.mark.slow
@torch.inference_mode()
def test_pictures_are_ranked_as_the_definition_ranks_them(
    tiny_ranking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, pictures = tmp_path / "bundles", samples.pictures()
    assert main(["export", str(tiny_ranking), "--out", str(out), "--name", "ranking", "--keep-float"]) == 0
    for kind in ("int8", "float"):
        assert main(["check", f"ranking-{kind}", "--bundles", str(out)]) == 0
    bundle = open_bundle(out / "ranking-float").bundle
    report = json.loads((out / "ranking-int8" / "report.json").read_text())
    assert report["graphs"]["rank"]["int8_against_float"]["scores"]["cosine"] >= 0.99
    assert report["graphs"]["rank"]["float_against_torch"]["scores"]["max_abs"] <= 1e-4
    assert read(out / "ranking-int8").manifest.tasks == ("rank", "raw")

    pixels = torch.from_numpy(np.concatenate([bundle.image().prepare(decode(p.read_bytes()))[0] for p in pictures]))
    want = Model()(pixels, torch.from_numpy(bundle.text().prepare([INSTRUCTION])["ids"])).numpy()
    assert want.std() > 0.05  # the order means something
    with serving(out, tmp_path / "data") as server:
        assert scores_over_http(server, "ranking-float", pictures) == pytest.approx(want, abs=1e-4)
        int8 = scores_over_http(server, "ranking-int8", pictures)
        assert np.corrcoef(int8, want)[0, 1] >= 0.95  # of random weights
        refused = server.post("/v1/rank", json={"model": "ranking-int8", "images": [], "instruction": INSTRUCTION})
        assert refused.status_code == 422

    capsys.readouterr()
    command = ["run", "ranking-int8", "rank", *map(str, pictures), "--bundles", str(out)]
    assert main([*command, "--instruction", INSTRUCTION, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    order = [pictures.index(Path(row["picture"])) for row in rows]
    assert order == sorted(range(len(pictures)), key=lambda i: -int8[i])
