"""The layouts that `calmclip teach` reads. Boxes are worked out by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from calmclip.export import photographs
from calmclip.models.errors import BadImage, BadRequest


def picture(path: Path, size: tuple[int, int] = (200, 100), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path, **options)
    return path


def coco(folder: Path, boxes: list[list[float]], category: int = 7) -> Path:
    picture(folder / "images" / "a.jpg")
    rows = [{"image_id": 1, "category_id": category, "bbox": box} for box in boxes]
    names = [{"id": 3, "name": "wren"}, {"id": 7, "name": "osprey"}]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": names, "annotations": rows}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def yolo(folder: Path, line: str, data: str = "names: [wren, osprey]") -> Path:
    picture(folder / "images" / "b" / "a.jpg")
    (folder / "labels" / "b").mkdir(parents=True, exist_ok=True)
    (folder / "labels" / "b" / "a.txt").write_text(line + "\n")
    (folder / "data.yaml").write_text(data)
    return folder


def test_boxes_of_coco_are_corners_in_pixels(tmp_path: Path):
    data = photographs.read(coco(tmp_path, [[10, 20, 30, 40]]))
    assert (data.layout, data.names) == ("coco", ("wren", "osprey"))
    assert data.truth[0].boxes.tolist() == [[10, 20, 40, 60]]
    assert data.truth[0].classes.tolist() == [1]


def test_boxes_of_yolo_are_centres_and_sizes_relative_to_the_picture(tmp_path: Path):
    picture(tmp_path / "images" / "empty.jpg")
    data = photographs.read(yolo(tmp_path, "1 0.5 0.4 0.1 0.6"))
    assert data.layout == "yolo"
    boxes, empty = data.truth
    # x: 200 (.5 -+ .05); y: 100 (.4 -+ .3)
    assert boxes.boxes[0].tolist() == pytest.approx([90, 10, 110, 70])
    assert (boxes.classes.tolist(), empty.classes.tolist()) == ([1], [])


def test_a_picture_that_exif_turns_has_its_upright_size(tmp_path: Path):
    folder = yolo(tmp_path, "0 0.5 0.5 1 1")
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn: 100 x 200 when upright
    picture(folder / "images" / "b" / "a.jpg", exif=turned)
    assert photographs.read(folder).truth[0].boxes.tolist() == [[0, 0, 100, 200]]


def test_a_box_that_rounding_moved_out_of_the_picture_is_clipped(tmp_path: Path):
    assert photographs.read(coco(tmp_path, [[-1, 0, 204, 100]])).truth[0].boxes.tolist() == [[0, 0, 200, 100]]


@pytest.mark.parametrize(
    "data",
    [
        "names: [wren, 'sea eagle']\nnc: 2",
        "names: {0: wren, 1: sea eagle}",
        "train: x\nnames:\n  0: wren  # small\n  1: 'sea eagle'\nnc: 2",
        "names:\n- wren\n- sea eagle\nnc: 2\n",
        "names: [\n  wren,\n  sea eagle,\n]\n",
    ],
)
def test_the_forms_of_names_in_data_yaml(data: str, tmp_path: Path):
    assert photographs.read(yolo(tmp_path, "1 .5 .5 .2 .2", data)).names == ("wren", "sea eagle")


def test_classes_txt_may_lie_beside_the_labels(tmp_path: Path):
    folder = yolo(tmp_path, "1 .5 .5 .2 .2")
    (folder / "data.yaml").unlink()
    (folder / "labels" / "classes.txt").write_text("wren\nosprey\n")
    assert photographs.read(folder).names == ("wren", "osprey")


def test_a_folder_for_each_name(tmp_path: Path):
    for name in ("wren/a.png", "sea_eagle/b.jpg", "sea_eagle/a.webp"):
        picture(tmp_path / name)
    data = photographs.read(tmp_path)
    assert (data.layout, data.names, data.labels) == ("folders", ("sea eagle", "wren"), (0, 0, 1))
    assert [path.name for path in data.pictures] == ["a.webp", "b.jpg", "a.png"]


def test_labels_json_and_plain_pictures(tmp_path: Path):
    for name in ("b.jpg", "a.jpg"):
        picture(tmp_path / "images" / name)
    assert photographs.read(tmp_path) == photographs.Photographs(
        "plain", (tmp_path / "images" / "a.jpg", tmp_path / "images" / "b.jpg")
    )
    (tmp_path / "labels.json").write_text('[{"file": "b.jpg", "label": "wren"}, {"file": "a.jpg", "label": "ant"}]')
    data = photographs.read(tmp_path)
    assert (data.layout, data.names, data.labels) == ("labels", ("ant", "wren"), (1, 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 .5 .5 .2", "five numbers"),
        ("1 .5 .5 .2 x", "five numbers"),
        ("2 .5 .5 .2 .2", r"line 1: the class is 2; expected 0 to 1"),
        ("0.5 .5 .5 .2 .2", "the class is 0.5"),
        ("1 100 50 20 20", "divide pixels"),
        ("1 .9 .5 .4 .2", r"the box 140 40 220 60 lies outside the picture of 200 x 100 pixels"),
        ("1 .5 .5 0 .2", "has no area"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(line: str, message: str, tmp_path: Path):
    with pytest.raises(BadRequest, match=rf"a\.(txt|jpg).*{message}"):
        photographs.read(yolo(tmp_path, line))


def test_a_wrong_class_or_box_of_coco_is_named(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"annotation 0 has the category 9, none of \[3, 7\]"):
        photographs.read(coco(tmp_path, [[0, 0, 9, 9]], category=9))
    with pytest.raises(BadRequest, match=r"a\.jpg: the box 150 0 250 90 lies outside"):
        photographs.read(coco(tmp_path, [[150, 0, 100, 90]]))
    with pytest.raises(BadRequest, match="holds no box for 1 pictures"):
        photographs.read(coco(tmp_path, []))


def test_a_folder_of_no_layout_and_a_file_that_is_no_picture_are_named(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "lost"):
        with pytest.raises(BadRequest, match=r"holds no photographs in a known layout; expected instances\.json"):
            photographs.read(folder)
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(BadImage, match=r"a\.jpg is no picture"):
        photographs.read(tmp_path)
    (tmp_path / "wren").mkdir()
    picture(tmp_path / "wren" / "b.jpg")
    with pytest.raises(BadRequest, match=r"holds pictures, such as a\.jpg, beside folders of pictures"):
        photographs.read(tmp_path)
    folder = coco(tmp_path / "birds", [[0, 0, 9, 9]])
    (folder / "images" / "a.jpg").unlink()
    with pytest.raises(BadRequest, match=r"a\.jpg is not there"):
        photographs.read(folder)


def test_yolo_needs_names(tmp_path: Path):
    folder = yolo(tmp_path, "0 .5 .5 .2 .2", "nc: 2")
    with pytest.raises(BadRequest, match=r"data\.yaml holds no names"):
        photographs.read(folder)
    (folder / "data.yaml").unlink()
    with pytest.raises(BadRequest, match="has no names of its classes"):
        photographs.read(folder)
