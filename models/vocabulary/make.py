"""Makes `words.txt` from WordNet: everyday words for the things, qualities and activities that a picture shows.

    apt-get install --no-install-recommends wordnet-base
    python -m calmclip.models.vocabulary.make [--wordnet /usr/share/wordnet] [--out FILE]

Source: WordNet 3.0, Miller 1995 (CACM 38:11); the formats: its manual pages wndb, lexnames and cntlist. Equal files
give equal words.

`KINDS` names the lexicographers' files, and parts of them, whose senses a picture can show. A kind keeps its most used
words. WordNet alone says what is used: the tags of a word's senses of the kind (how often the word has this sense in
the texts that the lexicographers read, `cntlist.rev`), plus the definitions and examples that hold the word, times the
root of the word's share. The share is the part of its tags and senses, of all parts of speech, that are of the kind.
The tags are certain but know few words (no giraffe); definitions use plain words for concrete things. The texts are of
1961, so `ADDED` names things that are newer than they are, or whose words mostly are verbs; each must be in WordNet.

A word is dropped

* if less than `VISIBLE_PART` of its tags and senses are visible: it mostly means something abstract;
* if it has a capital letter, a digit or a dot, or more than two parts;
* if at least `INSULT_PART` of its tags and senses are marked by WordNet as obscene, disparaging or a slur: by a pointer
  to one of `USAGES`, or by a word of `MARKS` in the definition;
* if it is in `DEMEANING` or `UNSEEN`, two lists made by reading the result: WordNet does not mark these. Apes and
  monkeys are demeaning if a model mistakes a person for one, and models do; a caller may send words of its own.

Persons come from occupations, sports, journeys, ages and families alone. So no word is about origin, belief, sexuality,
crime or character: a picture shows none of these.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")  # where Debian's package wordnet-base puts the files
WORDS = Path(__file__).with_name("words.txt")
VISIBLE_PART, INSULT_PART = 0.3, 0.1
PAIR = 0.3  # of the definitions with both parts of a word: many stand side by side by chance
USAGES = {"obscenity", "disparagement", "ethnic_slur"}
MARKS = re.compile(
    r"\b(offensive|obscene|vulgar|derogatory|disparag\w*|slur|sexual\w*|prostitut\w*|genital\w*|vulva|penis|vagina|anus"
    r"|pubic|coitus|feces|fecal|narcotic|racial\w*)\b"
)
WORD = re.compile(r"[a-z]{3,}([_-][a-z]{2,})?|ox")
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
LETTERS = {
    "n": 1,
    "v": 2,
    "a": 3,
    "s": 5,
    "r": 4,
}  # letter of a synset -> number in the keys of its senses

# numbers of lexicographers' files
TOP, ACT, ANIMAL, ARTIFACT, BODY, COMMUNICATION, FOOD, GROUP, PLACE = 3, 4, 5, 6, 8, 10, 13, 14, 15
OBJECT, PERSON, WEATHER, PLANT, SHAPE, SUBSTANCE, TIME = 17, 18, 19, 20, 25, 27, 28
BODILY, COMPETITION, CONSUMPTION, CONTACT, CREATION, MOTION, PERCEPTION = 29, 33, 34, 35, 36, 38, 39
VISIBLE = {  # part of speech -> files; communication has books and signs
    "n": {
        TOP, ACT, ANIMAL, ARTIFACT, BODY, COMMUNICATION, FOOD, GROUP, PLACE, OBJECT, PERSON, WEATHER, PLANT, SHAPE,
        SUBSTANCE, TIME,
    },
    "v": {BODILY, COMPETITION, CONSUMPTION, CONTACT, CREATION, MOTION, PERCEPTION},
    "a": {0},
    "r": set[int](),
}  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """``id``: letter of the part of speech, and offset. ``file``: number of the lexicographers' file."""

    id: tuple[str, str]
    file: int
    words: tuple[str, ...]
    tags: tuple[int, ...]  # for each word
    pointers: tuple[tuple[str, tuple[str, str]], ...]  # symbol and target
    gloss: str


@dataclass(frozen=True)
class Kind:
    """``count``: words to keep, beside those of earlier kinds. ``under``: first words of synsets of the file; the
    kind's synsets are these and all below; empty: the whole file. ``without``: the same, not of the kind. For
    adjectives, ``under`` are nouns that name what they say."""

    part: str
    file: int
    count: int
    under: str = ""
    without: str = ""


KINDS = (
    Kind("n", TOP, 4, "person animal plant food"),
    Kind("n", ANIMAL, 120, "mammal"),
    Kind("n", ANIMAL, 60, "bird"),
    Kind("n", ANIMAL, 80, "fish reptile amphibian insect arachnid crustacean mollusk young"),
    Kind("n", ARTIFACT, 120, "clothing footwear headdress jewelry accessory"),
    Kind("n", ARTIFACT, 90, "furniture furnishing lamp bedclothes bathroom_fixture"),
    Kind("n", ARTIFACT, 90, "home_appliance kitchen_utensil kitchen_appliance cutlery tableware"),
    Kind("n", ARTIFACT, 120, "vehicle wheeled_vehicle craft public_transport"),
    Kind("n", ARTIFACT, 80, "sports_equipment game_equipment plaything sports_implement"),
    Kind("n", ARTIFACT, 90, "container"),
    Kind("n", ARTIFACT, 80, "tool cutter implement office_equipment toiletry"),
    Kind("n", ARTIFACT, 40, "musical_instrument"),
    Kind("n", ARTIFACT, 70, "electronic_equipment computer telephone camera timepiece machine"),
    Kind("n", ARTIFACT, 130, "building shop tower bridge fence shelter housing memorial"),
    Kind("n", ARTIFACT, 50, "room floor door window stairway"),
    Kind("n", ARTIFACT, 50, "road way path passage airfield sign street"),
    Kind("n", ARTIFACT, 40, "fabric"),
    Kind("n", ARTIFACT, 50, "art representation decoration covering creation"),
    Kind("n", ARTIFACT, 170, without="drug medicine"),
    Kind("n", FOOD, 80, "edible_fruit vegetable"),
    Kind("n", FOOD, 100, "dish baked_goods dessert sweet meal meat dairy_product"),
    Kind("n", FOOD, 30, "beverage"),
    Kind("n", FOOD, 30),
    Kind("n", PLANT, 80),
    Kind("n", BODY, 50, "external_body_part hair face body_covering feature"),
    Kind("n", OBJECT, 120, "geological_formation body_of_water land celestial_body natural_elevation sky"),
    Kind("n", PERSON, 110, "worker professional creator artist"),
    Kind("n", PERSON, 60, "contestant performer traveler spectator athlete"),
    Kind("n", PERSON, 45, "juvenile adult male female relative child"),
    Kind("n", WEATHER, 35, "atmospheric_phenomenon light smoke shadow"),
    Kind("n", SUBSTANCE, 50),
    Kind("n", GROUP, 30, "gathering forest crowd flock herd family people vegetation animal_group team"),
    Kind("n", SHAPE, 20),
    Kind("n", PLACE, 35, "city town tract geographical_area field garden park municipality"),
    Kind("n", TIME, 12, "hour season night day"),
    Kind("n", ACT, 70, "sport athletic_game dancing"),
    Kind(
        "a", 0, 280,
        "color value hue light luminosity size length height width thickness depth shape texture age cleanness wetness "
        "fullness hardness temperature weight curliness stature body_weight beauty complexion clearness opacity "
        "orientation integrity solidity evenness sharpness motion freshness happiness attractiveness tameness",
    ),
    Kind("v", MOTION, 100),
    Kind("v", CONTACT, 70),
    Kind("v", CONSUMPTION, 8),
    Kind("v", CREATION, 20),
    Kind("v", BODILY, 30),
    Kind("v", COMPETITION, 10),
    Kind("v", PERCEPTION, 6),
)  # fmt: skip
ADDED = """
backpack barbecue baseball_bat baseball_glove bear bell_pepper birthday_cake bookshelf broccoli burger carnival
cellular_telephone concert donut drone fire_engine fire_hydrant frying_pan graffiti hamburger hot_dog jogging karate
kite laptop microwave mountain_bike notebook parade parking_lot parking_meter pickup picnic pizza playground
remote_control rocket roller_coaster sandwich scissors screwdriver sink skateboard skateboarding ski smoothie
snowboard snowman street_sign sunglasses sunrise sunset surfboard surfing sushi swimming_pool tattoo teddy_bear
television tennis_racket tie toaster toothbrush traffic_light tricycle wedding wheelchair wineglass yoga
"""
STRESSED = "begin compel emit expel propel transmit transfer refer repel admit permit"  # on the last syllable
DEMEANING = """
anthropoid anthropoid_ape ape baboon bosom breast bureaucrat butt chimpanzee colonist contraceptive defeated dummy
embryo embryonic enemy fat fatty flesh fleshy foreigner fossil gaunt gibbon gorilla grotesque harem heroin hominid
immigrant inferior invader khan liberal monkey monster naked nude obese opium opponent plump primate quack redcoat
refugee resident savage settler sex skinny slave stranger striptease stroke subordinate sucker tar ugly urine
"""
UNSEEN = """
acid action addition amino andrena anode antigen appearing application applying area arousing assembly atom atomic
attendance axis behaving binding blood brief bringing calcium carbon cathedra causing character charge chevrotain
chlorine class coining coming commodity company conducting conference confronting constituent constructing copy
craning creating creation creator ctenophore curing cutting cycad depositing domestic donning double dynasty early
easing element emitting employing end enjoying entire enzyme epic equator essence establishing ester exercising
exerting exposing extension extracting facility feathering felling felting figure film foundation fourth freshwater
fruiting generation god good great habitat heroic hydrogen identity imagining import inducing ingredient injuring
integral intersecting iodine item job justice labor leaving little medium meeting_house molecule name needing
network nitrogen node noting novel operating opposing opposition outlet output oxide oxygen part percoid phrase
placental preparation prime proceeding producing production prolonged protein radical rare reaching recent relation
relieving representation reproducing resisting revolutionary scene secreting seeking seeming service setting
shifting side situation slight sodium solution sort source stage structure stuff subdivision subject substance
suffering supplement support surface system taking tangent tensing term thing total trade transmission transmitting
true under union upper used variation vitamin voluntary whole world year yielding
"""


class WordNet:
    """The synsets of ``folder``, and what is counted over all of them."""

    def __init__(self, folder: Path) -> None:
        tags: Counter[str] = Counter()
        for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
            key, _, count = line.split()
            tags[":".join(key.split(":")[:3])] += int(count)
        self.synsets = {s.id: s for part in PARTS for s in read(folder / f"data.{PARTS[part]}", part, tags)}
        self.below: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        self.glosses: Counter[str] = Counter()  # word -> glosses that hold it
        self.uses: Counter[str] = Counter()  # word -> tags and senses
        self.visible: Counter[str] = Counter()  # the part of them in `VISIBLE`, by part of speech + word
        self.insults: Counter[str] = Counter()  # the part of them that WordNet marks
        self.refused = {*DEMEANING.split(), *UNSEEN.split()}
        for synset in self.synsets.values():
            self._count(synset)

    def _count(self, synset: Synset) -> None:
        words = re.findall(r"[a-z]+(?:-[a-z]+)*", synset.gloss.lower())
        self.glosses.update({*words, *map("_".join, pairwise(words))})
        part = synset.id[0]
        usages = {self.synsets[target].words[0] for symbol, target in synset.pointers if symbol == ";u"}
        insult, visible = bool(usages & USAGES or MARKS.search(synset.gloss)), synset.file in VISIBLE[part]
        for word, count in zip(synset.words, synset.tags, strict=True):
            self.uses[word] += 1 + count
            self.insults[word] += insult * (1 + count)
            self.visible[part + word] += visible * (1 + count)
        for symbol, target in synset.pointers:
            if symbol == "@":
                self.below[target].append(synset.id)

    def words(self) -> list[str]:
        """The words of all kinds, sorted."""
        nouns: dict[str, Kind] = {}
        for kind in KINDS:
            new = (word for word in self.ranked(kind) if word not in nouns)
            nouns |= {word: kind for word, _ in zip(new, range(kind.count), strict=False)}
        added = ADDED.split()
        if unknown := [word for word in added if "n" + word not in self.visible]:
            raise SystemExit(f"WordNet lacks the nouns {unknown}; expected each of ADDED to be in it")
        written = {activity(word) if kind.part == "v" else word for word, kind in nouns.items()}
        return sorted(word.replace("_", " ") for word in written | {*added})

    def ranked(self, kind: Kind) -> list[str]:
        """All words of a kind, the most used first."""
        tags: Counter[str] = Counter()
        senses: Counter[str] = Counter()
        for synset in self.of(kind):
            senses.update(synset.words)
            tags.update(dict(zip(synset.words, synset.tags, strict=True)))
        uses = {
            word: tags[word] + ((tags[word] + senses[word]) / self.uses[word]) ** 0.5 * self._glosses(word)
            for word in senses
            if self._fits(kind.part, word)
        }
        return sorted(uses, key=lambda word: (-uses[word], word))

    def _glosses(self, word: str) -> float:
        """The definitions and examples that hold a word or its plural."""
        return (self.glosses[word] + self.glosses[word + "s"]) * (PAIR if "_" in word else 1)

    def _fits(self, part: str, word: str) -> bool:
        plural = word.endswith("s") and "n" + word[:-1] in self.visible
        written = activity(word) if part == "v" else word
        if plural or written in self.refused or not WORD.fullmatch(word) or (part == "v" and "_" in word):
            return False
        uses = self.uses[word]
        return self.visible[part + word] >= VISIBLE_PART * uses and self.insults[word] < INSULT_PART * uses

    def of(self, kind: Kind) -> list[Synset]:
        """The synsets of a kind."""
        synsets = [s for s in self.synsets.values() if s.id[0] == kind.part and s.file == kind.file]
        if kind.part == "a":
            return self._saying(synsets, kind.under.split())
        reached = self._below(synsets, kind.under.split()) if kind.under else {s.id for s in synsets}
        kept = reached - self._below(synsets, kind.without.split())
        return [s for s in synsets if s.id in kept]

    def _below(self, synsets: list[Synset], names: list[str]) -> set[tuple[str, str]]:
        """The ids of the synsets that ``names`` begin, and of all below them, among ``synsets``."""
        allowed = {s.id for s in synsets}
        waiting = [s.id for s in synsets if s.words[0] in names]
        reached = set(waiting)
        while waiting:
            new = [i for i in self.below[waiting.pop()] if i in allowed and i not in reached]
            reached.update(new)
            waiting += new
        return reached

    def _saying(self, synsets: list[Synset], nouns: list[str]) -> list[Synset]:
        """Adjectives with one of the nouns as their attribute, and the adjectives that are similar to such a word."""

        def targets(synset: Synset, symbol: str) -> set[tuple[str, str]]:
            return {target for kind, target in synset.pointers if kind == symbol}

        heads = {s.id for s in synsets if any(self.synsets[target].words[0] in nouns for target in targets(s, "="))}
        return [s for s in synsets if s.id in heads or targets(s, "&") & heads]


def read(file: Path, part: str, tags: Counter[str]) -> Iterator[Synset]:
    """The synsets of a file ``data.PART``."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        offset, number, letter, count, *rest = head.split()
        end = 2 * int(count, 16)
        words = tuple(re.sub(r"\(\w+\)$", "", word) for word in rest[:end:2])
        keys = [f"{word.lower()}%{LETTERS[letter]}:{number}:" for word in words]
        counts = tuple(tags[f"{key}{int(i, 16):02d}"] for key, i in zip(keys, rest[1:end:2], strict=True))
        links = rest[end + 1 : end + 1 + 4 * int(rest[end])]
        pointers = tuple((links[i], (links[i + 2].replace("s", "a"), links[i + 1])) for i in range(0, len(links), 4))
        yield Synset((part, offset), int(number), words, counts, pointers, gloss.strip())


def activity(verb: str) -> str:
    """The -ing form: run -> running, dance -> dancing, lie -> lying."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    single = re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb) or verb in STRESSED.split()
    return verb + verb[-1] + "ing" if single else verb + "ing"


def main() -> None:
    parser = argparse.ArgumentParser(description="make words.txt from the files of WordNet")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help=f"the folder of data.noun (default {WORDNET})")
    parser.add_argument("--out", type=Path, default=WORDS, help="the file to write")
    options = parser.parse_args()
    words = WordNet(options.wordnet).words()
    options.out.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    print(f"{len(words)} words in {options.out}")


if __name__ == "__main__":
    main()
