"""Sentences within a budget: against all subsets of small texts, and what holds for any text."""

# ruff: noqa: RUF001  the marks of other scripts are meant
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calmclip.models.errors import BadRequest, TextTooLong
from calmclip.models.flow import Array, Flow, drive
from calmclip.models.preprocess.sentences import sentences
from calmclip.models.tasks import compression
from calmclip.models.tasks.compression import Compressed, Count, check_budget, compressed, first_words, shortlists

ENGLISH = (
    "The bridge was closed in March. Engineers had seen a crack in its second pillar. Dr. Weber measured it twice. "
    "A bakery nearby sells bread. The crack grew by 3 mm within a week! Who would pay for the repair? The town and the "
    "railway agreed to share the cost of the bridge. Bread is cheap there. The bridge opened again in the autumn."
)
GERMAN = (
    "Der Bäcker öffnet um 5 Uhr. Er verkauft z.B. Brot und Kuchen. Am 3. Mai war zu. Hr. Weber kam trotzdem. "
    "„Kein Brot?“ fragte er. Danach ging er nach Hause."
)
CHINESE = "我喜欢在早上去公园。那里有很多树和一个小湖。你去过吗？我的朋友住在湖边！他有一只猫。猫喜欢鱼。"
HINDI = "यह एक छोटा गाँव है। यहाँ एक नदी बहती है। लोग सुबह काम पर जाते हैं। क्या तुम वहाँ गए हो? नदी ठंडी है।"
LIST = "Shopping\n\n- bread and butter\n- two apples, a pear\n- tea\n\nNotes\n\nThe shop closes at noon\nBring a bag"
UNMARKED = "one word after another and never a mark that would end it so nothing tells where to stop reading " * 3
TEXTS = {
    "english": ENGLISH, "german": GERMAN, "chinese": CHINESE, "hindi": HINDI, "list": LIST, "unmarked": UNMARKED,
}  # fmt: skip


def words(text: str) -> list[str]:
    """Runs of letters, and single characters above U+2000, without those that a tokenizer may drop."""
    spaced = "".join(f" {c} " if c > "\u2000" else c for c in text.replace("\0", ""))
    return spaced.split()


def count(text: str) -> int:
    """A token for every started four characters of a word, and two special ones."""
    return 2 + sum(-(-len(word) // 4) for word in words(text))


@cache
def direction(word: str, dim: int) -> Array:
    return np.random.default_rng(crc32(word.encode())).standard_normal(dim)


class Vectors:
    """Unit vectors of texts: a random direction for each word, summed and bent, so they do not add up exactly."""

    def __init__(self, dim: int = 24, bend: float = 0.3) -> None:
        self.dim, self.bend, self.sent = dim, bend, []

    def of(self, text: str) -> Array:
        total = sum((direction(word.casefold(), self.dim) for word in words(text)), np.zeros(self.dim))
        bent = total + self.bend * np.roll(np.abs(total), 1)
        return (bent / max(float(np.linalg.norm(bent)), 1e-9)).astype(np.float32)

    def embed(self, texts: Sequence[str]) -> Flow[Array]:
        self.sent.append(list(texts))
        return np.stack([self.of(text) for text in texts])
        yield


def shortened(text: str, budget: int, counting: Count = count, vectors: Vectors | None = None) -> Compressed:
    vectors = vectors or Vectors()
    answer, row = drive(compressed(text, budget, counting, vectors.embed), None)  # type: ignore[arg-type]
    assert row == pytest.approx(vectors.of(answer.text), abs=1e-6)
    return answer


def check(text: str, budget: int, answer: Compressed, counting: Count = count) -> None:
    """What holds for any text: the budget, the facts, and sentences of the text in their order."""
    assert answer.tokens == counting(answer.text) <= budget or answer.text == text
    assert answer.tokens <= budget
    assert answer.tokens_before == counting(text)
    assert answer.ratio == answer.tokens / answer.tokens_before <= 1
    spans = sentences(text)
    assert answer.sentences == len(spans)
    assert list(answer.kept) == sorted(set(answer.kept))
    if answer.text == text:
        return
    rest = answer.text
    for number, i in enumerate(answer.kept):
        piece = text[slice(*spans[i])]
        if answer.cut:
            assert len(answer.kept) == 1
            assert piece.startswith(rest)
            return
        rest = rest.lstrip() if number else rest
        assert rest.startswith(piece)
        rest = rest[len(piece) :]
    assert rest == ""
    letters = iter(text)
    assert all(letter in letters for letter in answer.text)  # each is found after the one before


@pytest.mark.parametrize("name", TEXTS)
def test_own_texts_at_every_budget(name: str):
    text = TEXTS[name]
    whole = count(text)
    for budget in range(8, whole + 2):
        answer = shortened(text, budget)
        check(text, budget, answer)
        assert (answer.text is text) == (budget >= whole)
        assert answer.cut == (name == "unmarked" and budget < whole) or budget < 20


def test_a_text_within_the_budget_is_the_same_string_and_nothing_else_is_embedded():
    vectors = Vectors()
    answer = shortened(ENGLISH, count(ENGLISH), vectors=vectors)
    assert answer.text is ENGLISH
    assert (answer.cosine, answer.ratio, answer.kept) == (1.0, 1.0, tuple(range(9)))
    assert vectors.sent == [[ENGLISH]]


@settings(deadline=None, max_examples=150)
@given(
    st.text(st.sampled_from([*"abcdefgh.!?\n \t\0-)中。é́🐈A1"]), min_size=1, max_size=120).filter(str.strip),
    st.integers(8, 40),
)
@example("aaaa. " * 30, 8)
@example("...... ! ! ? ? . . . -- -- -- -- -- -- -- --", 8)
@example("a\0b. \0\0. c\0 d e f g h i j k l m n", 8)
@example("x" * 500, 8)
@example("🐈" * 80, 9)
@example("a. " + "b" * 100 + ". c.", 9)
def test_any_text(text: str, budget: int):
    check(text, budget, shortened(text, budget))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["red cat.", "a dog ran.", "No!", "blue.", "the sea is wide."]), min_size=3, max_size=14)
)
def test_tokens_that_join_over_sentences_are_recounted(parts: list[str]):
    """A tokenizer that has a token more for each space between sentences: the sum of the parts says too little."""

    def joint(text: str) -> int:
        return count(text) + 2 * text.count(". ") + 2 * text.count("! ")

    text = " ".join(parts)
    answer = shortened(text, 12, joint)
    check(text, 12, answer, joint)


def test_against_the_best_of_all_subsets():
    """Texts of 5 to 10 sentences whose vectors do not add up exactly. On average the cosine is at least .98 of the best
    subset's, and never below .85 of it; it is never below that of the first sentences that fit."""
    draw = np.random.default_rng(3)
    vectors, nouns, shares = Vectors(), [f"Noun{i}" for i in range(14)], []
    for _ in range(40):
        lines = [f"{' '.join(draw.choice(nouns, draw.integers(1, 6)))}{i}." for i in range(draw.integers(5, 11))]
        text = " ".join(lines)
        budget = int(draw.integers(max(12, 2 + min(count(line) for line in lines)), count(text)))
        answer, whole = shortened(text, budget, vectors=vectors), vectors.of(text)
        subsets = [" ".join(part) for size in range(1, len(lines)) for part in combinations(lines, size)]
        near = {part: float(vectors.of(part) @ whole) for part in subsets if count(part) <= budget}
        assert answer.cosine == pytest.approx(near[answer.text], abs=1e-5)
        shares.append(answer.cosine / max(near.values()))
        first = [part for n in range(1, len(lines)) if (part := " ".join(lines[:n])) in near]
        assert not first or answer.cosine >= near[first[-1]] - 1e-6
    assert min(shares) >= 0.85
    assert np.mean(shares) >= 0.98


def test_no_exchange_addition_or_removal_is_left_that_helps():
    """The steps over products, against the sums themselves in float64."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((12, 6)).astype(np.float32)
    lengths, whole = draw.integers(1, 9, 12), rows.sum(axis=0)
    for room in (4, 9, 20):
        lists = shortlists(rows, lengths, whole, room, [*map(str, range(12))])
        assert len(lists) == 2 * len(compression.POWERS) + 1
        for number, chosen in enumerate(lists[:-1]):
            assert len(set(chosen)) == len(chosen) > 0
            assert lengths[chosen].sum() <= room
            weighted = rows * lengths[:, None] ** compression.POWERS[number // 2]

            def near(places: list[int], weighted: Array = weighted) -> float:
                total = weighted[places].sum(axis=0).astype(np.float64)
                return float(total @ whole / np.linalg.norm(total))

            others = [(*chosen[:place], *chosen[place + 1 :]) for place in range(len(chosen))]
            others += [(*other, new) for other in (chosen, *others) for new in {*range(12)} - {*chosen}]
            for other in map(list, others):
                if other and lengths[other].sum() <= room:
                    assert near(other) <= near(chosen) + 1e-6


def test_the_first_pick_is_the_sentence_nearest_to_the_whole_and_the_second_completes_it():
    """The whole lies between two axes. Row 2 is nearest to it but does not fit with others; of rows 0, 1 and 3, which
    fit two at a time, 0 and 3 lie along one axis."""
    rows = np.array([[1, 0.1, 0], [0.1, 1, 0], [0.9, 0.8, 0.1], [1, 0, 0]], np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    lists = shortlists(rows, np.array([4, 4, 9, 4]), np.array([1.0, 0.9, 0]), 8, ["a", "b", "c", "d"])
    assert all(sorted(chosen) in ([0, 1], [1, 3]) for chosen in lists[:-1])
    assert lists[-1] == [0, 1]


def test_a_repeated_sentence_is_chosen_once():
    answer = shortened("The same thing again. " * 12 + "Another one here.", 40)
    assert answer.text.count("The same") == 1
    assert len(answer.kept) <= 2


def test_a_long_sentence_beside_short_ones_is_left_out_and_alone_it_is_cut_at_a_word():
    long = "word " * 50
    assert shortened(f"{long}. A cat. A dog.", 9).text in ("A cat. A dog.", "A cat.", "A dog.")
    answer = shortened(f"{long}. {'other ' * 40}.", 13)
    assert answer.cut
    assert answer.text == "word word word word word word word word word word word"
    assert shortened("é" * 200, 10).text == "é" * 32  # no word ends within the budget


def test_first_words_keep_a_mark_with_its_letter_and_say_what_does_not_fit():
    assert first_words("e\u0301" * 9, 4, lambda text: len(text) + 1) == "e\u0301"
    with pytest.raises(BadRequest, match="budget is 8; the character '🐈' alone has 20 tokens"):
        first_words("🐈 a", 8, lambda text: 20)


def test_budgets_and_sentences_have_limits(monkeypatch: pytest.MonkeyPatch):
    for budget in (7, 8193):
        with pytest.raises(BadRequest, match=f"budget is {budget}; expected 8 to 8192 tokens"):
            check_budget(budget)
    monkeypatch.setattr(compression, "MOST_SENTENCES", 8)
    with pytest.raises(TextTooLong, match="the text has 9 sentences; at most 8 are read"):
        shortened(ENGLISH, 20)
    with pytest.raises(BadRequest, match=r"no sentence of the text .* has a token"):
        shortened("\0. \0. \0.", 8, lambda text: 1 + 5 * text.count(" "))


def test_a_list_that_is_too_long_is_not_exchanged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compression, "MOST_EXCHANGED", 1)
    check(ENGLISH, 40, shortened(ENGLISH, 40))


def test_the_work_grows_with_the_text_and_falls_with_the_budget():
    """Tokens that are embedded: the text, its sentences once more, and a list for each rule within the budget."""
    sent = {}
    for budget in (16, 32, 64):
        for times in (2, 4, 8):
            vectors, lines = Vectors(), [f"Line {i} says {crc32(bytes([i]))}." for i in range(10 * times)]
            text = " ".join(lines)
            shortened(text, budget, vectors=vectors)
            assert [len(part) for part in vectors.sent[:2]] == [1, len(lines)]
            assert len(vectors.sent) == 3
            sent[budget, times] = sum(count(part) for part in vectors.sent[2])
            assert sent[budget, times] <= (2 * len(compression.POWERS) + 1) * budget
    assert all(sent[16, times] < sent[64, times] for times in (2, 4, 8))
