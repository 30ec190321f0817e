import json
from pathlib import Path

import pytest

from calmclip.models.datasets import first, lines, read_captions
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
