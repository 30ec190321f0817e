"""Rows and pictures against counts by hand."""

import numpy as np
import pytest
from PIL import Image

from calmclip.export.training import data
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import ImagePreparer

TEXTS = ["red cat", "two blue dogs", "a green cat"] * 4


@pytest.fixture(scope="module")
def words():
    return data.word_pieces(TEXTS * 50, 300)


def test_a_vocabulary_of_berts_kind_has_its_special_tokens_first_and_wraps_a_text(words):
    assert [words.token_to_id(name) for name in data.SPECIAL] == [0, 1, 2, 3, 4]
    assert words.encode("Red cat").tokens == ["[CLS]", "red", "cat", "[SEP]"]


def test_a_vocabulary_of_opts_kind_begins_every_text_with_its_end():
    made = data.byte_pairs(TEXTS, 300)
    assert made.encode("red").ids[0] == made.token_to_id("</s>") == 2
    assert made.decode(made.encode("red cat").ids) == "red cat"


def test_a_vocabulary_of_clips_kind_ends_with_the_highest_id():
    made = data.clip_pairs(TEXTS, 300)
    ids = made.encode("Red CAT").ids
    assert ids[-1] == max(made.get_vocab().values())
    assert ids[0] == ids[-1] - 1
    assert made.encode("red cat").ids == ids


def test_rows_hold_the_texts_one_after_another(words):
    red, cat, two, blue, dogs = (words.token_to_id(name) for name in ("red", "cat", "two", "blue", "dogs"))
    rows = data.rows(["red cat", "two blue dogs"], words, 5, 2, 3)  # 7 tokens with their ends, 3 a row
    assert rows.tolist() == [[2, red, cat, 3, 3], [2, two, blue, dogs, 3]]


def test_rows_without_an_end_keep_the_start_between_texts(words):
    red, cat = words.token_to_id("red"), words.token_to_id("cat")
    assert data.rows(["red cat", "cat"], words, 4, 2, None).tolist() == [[2, red, cat, 2]]


def test_texts_that_do_not_fill_a_row_are_refused(words):
    with pytest.raises(BadRequest, match="have 3 tokens, less than one row of 30"):
        data.rows(["red cat"], words, 32, 2, 3)


def test_pictures_are_prepared_as_the_service_does(tmp_path):
    spec = ImagePreprocess(size=(8, 8), resize="exact", resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 12), (colour,) * 3).save(tmp_path / name / "one.png")
    pictures = data.pictures(tmp_path, ImagePreparer(spec))
    assert pictures.names == ("black", "white")
    assert pictures.labels.tolist() == [0, 1]
    assert pictures.pixels.shape == (2, 3, 8, 8)
    assert (pictures.pixels[0] == -1).all()
    assert (pictures.pixels[1] == 1).all()


def test_a_folder_without_pictures_and_one_class_alone_are_refused(tmp_path):
    preparer = ImagePreparer(ImagePreprocess(size=(8, 8), resize="exact", mean=(0.5,) * 3, std=(0.5,) * 3))
    (tmp_path / "one").mkdir()
    with pytest.raises(BadRequest, match="folders of 1 classes"):
        data.pictures(tmp_path, preparer)
    (tmp_path / "two").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "two" / "a.png")
    with pytest.raises(BadRequest, match="one holds no pictures"):
        data.pictures(tmp_path, preparer)
    (tmp_path / "one" / "b.png").write_bytes(b"no picture")
    with pytest.raises(BadRequest, match=r"b\.png cannot be read as a picture"):
        data.pictures(tmp_path, preparer)


def test_moved_pictures_repeat_their_edge():
    pixels = np.arange(9.0).reshape(1, 1, 3, 3)
    draw = np.random.default_rng(0)
    seen = {data.shifted(pixels, draw, 1)[0, 0].tobytes() for _ in range(200)}
    rows = [[0, 0, 1], [0, 1, 2], [1, 2, 2]]  # which of three is at each place, moved to the right, not, to the left
    expected = {pixels[0, 0][np.ix_(y, x)].tobytes() for y in rows for x in rows}
    assert seen == expected
