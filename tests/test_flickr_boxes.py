"""The photographs boxed by hand obey the contract that issue 21 gives them, and the loader refuses what breaks it."""

import hashlib
import json
from pathlib import Path

import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.evals import measure
from tests.bench import flickr_boxes

COCO_NAMES = 80


@pytest.fixture(scope="module")
def content() -> dict:
    return json.loads(flickr_boxes.FILE.read_text(encoding="utf-8"))


@pytest.fixture
def photographs(content, tmp_path: Path) -> Path:
    """Empty files under the photographs' names: no reader opens them."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for image in content["images"]:
        (folder / image["file_name"]).touch()
    return folder


def test_the_set_is_as_large_as_promised(photographs):
    boxed = flickr_boxes.read(photographs)
    objects = [thing for photograph in boxed for thing in photograph.objects if not thing.crowd]
    assert len(boxed) >= 60
    assert len(objects) >= 150
    novel = [thing for thing in objects if thing.coco is None]
    assert len(novel) >= 50
    assert 3 * len(novel) >= len(objects)
    assert all(any(not thing.crowd for thing in photograph.objects) for photograph in boxed)


def test_the_header_counts_what_the_file_holds(content):
    objects = [row for row in content["annotations"] if not row["iscrowd"]]
    assert content["info"]["counts"] == {
        "photographs": len(content["images"]),
        "objects": len(objects),
        "coco_null": sum(row["coco"] is None for row in objects),
        "crowds": len(content["annotations"]) - len(objects),
        "names": len({row["category_id"] for row in objects}),
    }


def test_the_photographs_are_in_the_order_of_the_rule(content):
    names = [image["file_name"] for image in content["images"]]
    order = sorted(names, key=lambda name: hashlib.sha256(f"calmclip-21:{name}".encode()).hexdigest())
    assert names == order
    assert len({*names}) == len(names)
    assert not {*names} & {row["file_name"] for row in content["info"]["skipped"]}


def test_a_name_is_of_coco_in_all_photographs_or_in_none(content):
    kinds = {(row["category_id"], row["coco"]) for row in content["annotations"]}
    assert len(kinds) == len(content["categories"]) == len({row["name"] for row in content["categories"]})
    assert len([kind for kind in kinds if kind[1]]) <= COCO_NAMES


def test_a_known_object_is_read_with_its_corners(photographs):
    """The first photograph: a gymnast in the air, between the mats and the ceiling."""
    gymnast = flickr_boxes.read(photographs)[0].objects[0]
    assert gymnast.box == (93, 82, 127.5, 134.5)
    assert (gymnast.name, gymnast.other, gymnast.coco) == ("person", "gymnast", "person")


def test_the_eval_of_detection_reads_the_directory_that_is_laid_out(photographs, content, tmp_path):
    flickr_boxes.lay_out(photographs, tmp_path / "boxed")
    instances = measure.read("detection", tmp_path / "boxed")
    assert len(instances.pictures) == len(content["images"])
    assert all(Path(picture).is_file() for picture in instances.pictures)
    first, gymnast = instances.truth[0], instances.truth[0].boxes[0]
    assert gymnast.tolist() == [93, 82, 127.5, 134.5]
    assert instances.names[first.classes[0]] == "person"
    assert first.crowd.tolist() == [False, False, False, True, True, True]


def test_a_missing_photograph_is_named(photographs):
    missing = sorted(photographs.iterdir())[0]
    missing.unlink()
    with pytest.raises(BadRequest, match=f"lacks 1 of 60 photographs, the first is {missing.name}"):
        flickr_boxes.read(photographs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bbox": [200, 10, 24.5, 10]}, "224.5, 20.*within 224 x 224"),
        ({"bbox": [-1, 10, 5, 5]}, "has the box"),
        ({"bbox": [10, 10, 0, 5]}, "x0 < x1"),
        ({"other": " "}, "not empty"),
        ({"free": "person"}, "that differ"),
        ({"coco": "dog"}, "COCO name 'dog'"),
        ({"iscrowd": 1}, "is a crowd with the wordings"),
        ({"image_id": 999}, "KeyError"),
    ],
)
def test_an_annotation_that_breaks_the_form_is_refused(photographs, content, tmp_path, change, says):
    first, *others = content["annotations"]
    (broken := tmp_path / "broken.json").write_text(json.dumps(content | {"annotations": [first | change, *others]}))
    with pytest.raises(BadRequest, match=says):
        flickr_boxes.read(photographs, broken)


def test_a_wording_of_two_names_in_a_photograph_is_refused(photographs, content, tmp_path):
    rows = [dict(row) for row in content["annotations"]]
    tree = next(row for row in rows if row["other"] == "willow")  # beside a dog with the wording "pointer"
    tree["other"] = "pointer"
    (broken := tmp_path / "broken.json").write_text(json.dumps(content | {"annotations": rows}))
    with pytest.raises(BadRequest, match="'pointer' as a wording of 'tree' and of 'dog'"):
        flickr_boxes.read(photographs, broken)
