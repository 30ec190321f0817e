"""The vocabulary that ships, and what makes it: on the shipped words, and on a WordNet of a few lines."""

import re
from pathlib import Path

import pytest

from calmclip.models import vocabulary
from calmclip.models.vocabulary import make

LICENCE = "  1 This software and database is being provided to you\n"
NOUNS = """\
00000001 05 n 01 mammal 0 000 | a warm animal
00000002 05 n 02 dog 0 tyke 0 001 @ 00000001 n 0000 | a tame animal; "the cat saw the dogs"
00000003 05 n 02 cat 0 Felis_catus 0 001 @ 00000001 n 0000 | a tame animal that hunts mice
00000004 05 n 01 mouse 0 001 @ 00000001 n 0000 | a small animal
00000005 09 n 01 cat 1 000 | an idea
00000006 10 n 01 disparagement 0 000 | a bad word
00000007 18 n 01 tyke 1 001 ;u 00000006 n 0000 | a rude person
00000008 09 n 01 mouse 1 000 | a quiet thought
00000010 05 n 01 pet 0 001 @ 00000001 n 0000 | kept at home
00000011 06 n 01 pet 1 000 | a pet of wood
00000012 06 n 01 pet 2 000 | a pet of wool
00000013 06 n 01 pet 3 000 | a pet of paper
00000009 07 n 01 color 0 000 | what light does
"""
ADJECTIVES = """\
00000001 00 a 01 red 0 002 = 00000009 n 0000 & 00000002 a 0000 | of the color of blood
00000002 00 s 01 scarlet(p) 0 001 & 00000001 a 0000 | of a red color
00000003 00 a 01 wise 0 000 | of good sense
"""
VERBS = """\
00000001 38 v 01 run 0 000 01 + 02 00 | move fast; "the dog runs"
00000002 31 v 01 think 0 000 01 + 02 00 | use the mind
"""
TAGS = """\
cat%1:05:00:: 1 9
mouse%1:09:01:: 1 9
run%2:38:00:: 1 4
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> make.WordNet:
    files = {"data.noun": NOUNS, "data.verb": VERBS, "data.adj": ADJECTIVES, "data.adv": ""}
    for name, lines in files.items():
        (tmp_path / name).write_text(LICENCE + lines)
    (tmp_path / "cntlist.rev").write_text(TAGS)
    return make.WordNet(tmp_path)


def test_the_vocabulary_is_a_few_thousand_plain_words():
    words = vocabulary.words()
    assert 2500 < len(words) < 4000
    assert list(words) == sorted(set(words))
    assert all(re.fullmatch(r"[a-z]{2,}([ -][a-z]{2,})?", word) for word in words)
    assert {"dog", "giraffe", "car", "river", "teacher", "red", "swimming", "tennis racket"} <= set(words)
    assert not {
        "idea",
        "thought",
        "justice",
        "fat",
        "naked",
        "monkey",
        "bitch",
        "slut",
        "nigger",
        "cripple",
        "whore",
    } & set(words)


def test_a_kind_keeps_its_visible_words_the_most_used_first(wordnet: make.WordNet):
    # cat: 9 tags, 10 of its 11 uses are of the kind, and 1 gloss holds it. dog: no tag, 2 glosses. pet: 1 of 4 uses, 3
    # glosses, so half of 3. mammal: none.
    # Dropped: tyke, half an insult; mouse, a thought in 10 of 11 uses; Felis_catus, a name.
    assert wordnet.ranked(make.Kind("n", make.ANIMAL, 9, "mammal")) == ["cat", "dog", "pet", "mammal"]
    assert wordnet.ranked(make.Kind("n", make.ANIMAL, 9, without="dog")) == ["cat", "pet", "mammal"]


def test_adjectives_come_from_the_nouns_that_name_what_they_say(wordnet: make.WordNet):
    assert wordnet.ranked(make.Kind("a", 0, 9, "color")) == ["red", "scarlet"]


@pytest.mark.parametrize(
    ("verb", "activity"),
    [("run", "running"), ("dance", "dancing"), ("lie", "lying"), ("play", "playing"), ("look", "looking"),
     ("see", "seeing"), ("wax", "waxing"), ("visit", "visiting"), ("propel", "propelling"), ("dye", "dyeing")],
)  # fmt: skip
def test_an_activity_ends_in_ing(verb: str, activity: str):
    assert make.activity(verb) == activity
