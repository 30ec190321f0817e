import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from calmclip.export.evals.zero_shot import measure
from calmclip.models.errors import BadRequest


class Fake:
    """Ranks the labels as its table says, whatever the picture."""

    bundle = SimpleNamespace(name="fake")

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.table = table

    def classify(self, image: Path, labels, *, top_k: int):
        return [SimpleNamespace(label=label) for label in self.table[image.name]][:top_k]


def test_top1_and_top5_worked_out_by_hand(tmp_path: Path):
    order = list("abcdefg")
    table = {"1.jpg": order, "2.jpg": [*"bcdea", "f", "g"], "3.jpg": [*"gfedcb", "a"], "4.jpg": ["b", *"acdefg"]}
    rows = [{"file": name, "label": "a"} for name in list(table)[:3]] + [{"file": "4.jpg", "name": "b"}]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    found = measure(Fake(table), tmp_path, None)
    assert (found["top1"], found["top5"], found["pictures"], found["labels"]) == (50.0, 75.0, 4, 2)
    assert measure(Fake(table), tmp_path, 1)["top1"] == 100.0


@pytest.mark.parametrize(
    "content",
    [
        '[{"file": "1.jpg"}]',
        "[]",
        '{"1.jpg": "cat"}',
        "[1]",
        '[{"label": "cat"}]',
        '[{"file": "1.jpg", "label": ""}]',
    ],
)
def test_data_without_labels_says_what_it_must_hold(tmp_path: Path, content: str):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(BadRequest, match=r"labels\.json .* must hold"):
        measure(Fake({}), tmp_path, None)


def test_a_limit_that_leaves_nothing_is_refused(tmp_path: Path):
    (tmp_path / "labels.json").write_text('[{"file": "1.jpg", "label": "a"}]')
    with pytest.raises(BadRequest, match="limit is -1; expected at least 1"):
        measure(Fake({}), tmp_path, -1)
