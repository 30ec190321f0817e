"""The method gradient of explain. Oracle: sums over the tokens of each word, by hand."""

from pathlib import Path

import numpy as np
import pytest

from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Call
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.contributions import Scene, Told
from calmclip.models.tasks.gradient import gradient, of_words
from calmclip.models.tasks.words import words


def test_a_word_has_the_sum_of_its_tokens_and_special_tokens_belong_to_none():
    caption = "a T-shirt, red"
    #          start      a       T       -shirt      ,         " red"    end    padding
    offsets = [(0, 0), (0, 1), (2, 3), (3, 9), (9, 10), (10, 14), (0, 0)]
    values = np.array([9.0, 0.5, -1.0, 0.25, 7.0, 2.0, 9.0, 9.0], np.float32)
    assert of_words(values, offsets, words(caption)).tolist() == [0.5, -0.75, 2.0]


@pytest.fixture(scope="module")
def preparer(tiny_hf_clip: Path) -> TextPreparer:
    return TextPreparer(TextPreprocess(context=6, clean="whitespace", truncate=True), tiny_hf_clip)


def test_tokens_keep_their_places_in_the_cleaned_text(preparer: TextPreparer):
    located = preparer.located("  red \t cat")
    assert located.text == "red cat"
    assert [located.text[start:end] for start, end in located.offsets] == ["", "red", "cat", ""]
    assert len(located.ids) == len(located.offsets)
    cut = preparer.located("a photo of two red green blue cat")  # six of ten tokens stay, the last is the end
    assert len(cut.ids) == len(cut.offsets) == 6
    assert [cut.text[start:end] for start, end in cut.offsets] == ["", "a", "photo", "of", "two", ""]


def test_the_graph_gets_the_caption_and_the_picture_and_answers_for_words(tiny_bundles: Path):
    bundle = open_bundle(tiny_bundles / "tiny-float").bundle
    caption, image = "red cat", np.eye(16, dtype=np.float32)[3]
    flow = gradient(bundle, Scene(caption, words(caption), image))
    call = next(flow)
    assert isinstance(call, Call)
    assert call.graph == "attribution"
    assert {name: array.tolist() for name, array in call.feeds.items()} == {
        "ids": bundle.text().prepare([caption])["ids"].tolist(),
        "image_embeds": [image.tolist()],
    }
    answer = {"contributions": np.arange(call.feeds["ids"].size, dtype=np.float32)[None], "score": np.array([0.25])}
    with pytest.raises(StopIteration) as ended:
        flow.send(answer)
    told = ended.value.value
    assert isinstance(told, Told)
    assert (told.score, told.contributions.tolist()) == (0.25, [1.0, 2.0])


def test_a_caption_whose_words_change_when_it_is_cleaned_is_refused(preparer: TextPreparer):
    class Cleaned:
        def text(self) -> TextPreparer:
            return preparer

    caption = "red&#32;cat"  # one character reference: two words after cleaning, three before
    scene = Scene(caption, words(caption), np.zeros(16, np.float32))
    with pytest.raises(BadRequest, match=r"is cleaned to 'red cat', which has 2 words instead of 3"):
        next(gradient(Cleaned(), scene))  # type: ignore[arg-type]
