import json
from pathlib import Path

import numpy as np
import pytest

from calmclip.export.evals.retrieval import measure, recalls
from calmclip.models.errors import BadRequest


def test_recalls_worked_out_by_hand():
    # Three pictures on the axes, four captions. Similarities (caption x picture):
    #   0: (.9, .1, 0) of picture 0 -> rank 0      1: (.2, .8, 0) of picture 0 -> rank 1
    #   2: (0, .6, .8) of picture 1 -> rank 1
    #   3: (.7, .5, .5) of picture 2 -> rank 1: the tie with picture 1 does not count
    images = np.eye(3)
    texts = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.6, 0.8], [0.7, 0.5, 0.5]])
    found = recalls(images, texts, np.array([0, 0, 1, 2]))
    assert found["text_to_image_r1"] == 25.0
    assert found["text_to_image_r5"] == 100.0
    # pictures: 0's best own is caption 0 (.9): nothing above; 1's own .6, above it caption 1 (.8): rank 1;
    # 2's own .5, above it caption 2 (.8): rank 1
    assert found["image_to_text_r1"] == pytest.approx(100 / 3)
    assert found["image_to_text_r5"] == 100.0


class Fake:
    """Pictures and captions whose first letters agree have the same vector."""

    class bundle:  # noqa: N801
        name = "fake"

    def embed(self, *, texts=(), images=()):
        keys = [str(t)[0] for t in texts] + [Path(i).name[0] for i in images]
        return np.array([np.eye(26)[ord(key) - ord("a")] for key in keys], np.float32)


@pytest.mark.parametrize("lines", [False, True])
def test_both_forms_of_captions_are_read(tmp_path: Path, lines: bool):
    captions = {"ant.jpg": ["an ant", "a small ant"], "bee.jpg": ["bees"]}
    if lines:
        rows = [json.dumps({"image": k, "captions": v}) for k, v in captions.items()]
        (tmp_path / "captions.jsonl").write_text("\n".join(rows) + "\n")
    else:
        (tmp_path / "captions.json").write_text(json.dumps(captions))
    found = measure(Fake(), tmp_path, None)
    assert (found["mean"], found["pictures"], found["captions"]) == (100.0, 2, 3)
    assert measure(Fake(), tmp_path, 1)["pictures"] == 1


def test_a_folder_without_captions_says_what_it_must_hold(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"captions\.json .* must hold"):
        measure(Fake(), tmp_path, None)


def test_a_limit_that_leaves_nothing_is_refused(tmp_path: Path):
    (tmp_path / "captions.json").write_text('{"ant.jpg": ["an ant"]}')
    with pytest.raises(BadRequest, match="limit is 0; expected at least 1"):
        measure(Fake(), tmp_path, 0)
