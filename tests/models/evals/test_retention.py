"""retention on vectors with a known answer, and its parts regions and segmentation on pictures of two colours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.evals import NoParams, Samples, measure, outlined, page, regions, retention, segmentation, tables
from calmclip.models.evals.bootstrap import Resampling
from calmclip.models.evals.samples import Origin
from calmclip.models.runner import open_bundle

ORIGIN = Origin(eval="retention", bundle="student", digest="0" * 64, data="d", params={})
HOW = Resampling(resamples=20)
NAMES = ("red", "blue", "green")


def composed(logits: Any, texts: Any = None) -> Samples:
    """Four pictures of three labels, whose first is right; three pictures on the axes with a caption each."""
    arrays: dict[str, Any] = {
        "sizes": np.array([4, 3]),
        "zero_shot.logits": np.array(logits, np.float32),
        "zero_shot.truth": np.zeros(4, np.int64),
        "zero_shot.temperature": np.array(1.0),
        "zero_shot.counts": np.array([4, 3]),
    }
    words: dict[str, tuple[str, ...]] = {
        "parts": ("zero_shot", "retrieval"),
        "zero_shot.labels": NAMES,
        "zero_shot.head": ("cosine",),
        "zero_shot.units": ("pictures", "labels"),
    }
    if texts is not None:
        arrays |= {"retrieval.images": np.eye(3), "retrieval.texts": np.array(texts, float)}
        arrays |= {"retrieval.owner": np.arange(3), "retrieval.counts": np.array([3, 3])}
        words["retrieval.units"] = ("pictures", "captions")
    return Samples({"samples": 7, "of zero_shot": 4, "of retrieval": 3}, arrays, words, ORIGIN)


def kept(table: tables.Table) -> Mapping[str, float]:
    return {figure.name: figure.value for figure in table.together if figure.group == retention.KEPT}


def test_what_a_student_keeps_of_its_teacher_by_hand():
    right, wrong = [2.0, 1.0, 0.0], [0.0, 2.0, 1.0]
    student = composed([right, right, wrong, wrong], [[1, 0, 0], [0, 1, 0], [0.6, 0, 0.5]])
    teacher = composed([right, right, right, wrong], np.eye(3))
    table = tables.tabulate([student, teacher], how=HOW)
    values = kept(table)
    assert values["zero_shot top1"] == pytest.approx(100 * 50 / 75)
    # a guess of three labels: 50 - 33.3 of 75 - 33.3
    assert values["zero_shot top1 above chance"] == pytest.approx(100 * (50 - 100 / 3) / (75 - 100 / 3))
    assert values["retrieval text_to_image_r1"] == pytest.approx(100 * 2 / 3)
    assert values["retrieval image_to_text_r1"] == 100.0
    # the third caption finds its picture second: (1 + 1 + 1/2) / 3
    assert values["retrieval text_to_image_map"] == pytest.approx(100 * 2.5 / 3)
    # recalls: 2/3 and five of 100
    mean = 100 * (2 / 3 + 5) / 6
    assert values["retrieval mean"] == pytest.approx(mean)
    assert values["mean of the parts"] == pytest.approx((100 * 50 / 75 + mean) / 2)
    groups = {figure.group for figure in table.together}
    assert groups == {retention.KEPT, "zero_shot", "retrieval, hard negatives of the second"}
    same = kept(tables.tabulate([teacher, teacher], how=HOW))
    assert [*same.values()] == pytest.approx([100.0] * len(same))
    assert "retrieval: Queries with a match" in page.html(table, [student, teacher])


def test_a_part_that_one_bundle_does_not_serve_has_no_value():
    teacher = composed([[2.0, 1.0, 0.0]] * 4, np.eye(3))
    table = tables.tabulate([composed([[2.0, 1.0, 0.0]] * 4), teacher], how=HOW)
    assert {*kept(table)} == {"zero_shot top1", "zero_shot top5", "zero_shot top1 above chance", "mean of the parts"}
    row = next(row for row in table.rows if row.figure.key == ("retrieval", "mean"))
    assert np.isnan(row.values[0].value)
    assert row.values[1].value == 100.0


@pytest.fixture
def outlines(tmp_path: Path) -> Path:
    """A picture whose left half is a red thing and whose right half is blue, though it is called green; a red picture
    with a crowd alone; and a green picture."""
    (tmp_path / "images").mkdir()
    halves = Image.new("RGB", (64, 64), "blue")
    halves.paste(Image.new("RGB", (32, 64), "red"))
    halves.save(tmp_path / "images" / "halves.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "crowd.png")
    Image.new("RGB", (64, 64), "lime").save(tmp_path / "images" / "whole.png")
    whole = {"bbox": [0, 0, 64, 64], "segmentation": [[0, 0, 64, 0, 64, 64, 0, 64]], "category_id": 3}
    left = {"bbox": [0, 0, 32, 64], "segmentation": [[0, 0, 32, 0, 32, 64, 0, 64]], "category_id": 1}
    right = {"bbox": [32, 0, 32, 64], "segmentation": [[32, 0, 64, 0, 64, 64, 32, 64]], "category_id": 3}
    crowd = {"bbox": [0, 0, 64, 64], "segmentation": {"size": [64, 64], "counts": [0, 64 * 64]}, "category_id": 1}
    content = {
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)],
        "images": [
            {"id": 1, "file_name": "halves.png", "width": 64, "height": 64},
            {"id": 2, "file_name": "crowd.png", "width": 64, "height": 64},
            {"id": 3, "file_name": "whole.png", "width": 64, "height": 64},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, **left},
            {"id": 2, "image_id": 1, **right},
            {"id": 3, "image_id": 2, "iscrowd": 1, **crowd},
            {"id": 4, "image_id": 3, **whole},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_boxes_and_masks_of_two_colours(segmenter: Path, outlines: Path):
    """Of three boxes one is wrong, of the two green ones one."""
    runner = open_bundle(segmenter)
    samples = measure.predict("regions", runner, measure.read("regions", outlines))
    figures = measure.named(samples)
    assert (figures["pictures"], figures["boxes"], figures["names"]) == (3, 3, 3)
    assert figures["top1"] == figures["top1 medium boxes"] == pytest.approx(200 / 3)  # of 32 x 64 and 64 x 64 pixels
    assert (figures["top5"], figures["mean of classes"]) == (100.0, 75.0)
    assert figures["top1 small boxes"] is None
    only_first = regions.score(samples, NoParams())(np.array([1]))
    assert all(np.isnan(figure.value) for figure in only_first)  # the picture of the crowd has no box
    params = {"threshold": 0.0, "method": "maskclip", "settings": {}}
    samples = measure.predict("segmentation", runner, measure.read("segmentation", outlines), params)
    # red: each of its pixels is right, and the crowd does not count; green: 4096 of 6144 pixels, the others are blue
    assert measure.named(samples)["mIoU all names"] == pytest.approx(50 + 50 * 4096 / 6144, abs=2)
    assert samples.arrays["every"][1].sum() == 0
    assert samples.arrays["present"][2].tolist() == [[0, 0, 4096]] * 3
    assert samples.arrays["present"][0, 2].tolist() == [2048, 0, 2048]


def test_a_folder_may_hold_all_parts_or_one_for_each(segmenter: Path, outlines: Path, capsys):
    runner = open_bundle(segmenter)
    (outlines / "zero_shot" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(outlines / "zero_shot" / "images" / "a.png")
    (outlines / "zero_shot" / "labels.json").write_text(json.dumps([{"file": "a.png", "label": "red"}]))
    (outlines / "captions.json").write_text(json.dumps({"halves.png": ["red blue"], "crowd.png": ["red"]}))
    data = measure.read("retention", outlines)
    samples = measure.predict("retention", runner, data)
    assert dict(samples.counts) == {
        "samples": 9, "of zero_shot": 1, "of retrieval": 2, "of regions": 3, "of segmentation": 3
    }  # fmt: skip
    file = outlines / "samples.npz"
    samples.save(file)
    assert main(["eval", "--from", str(file), str(file), "--resamples", "20"]) == 0
    assert "mean of the parts                %          100.00" in capsys.readouterr().out
    # each part has the figures that its own eval has
    (named,) = [measure.named(measure.predict("regions", runner, measure.read("regions", outlines)))]
    assert measure.named(samples)["regions mean of classes"] == named["mean of classes"]


def test_wrong_data_is_one_sentence(tmp_path: Path, outlines: Path, segmenter: Path):
    with pytest.raises(BadRequest, match="holds the data of no part"):
        measure.read("retention", tmp_path / "nowhere")
    with pytest.raises(BadRequest, match=r"the parts \[\]"):
        retention.DataSet({})
    with pytest.raises(BadRequest, match="0 photographs"):
        segmentation.DataSet(NAMES, [])
    with pytest.raises(BadRequest, match="have no box"):
        regions.DataSet(NAMES, ["a.png"], [np.empty((0, 4))], [np.empty(0)])
    content = json.loads((outlines / "instances.json").read_text())
    content["annotations"][0]["segmentation"] = []
    (outlines / "instances.json").write_text(json.dumps(content))
    with pytest.raises(BadRequest, match="annotation 1 has no outline"):
        outlined.read(outlines)
    content["annotations"], content["images"][0]["width"] = content["annotations"][1:], 65
    (outlines / "instances.json").write_text(json.dumps(content))
    data = measure.read("segmentation", outlines)
    with pytest.raises(BadRequest, match=r"halves\.png has 64 x 64 pixels; instances\.json says 65 x 64"):
        measure.predict("segmentation", open_bundle(segmenter), data)
