"""Captions with one noun exchanged for another noun of its kind: false captions for the eval misalignment.

A caption loses one noun at random and gets another one of the same number and kind: of `any` kind ("a dog on a sofa"
becomes "a guitar on a sofa"), of a `wide` kind, which are those of WordNet's lexicographers ("a horse on a sofa"), or
of a `narrow` kind, those of `KINDS` (a shirt becomes a dress, not a ball). The new noun is drawn from those that
captions of the other pictures hold, as often as they hold it, so it is as common as the words of the data set.
A noun is left out if a caption of this picture holds it or a word that may mean the same thing (`a/b/c` in
`KINDS`). Words that name most things of their kind (person, child, animal, thing) are in no kind: they would stay true.

Source: Hsieh et al. 2023, SugarCrepe (arXiv 2306.14610), for one exchanged object with the remaining words kept;
Shekhar et al. 2017, FOIL (arXiv 1705.01359), for nouns of one kind that no caption of the picture holds.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calmclip.models.tasks.words import Span, words

# kind -> nouns; words with a slash may mean the same thing in a picture
KINDS = {
    "people": "man/guy/gentleman/father/dad/husband/groom/grandfather woman/lady/mother/mom/wife/bride/grandmother "
    "boy/son girl/daughter baby/infant/toddler",
    "roles": "surfer skateboarder/skater snowboarder skier cyclist/bicyclist/biker/rider/motorcyclist hiker climber "
    "swimmer/diver runner/jogger dancer/ballerina musician/guitarist/singer/drummer cowboy/cowgirl soldier "
    "police/policeman/officer chef/cook/waiter firefighter/fireman fisherman/angler doctor/nurse clown worker",
    "animals": "dog/puppy/pup/greyhound/poodle/retriever/shepherd/terrier/labrador/collie/dachshund/bulldog/dalmatian/"
    "husky/beagle cat/kitten horse/pony/mule/donkey cow/bull/calf/ox/cattle sheep/lamb/goat bird/duck/goose/seagull/"
    "pigeon/parrot/eagle/chicken fish/shark elephant giraffe zebra bear monkey/ape rabbit/bunny deer/elk squirrel lion/"
    "tiger/leopard camel pig frog turtle snake butterfly/bee/insect",
    "clothes": "shirt/t-shirt/tshirt/blouse/jersey/sweatshirt/sweater/vest/hoodie jacket/coat/parka "
    "dress/gown/skirt jeans/pants/trousers/leggings shorts/trunks/swimsuit/bikini/wetsuit "
    "hat/cap/helmet/headband/bandanna/bandana/beanie/hood scarf shoe/boot/sneaker/sandal glove/mitten "
    "glasses/sunglasses/goggles suit/uniform/tuxedo costume mask tie necklace",
    "vehicles": "car/vehicle/taxi/jeep/van/suv truck/pickup/van bus/van train/subway/tram bicycle/bike "
    "motorcycle/motorbike/dirtbike/bike/scooter boat/ship/canoe/kayak/raft/sailboat airplane/plane/jet/helicopter "
    "wagon/cart/carriage/stroller/wheelchair sled/sledge tractor",
    "sports": "soccer football/rugby basketball baseball/softball tennis/badminton volleyball hockey golf cricket",
    "equipment": "ball/football/basketball/baseball/soccerball frisbee/disc skateboard surfboard snowboard ski/skis "
    "racket/racquet bat balloon kite rope/leash/hose stick/branch/log/pole guitar/violin drum/piano trumpet/saxophone "
    "swing slide trampoline",
    "waters and lands": "beach/shore/sand/coast/ocean/sea/dune/desert street/road/sidewalk/alley/crosswalk/highway/"
    "pavement/city forest/wood/woods mountain/hill/cliff/slope field/meadow/pasture/grass/lawn/yard/park/garden "
    "lake/pond/river/stream/creek/pool/ocean/sea/water snow/ice dirt/mud/gravel playground",
    "buildings and rooms": "kitchen bedroom bathroom office classroom/school stadium/arena restaurant/cafe/diner "
    "store/shop/market/mall church/cathedral/temple/castle barn/stable garage airport station/subway/platform bridge "
    "tunnel gym/gymnasium stage/theater/auditorium library tent/camp",
    "furniture": "bench table/desk/counter chair/stool/armchair couch/sofa bed/crib door/doorway/gate window "
    "fence/railing/rail wall stairs/steps/staircase/stairway shelf/cabinet lamp/lantern mirror ladder",
    "food": "cake/cupcake/pie/pastry/dessert pizza sandwich/burger/hamburger/hotdog apple banana salad/vegetable/"
    "broccoli bread/donut/doughnut/bagel beer/wine/champagne coffee/tea soup ice-cream/popsicle/icecream meat/steak "
    "candy/lollipop/cookie",
    "things": "book/newspaper/magazine camera telephone/phone/cellphone computer/laptop umbrella/parasol "
    "backpack/bag/purse/handbag/suitcase bottle/cup/glass/mug/can flower/rose/bouquet flag/banner sign/billboard "
    "statue/sculpture box/basket/bucket toy/doll/teddy microphone cigarette/cigar knife/sword gun/rifle clock/watch "
    "plate/bowl/dish",
    "body": "face/head/mouth/nose/eye/tongue/teeth/ear/beard hand/arm/finger/fist leg/foot/knee hair tail wing",
}  # fmt: skip
IRREGULAR = {
    "man": "men", "gentleman": "gentlemen", "policeman": "policemen", "fireman": "firemen", "fisherman": "fishermen",
    "woman": "women", "wife": "wives", "foot": "feet", "shelf": "shelves", "knife": "knives", "calf": "calves",
    "goose": "geese", "ox": "oxen", "leaf": "leaves",
}  # fmt: skip


@dataclass(frozen=True)
class Noun:
    """``group``: of words that may mean the same; a word may be of several."""

    kind: str
    groups: frozenset[int]
    plural: bool


@dataclass(frozen=True)
class Exchanged:
    """``false``: ``caption`` with ``new`` instead of ``old``. ``picture``: an index."""

    picture: int
    caption: str
    false: str
    old: str
    new: str


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


WIDE = {  # kind of `KINDS` -> the kind of WordNet's lexicographers that holds it
    "people": "person", "roles": "person", "animals": "animal", "clothes": "artifact", "vehicles": "artifact",
    "equipment": "artifact", "furniture": "artifact", "things": "artifact", "waters and lands": "place",
    "buildings and rooms": "place", "sports": "sport", "food": "food", "body": "body",
}  # fmt: skip


def _table() -> dict[tuple[str, str], Noun]:
    """(kind, word) -> noun, with the plurals of words that do not end in s."""
    groups: dict[tuple[str, str, bool], set[int]] = {}
    number = 0
    for kind, text in KINDS.items():
        for group in text.split():
            for word in group.split("/"):
                groups.setdefault((kind, word, False), set()).add(number)
                if not word.endswith("s"):
                    groups.setdefault((kind, plural(word), True), set()).add(number)
            number += 1
    return {(kind, word): Noun(kind, frozenset(numbers), many) for (kind, word, many), numbers in groups.items()}


NOUNS = _table()
Kinds = Literal["any", "wide", "narrow"]
_KIND_OF: dict[Kinds, Callable[[Noun], str]] = {
    "any": lambda noun: "",
    "wide": lambda noun: WIDE[noun.kind],
    "narrow": lambda noun: noun.kind,
}
_BY_WORD: dict[str, list[Noun]] = {}
for (_, _word), _noun in NOUNS.items():
    _BY_WORD.setdefault(_word, []).append(_noun)


def exchange(captions: Sequence[Sequence[str]], seed: int = 0, kinds: Kinds = "wide") -> list[Exchanged]:
    """For each picture its first caption that has a noun of `KINDS`, with one noun exchanged; pictures without such a
    caption, or without another noun, are left out. Equal captions, seeds and kinds give equal results."""
    kind_of = _KIND_OF[kinds]
    common: dict[tuple[str, bool], Counter[tuple[str, str]]] = defaultdict(Counter)
    for noun, span in (each for texts in captions for caption in texts for each in _nouns(caption)):
        common[kind_of(noun), noun.plural][noun.kind, span.text.lower()] += 1
    rng = np.random.default_rng(seed)
    rows = (_exchanged(picture, texts, common, kind_of, rng) for picture, texts in enumerate(captions))
    return [row for row in rows if row]


def _nouns(caption: str) -> Iterator[tuple[Noun, Span]]:
    for span in words(caption):
        for noun in _BY_WORD.get(span.text.lower(), ()):
            yield noun, span


def _exchanged(
    picture: int,
    captions: Sequence[str],
    common: Mapping[tuple[str, bool], Counter[tuple[str, str]]],
    kind_of: Callable[[Noun], str],
    rng: np.random.Generator,
) -> Exchanged | None:
    shown = {group for caption in captions for noun, _ in _nouns(caption) for group in noun.groups}
    for caption in captions:
        nouns = [*_nouns(caption)]
        for place in rng.permutation(len(nouns)):
            noun, span = nouns[place]
            others = {
                word: count
                for (kind, word), count in common[kind_of(noun), noun.plural].items()
                if not NOUNS[kind, word].groups & shown
            }
            if others:
                chances = np.array([*others.values()], np.float64)
                new = [*others][int(rng.choice(len(chances), p=chances / chances.sum()))]
                return Exchanged(picture, caption, _swapped(caption, span, new), span.text, new)
    return None


def _swapped(caption: str, span: Span, new: str) -> str:
    """The article before the noun fits the new noun; a capital letter stays one."""
    before = caption[: span.start]
    article = "an" if new[0] in "aeiou" else "a"
    before = re.sub(r"\b(a)n?(\s+)$", lambda match: match[1] + article[1:] + match[2], before, flags=re.IGNORECASE)
    return before + (new.capitalize() if span.text[:1].isupper() else new) + caption[span.end :]
