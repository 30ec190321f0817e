import json
from pathlib import Path

import pytest

from calmclip.models.datasets import first, lines, read_captions, read_pairs, read_table
from calmclip.models.errors import BadRequest


def test_captions_are_read_in_both_forms(tmp_path: Path):
    expected = {"a.jpg": ["one", "two"], "b.jpg": ["three"]}
    (tmp_path / "c.json").write_text(json.dumps(expected))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"image": k, "captions": v}) for k, v in expected.items()))
    assert read_captions(tmp_path / "c.json") == read_captions(tmp_path / "c.jsonl") == expected


OBJECTS = ["[1, 2]", '{"a.jpg": "one"}', '{"a.jpg": []}', "{}", "no JSON", '{"a.jpg": [1]}', '"one"']
LINES = ['{"image": "a.jpg"}', '{"captions": ["one"]}', '["a.jpg"]', '{"image": [], "captions": ["x"]}']


@pytest.mark.parametrize(("name", "text"), [*(("c.json", o) for o in OBJECTS), *(("c.jsonl", x) for x in LINES)])
def test_invalid_captions_are_refused(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRequest, match=rf"{name} .* must hold"):
        read_captions(tmp_path / name)


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"lost\.json cannot be read"):
        read_captions(tmp_path / "lost.json")
    with pytest.raises(BadRequest, match=r"lost\.csv cannot be read .* must hold t\.csv"):
        read_table(tmp_path / "lost.csv", ["file"], "t.csv and images/")


def test_texts_that_cannot_be_read_are_refused_by_name(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(BadRequest, match=r"empty\.txt has no text"):
        lines(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRequest, match=r"bytes\.txt is not text in UTF-8"):
        lines(tmp_path / "bytes.txt")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(limit: int):
    assert first([1, 2, 3], 2) == [1, 2]
    with pytest.raises(BadRequest, match=f"limit is {limit}; expected at least 1"):
        first([1, 2, 3], limit)


FORM = "t.csv and images/"


def test_a_table_is_read_with_or_without_a_byte_order_mark(tmp_path: Path):
    text = 'file, age ,note\n\na.jpg, 7 ,"red, ""big""\ncar"\n,,\nä.jpg,,x\n'
    for mark in ("", "\ufeff"):
        (tmp_path / "t.csv").write_bytes((mark + text).replace("\n", "\r\n").encode())
        table = read_table(tmp_path / "t.csv", ["file"], FORM)
        assert table.columns == ("file", "age", "note")
        assert table.rows == (
            {"file": "a.jpg", "age": "7", "note": 'red, "big"\r\ncar'}, {"file": "ä.jpg", "age": "", "note": "x"},
        )  # fmt: skip
        assert table.lines == (4, 6)  # the cell of line 3 goes on in line 4; line 5 has no cell
    assert str(table.wrong(1, "age", "a number")) == f"{tmp_path}/t.csv line 6, column 'age': ''; expected a number"


WRONG_TABLES = {
    b"": "is empty; .* must hold t.csv and images/",
    b"age,sex\n1,2\n": r"line 1: there is no column 'file' in \['age', 'sex'\]; .* must hold",
    b"\nfile,age,age\na,1,2\n": "line 2: the column 'age' is without a name or there twice",
    b"file,,age\na,1,2\n": "line 1: the column '' is without a name",
    b"file,age\na,1\nb,1,2\n": r"line 3 has 3 cells; expected 2, one for each of \['file', 'age'\]",
    b"file,age\n": "has a head and no rows",
    b"file\n\xff\n": "cannot be read as CSV in UTF-8 .* must hold",
    b'file\n"a': "cannot be read as CSV in UTF-8 .* must hold",
}


@pytest.mark.parametrize(("content", "says"), WRONG_TABLES.items())
def test_a_wrong_table_is_refused_and_the_place_is_named(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(BadRequest, match=f"t.csv {says}"):
        read_table(tmp_path / "t.csv", ["file"], FORM)


HEAD = "Question ID,Type,Statement\n"
MMVP = HEAD + '1,Color,"a red, small car"\n2,Color,a blue car\n3,Quantity,"one ""big"" dog"\n4,Quantity,two dogs\n'


def test_pairs_are_read_from_lines(tmp_path: Path):
    rows = [
        {"images": ["a.jpg", "b.jpg"], "captions": ["one\u2028a", "two"], "category": "count"},
        {"images": ["c.jpg"], "captions": ["true", "false"]},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    images = tmp_path / "images"
    assert read_pairs(tmp_path) == [
        ([images / "a.jpg", images / "b.jpg"], ["one\u2028a", "two"], "count"),
        ([images / "c.jpg"], ["true", "false"], ""),
    ]


def test_pairs_of_mmvp_vlm_are_read_as_published(tmp_path: Path):
    """Layout and captions of https://github.com/tsb0601/MMVP, scripts/evaluate_vlm.py."""
    (tmp_path / "Questions.csv").write_text(MMVP, encoding="utf-8-sig")  # with a byte order mark, as spreadsheets write
    folder = tmp_path / "MLLM_VLM Images"
    assert read_pairs(tmp_path) == [
        (
            [folder / "Color" / "1.jpg", folder / "Color" / "2.jpg"],
            ["a photo of a red, small car", "a photo of a blue car"],
            "Color",
        ),
        (
            [folder / "Quantity" / "3.jpg", folder / "Quantity" / "4.jpg"],
            ['a photo of one "big" dog', "a photo of two dogs"],
            "Quantity",
        ),
    ]


def test_pairs_of_sugar_crepe_are_read_as_published(tmp_path: Path):
    """The layout of https://github.com/RAIVNLab/sugar-crepe, data/*.json."""
    for name in ("swap_att", "add_obj"):
        entry = {"filename": "7.jpg", "caption": f"true {name}", "negative_caption": "false"}
        (tmp_path / f"{name}.json").write_text(json.dumps({"0": entry}))
    assert read_pairs(tmp_path) == [
        ([tmp_path / "images" / "7.jpg"], [f"true {name}", "false"], name) for name in ("add_obj", "swap_att")
    ]


WRONG_PAIRS = [
    ("pairs.jsonl", "\n{}", r"line 2: \{\}"),
    ("pairs.jsonl", '{"images": ["a", "b", "c"], "captions": ["d", "e"]}', "line 1: "),
    ("pairs.jsonl", '{"images": [], "captions": ["d", "e"]}', "line 1: "),
    ("pairs.jsonl", '{"images": "ab", "captions": ["d", "e"]}', "line 1: "),
    ("pairs.jsonl", '{"images": [""], "captions": ["d", "e"]}', "line 1: "),
    ("pairs.jsonl", '{"images": ["a"], "captions": ["d"]}', "line 1: "),
    ("pairs.jsonl", '{"images": ["a"], "captions": "de"}', "line 1: "),
    ("pairs.jsonl", '{"images": ["a"], "captions": ["d", "e"], "category": 3}', "line 1: "),
    ("pairs.jsonl", '["a"]', "line 1: "),
    ("pairs.jsonl", "{", "line 1: Expecting"),
    ("pairs.jsonl", " \n", "has no pairs"),
    ("Questions.csv", HEAD, "has no pairs"),
    ("Questions.csv", MMVP + "5,Text\n", "line 6: '5,Text'"),
    ("Questions.csv", MMVP + "x,Text,a\n", "line 6: 'x,Text,a'"),
    ("Questions.csv", MMVP + "5,Text, \n", "line 6: '5,Text, '"),
    ("Questions.csv", MMVP + "5,Text,a\n", "line 6: 5 of 'Text' is no pair"),
    ("Questions.csv", MMVP + "5,Text,a\n6,Color,b\n", "line 6: 5 of 'Text' is no pair"),
    ("Questions.csv", MMVP + "5,Text,a\n7,Text,b\n", "line 6: 5 of 'Text' is no pair"),
    ("Questions.csv", MMVP + "6,Text,a\n7,Text,b\n", "line 6: 6 of 'Text' is no pair"),
    ("swap.json", '{"0": {"filename": "a", "caption": "b"}}', r'entry .0.: \{"filename": "a"'),
    ("swap.json", '{"0": {"filename": "a", "caption": "b", "negative_caption": ""}}', "entry .0."),
    ("swap.json", "[1]", "it holds a list"),
    ("swap.json", "{}", "has no pairs"),
    ("swap.json", "{\n\n", "line 3 column 1"),
]


@pytest.mark.parametrize(("name", "text", "error"), WRONG_PAIRS)
def test_invalid_pairs_are_refused_with_their_place_and_what_was_expected(
    tmp_path: Path, name: str, text: str, error: str
):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRequest, match=rf"{name} .*{error}.*; expected ") as refused:
        read_pairs(tmp_path)
    assert "\n" not in str(refused.value)


def test_pairs_that_are_no_text_or_absent_are_refused(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"holds no pairs; the data directory must hold pairs\.jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match=r"pairs\.jsonl cannot be read \('utf-8'"):
        read_pairs(tmp_path)
