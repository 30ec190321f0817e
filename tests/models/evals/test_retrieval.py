import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.evals import Samples, measure, retrieval


def test_recalls_by_hand():
    # Three pictures on the axes, four captions. Similarities (caption x picture):
    #   0: (.9, .1, 0) of picture 0 -> rank 0      1: (.2, .8, 0) of picture 0 -> rank 1
    #   2: (0, .6, .8) of picture 1 -> rank 1
    #   3: (.7, .5, .5) of picture 2 -> rank 1: the tie with picture 1 does not count
    texts = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.6, 0.8], [0.7, 0.5, 0.5]])
    samples = Samples({"pictures": 3}, {"images": np.eye(3), "texts": texts, "owner": np.array([0, 0, 1, 2])})
    statistic = retrieval.score(samples, retrieval.Params())
    figures = {figure.name: figure.value for figure in statistic(np.arange(3))}
    assert figures["text_to_image_r1"] == 25.0
    assert figures["text_to_image_r5"] == 100.0
    # picture 0: its best caption is 0 (.9), rank 0; picture 1: its caption has .6, caption 1 has .8, rank 1;
    # picture 2: its caption has .5, caption 2 has .8, rank 1
    assert figures["image_to_text_r1"] == pytest.approx(100 / 3)
    assert figures["image_to_text_r5"] == 100.0
    # picture 0 twice, 1 once: two of five captions are first, two of three pictures
    figures = {figure.name: figure.value for figure in statistic(np.array([0, 1, 0]))}
    assert figures["text_to_image_r1"] == pytest.approx(100 * 2 / 5)
    assert figures["image_to_text_r1"] == pytest.approx(100 * 2 / 3)


class Fake:
    """Pictures and captions whose first letters agree have the same vector."""

    bundle = SimpleNamespace(name="fake", digest="0", require=lambda task: None)

    def embed(self, *, texts=(), images=()):
        keys = [str(t)[0] for t in texts] + [Path(i).name[0] for i in images]
        return np.array([np.eye(26)[ord(key) - ord("a")] for key in keys], np.float32)


@pytest.mark.parametrize("file", ["captions.json", "captions.jsonl"])
def test_either_file_is_read_and_each_caption_belongs_to_its_picture(tmp_path: Path, file: str):
    captions = {"ant.jpg": ["an ant", "a small ant"], "bee.jpg": ["bees"]}
    (tmp_path / "images").mkdir()
    for name in captions:
        (tmp_path / "images" / name).touch()
    rows = [json.dumps({"image": k, "captions": v}) for k, v in captions.items()]
    (tmp_path / file).write_text("\n".join(rows) if file.endswith("l") else json.dumps(captions))
    figures = measure.named(measure.predict("retrieval", Fake(), measure.read("retrieval", tmp_path)))
    assert (figures["mean"], figures["pictures"], figures["captions"]) == (100.0, 2, 3)
    assert len(measure.read("retrieval", tmp_path, limit=1).pictures) == 1
    with pytest.raises(BadRequest, match="2 pictures, 1 with captions"):
        retrieval.DataSet(["a.jpg", "b.jpg"], [["one"], []])
