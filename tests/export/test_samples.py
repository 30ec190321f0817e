"""The pictures and texts that ship: two sets without common content, free to share, and described."""

import hashlib
import io
import re
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from calmclip.export import samples
from calmclip.export.samples import leaves

ALL = [*samples.pictures(), *samples.calibration_pictures()]
README = (Path(samples.__file__).parent / "README.md").read_text(encoding="utf-8")


def small(picture: Path) -> np.ndarray:
    """16 x 16 grey values of mean 0 and length 1: nearly equal for two copies of one photograph."""
    grey = np.asarray(Image.open(picture).convert("L").resize((16, 16)), np.float64).ravel()
    grey -= grey.mean()
    return grey / np.linalg.norm(grey)


def test_the_sets_share_no_picture_and_no_text():
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in ALL}) == len(ALL)
    alike = {(a.stem, b.stem): small(a) @ small(b) for a, b in combinations(ALL, 2)}
    assert max(alike.values()) < 0.9, max(alike, key=alike.__getitem__)
    buffer = io.BytesIO()  # what a copy of a photograph would reach
    Image.open(ALL[0]).resize((200, 180)).save(buffer, "JPEG", quality=30)
    assert small(ALL[0]) @ small(buffer) > 0.98
    texts = [" ".join(text.split()).casefold() for text in (*samples.texts(), *samples.calibration_texts())]
    assert len(set(texts)) == len(texts)
    assert all(texts)


def test_the_page_states_how_many_there_are_and_describes_each_photograph():
    for folder, pictures, texts in (
        ("this folder", samples.pictures(), samples.texts()),
        ("calibration/", samples.calibration_pictures(), samples.calibration_texts()),
    ):
        (row,) = [line for line in README.splitlines() if line.startswith("|") and folder in line]
        photographs = [path for path in pictures if not path.name.startswith("leaves-")]
        numbers = [len(photographs)] + [len(pictures) - len(photographs)] * (len(pictures) > len(photographs))
        assert [int(number) for number in re.findall(r"\d+", row)] == [*numbers, len(texts)]
        for path in photographs:
            assert README.count(f"| `{path.name}` |") == 1
    listed = re.findall(r"^\| `(\S+\.jpg)` \|", README, re.MULTILINE)
    assert len(listed) == sum(not path.name.startswith("leaves-") for path in ALL)
    assert sum(path.stat().st_size for path in ALL) < 2e6


def test_the_drawn_pictures_can_be_drawn_again():
    """JPEG may round differently elsewhere, so pixels are compared in the mean."""
    drawn = [path for path in samples.calibration_pictures() if path.name.startswith("leaves-")]
    assert len(drawn) == leaves.COUNT
    for number in (0, 17):
        stored = np.asarray(Image.open(drawn[number]), np.float64)
        again = np.asarray(leaves.draw(number), np.float64)
        assert stored.shape == again.shape == (224, 224, 3)
        assert np.abs(stored - again).mean() < 12
        assert np.abs(stored - np.asarray(leaves.draw(number + 1), np.float64)).mean() > 40
