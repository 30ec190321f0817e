import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.truncation import Truncation


def test_names_and_booleans():
    assert Truncation.of(True) == Truncation.of("end") == Truncation("end")
    assert Truncation.of(False) == Truncation.of("none") == Truncation()
    assert Truncation.of(Truncation("chunk", 3, "max")) == Truncation("chunk", 3, "max")
    assert [name for name in ("none", "end", "compress", "chunk") if Truncation.of(name).whole] == ["compress", "chunk"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("ends",), "truncate is 'ends'; did you mean 'end'"),
        (("chunk", None, "median"), "pooling is 'median'; "),
        (("end", 4), "truncate is 'end'; `stride` and `pooling` need truncate = chunk"),
        (("compress", None, "max"), "truncate is 'compress'; `stride` and `pooling` need truncate = chunk"),
        (("chunk", 0), "stride is 0; expected at least 1 token"),
    ],
)
def test_what_is_refused(options: tuple[object, ...], says: str):
    with pytest.raises(BadRequest, match=says):
        Truncation(*options)  # type: ignore[arg-type]


def test_other_choices_have_other_rows_in_the_cache():
    choices = [Truncation("end"), Truncation("compress"), Truncation("chunk"), Truncation("chunk", 5),
               Truncation("chunk", None, "max")]  # fmt: skip
    assert len({choice.cached for choice in choices}) == len(choices)
