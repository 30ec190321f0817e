import pytest

from export.recipe import Bars
from export.report import check, require
from models.errors import BarMissed

REPORT = {
    "graphs": {"regions": {"int8_against_float": {"objectness": {"cosine": 0.8}}}},
    "embeddings": {"image": {"cosine_mean": 0.98}, "text": {"cosine_mean": 0.96}},
    "size_bytes": {"int8": 31_000_000},
}


def test_each_bar_stands_beside_what_was_measured():
    found = check(REPORT, Bars(min_image_cosine=0.98, min_text_cosine=0.97, max_megabytes=35))
    assert {name: row["passed"] for name, row in found.items()} == {
        "min_image_cosine": True,
        "min_text_cosine": False,
        "regions.objectness": False,
        "max_megabytes": True,
    }
    with pytest.raises(BarMissed, match=r"min_text_cosine is 0\.96, the bar 0\.97") as caught:
        require(found, "x-int8")
    assert "min_image_cosine" not in str(caught.value)


def test_a_bundle_without_embeddings_has_only_the_bars_that_apply():
    assert check({"graphs": {}, "embeddings": {}, "size_bytes": {"int8": 1}}, Bars()) == {}
