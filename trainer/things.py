"""Generic queries ("a dog", "snow") of a stream, true wherever the captions of what is shown say so.

true      the captions mention it: two of them, or the only one; a class name ends in it ("a rugby ball")
unknown   fewer do, or they leave it open ("people" may be men); a class name that does not say it, since nobody
          looked what else its photo holds
false     no caption mentions it, or nothing is shown
"""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.library import Item, Library
from trainer.render import Segment

CAPTIONS_THAT_TELL = 2  # one annotator may be mistaken, or name what hardly shows
TRUE_SHARE = (0.05, 0.60)  # of a stream; rarer things teach little, and more common ones are hardly moments
PER_STREAM = 4


@dataclass(frozen=True)
class Thing:
    """Words are regular expressions for whole words."""

    query: str
    words: str  # that tell it
    hints: str  # that leave it open where none of `words` is said
    classes: tuple[tuple[str, str], ...] = ()  # first and last WordNet id of ImageNet classes that are this thing

    def in_captions(self, texts: Sequence[str]) -> bool | None:
        """Whether what they describe shows it; None where that is unknown."""
        mentions = sum(_says(self.words, text) for text in texts)
        if mentions >= min(CAPTIONS_THAT_TELL, len(texts)):
            return True
        return None if mentions or any(_says(self.hints, text) for text in texts) else False

    def in_class(self, photo: Item, assume_absent: bool) -> bool | None:
        """The same of a photo that has but a class: a rugby ball is a ball, but a water bottle is no water."""
        wnid, (name,) = photo.path.stem.partition("_")[0], photo.texts
        if any(low <= wnid <= high for low, high in self.classes) or _says(self.words, name, "$"):
            return True
        return False if assume_absent and not _says(f"{self.words}|{self.hints}", name) else None


@dataclass(frozen=True)
class AskedThing:
    """A generic query of a stream, with the frames [start, end) that answer it and those nobody knows of."""

    query: str
    windows: tuple[tuple[int, int], ...]
    ignored: tuple[tuple[int, int], ...]


def _says(words: str, text: str, end: str = r"\b") -> bool:
    return re.search(rf"\b(?:{words}){end}", text, re.IGNORECASE) is not None


def ask(
    segments: Sequence[Segment],
    library: Library,
    rng: random.Random,
    *,
    besides: Collection[str] = (),
    assume_absent: bool = False,
) -> list[AskedThing]:
    """Up to PER_STREAM things that are true for TRUE_SHARE of the segments, none of them in `besides`.

    With `assume_absent` a class name that neither says nor hints at a thing counts as false.
    """
    described = {item.path: item for item in library.clips + library.captioned}
    classed = {item.path: item for item in library.named}

    def truth(thing: Thing, path: Path | None) -> bool | None:
        if path is None:
            return False
        if path in described:
            return thing.in_captions(described[path].texts)
        return thing.in_class(classed[path], assume_absent)

    frames = sum(segment.frames for segment in segments)
    fitting = []
    for thing in THINGS:
        shown = [truth(thing, segment.path) for segment in segments]
        asked = AskedThing(thing.query, _spans(segments, shown, True), _spans(segments, shown, None))
        share = sum(end - start for start, end in asked.windows) / frames
        if TRUE_SHARE[0] <= share <= TRUE_SHARE[1] and thing.query not in besides:
            fitting.append(asked)
    return rng.sample(fitting, min(PER_STREAM, len(fitting)))


def _spans(
    segments: Sequence[Segment], truths: Sequence[bool | None], wanted: bool | None
) -> tuple[tuple[int, int], ...]:
    """Frames [start, end) of that truth; segments that touch are one span."""
    spans: list[tuple[int, int]] = []
    at = 0
    for segment, truth in zip(segments, truths, strict=True):
        if truth is wanted:
            start = spans.pop()[0] if spans and spans[-1][1] == at else at
            spans.append((start, at + segment.frames))
        at += segment.frames
    return tuple(spans)


_MEN = r"m[ae]n|guys?|gentlem[ae]n|fisherm[ae]n|fathers?|dads?|grooms?"
_WOMEN = r"wom[ae]n|lady|ladies|mothers?|moms?|brides?"
_KIDS = r"child|children|kids?|toddlers?|baby|babies|infants?|youngsters?"
_ANYBODY = (
    r"persons?|people|someone|somebody|adults?|parents?|teens?|teenagers?|crowds?|family|families|hikers?|climbers?|"
    r"backpackers?|skiers?|snowboarders?|skateboarders?|surfers?|swimmers?|divers?|riders?|bikers?|cyclists?|"
    r"bicyclists?|runners?|(?<!cassette )(?<!tape )players?|ballplayers?|batters?|performers?|dancers?|workers?|"
    r"soldiers?|astronauts?|athletes?|tourists?|pedestrians?"
)
# Who shows only in part, and the ImageNet classes that are mostly photographed on people.
_SOMEBODY_MAYBE = (
    r"hands?|couples?|friends?|twins?|teams?|groups?|bikini|maillot|kimono|abaya|gown|miniskirt|hoopskirt|overskirt|"
    r"uniform|suit|poncho|coat|cardigan|jersey|bow tie|windsor tie|wig|mask|stole|bonnet|sunglass|cowboy hat|"
    r"neck brace|stethoscope|barbershop|barbell|dumbbell|crutch|unicycle|horizontal bar|parallel bars|balance beam|"
    r"violin|cello|flute|oboe|trombone|banjo|accordion|jinrikisha"
)
_MANY = (
    r"people|men|women|boys|girls|kids|children|teens|teenagers|adults|friends|hikers|climbers|backpackers|bikers|"
    r"cyclists|runners|players|tourists|students|soldiers|dancers|performers"
)
_CARS = (
    r"(?<!freight )(?<!passenger )cars?(?![ -](?:shaped|carts?|seats?|strollers?))|taxis?|cabs?|jeeps?|minivans?|"
    r"limousines?|convertibles?|beach wagon|model t"
)

THINGS = (
    Thing("a person", f"{_ANYBODY}|{_MEN}|{_WOMEN}|{_KIDS}|boys?|girls?", _SOMEBODY_MAYBE),
    Thing("a man", _MEN, f"{_ANYBODY}|{_SOMEBODY_MAYBE}"),
    Thing("a woman", _WOMEN, f"{_ANYBODY}|{_SOMEBODY_MAYBE}"),
    Thing("a child", f"{_KIDS}|boys?|girls?", f"{_ANYBODY}|{_SOMEBODY_MAYBE}"),
    Thing("a boy", "boys?", f"{_ANYBODY}|{_KIDS}|{_SOMEBODY_MAYBE}"),
    Thing("a girl", "girls?", f"{_ANYBODY}|{_KIDS}|{_SOMEBODY_MAYBE}"),
    Thing(
        "a group of people",
        rf"crowds?|(?:group|bunch|team|line|row|lots) of (?:[\w-]+ ){{0,3}}(?:{_MANY})|"
        rf"(?:three|four|five|six|seven|eight|several|many) (?:[\w-]+ ){{0,2}}(?:{_MANY})",
        rf"{_MANY}|groups?|teams?|parade|audience|couples?|family|families|crowded|busy|band|stage|school bus",
    ),
    Thing(
        "a dog",
        r"dogs?|puppy|puppies|poodles?|terriers?|retrievers?|greyhounds?|dalmatians?|collies?|labradors?",
        r"hound|husky|shepherd|dhole|dingo|animals?|pets?|leash",
        (("n02085620", "n02113978"),),
    ),
    Thing("a horse", r"horses?|pony|ponies|sorrel", r"rodeo|jockey|polo|cowboys?|bulls?|carriage|cart|oxcart|animals?"),
    Thing(
        "a bird",
        r"birds?(?! dogs?)|pigeons?|ducks?|goose|geese|seagulls?|swans?|parrots?|chickens?|penguins?",
        r"flock|feathers?|wings?|animals?",
        (("n01514668", "n01622779"), ("n01795545", "n01860187"), ("n02002556", "n02058221")),
    ),
    Thing(
        "water",
        r"water(?! bottles?| guns?| towers?| jugs?)|waterfalls?|underwater|puddles?|lakes?|rivers?|ocean|sea|"
        r"pools?(?! tables?)|ponds?|streams?|creeks?|lakeside|seashore",
        r"beach(?:es)?|shores?|coast|\w*boats?|canoes?|kayaks?|rafts?|ships?|docks?|piers?|islands?|swim\w*|surf\w*|"
        r"wet|splash\w*|bath\w*|rain\w*|fish\w*|\w+fish|sprinklers?|hose|fountains?|waves?|wad(?:es?|ing)|"
        r"div(?:es?|ing|ers?)|snorkel|sail\w*|breakwater|dam|sandbar|promontory|liner|yawl|schooner|catamaran|"
        r"trimaran|gondola|submarine|paddlewheel|bottles?|whales?|shark|ray|coral|anemone|swan|pelican|flamingo|"
        r"penguin|otter|beaver|hippopotamus|drake|merganser|coot|heron|stork|spoonbill|albatross|bridge|viaduct",
    ),
    Thing(
        "snow",
        r"snow|snowy|snowbanks?|snowballs?",
        r"snow\w+|ski|skis|skiing|skiers?|sled\w*|ice|icy|winter|glaciers?|frozen|hockey|bobsled|husky|malamute|"
        r"ptarmigan|arctic fox|dog ?sled",
    ),
    Thing(
        "a ball",
        "balls?",
        r"\w+balls?|soccer|tennis|golf|rugby|toys?|catch\w*|caught|juggl\w*|bats?|batters?|bowling|racket|pool table",
    ),
    Thing(
        "grass",
        r"grass|grasses|grassy|lawns?|meadows?",
        r"fields?|parks?|yards?|backyards?|gardens?|hills?|hillside|pastures?|outside|outdoors|golf\w*|soccer|"
        r"football|baseball|frisbee|hay|farm|lawn mower|green|woods|forest|trail|path",
    ),
    Thing(
        "a bicycle",
        r"bicycles?|(?<!dirt[ -])bikes?|bicyclists?|cyclists?",
        r"bikers?|dirt[ -]bikes?|bmx|unicycle|tricycle|motor\w*|pedal\w*|wheelie",
    ),
    Thing(
        "a car",
        _CARS,
        r"cars?|vans?|trucks?|pickup|vehicles?|traffic|driv\w+|park(?:ed|ing)|garage|rac(?:e|er|ing)|streets?|roads?|"
        r"highways?|city|grille|wreck|recreational",
    ),
    Thing(
        "rocks",
        r"rocks?(?! (?:band|concert|star|music))|boulders?|cliffs?|rocky",
        r"stones?|mountains?|climb\w*|hik\w*|canyons?|caves?|shores?|beach|coast|gravel|walls?|hills?|promontory|coral",
    ),
    Thing(
        "a mountain",
        r"mountains?(?! bik\w+)",
        r"hills?|hillside|peaks?|cliffs?|rocks?|rocky|valleys?|climb\w*|hik\w*|summit|volcano|canyon|ski|skiing|"
        r"skiers?|overlook\w*|landscape|scenery|horizon|bighorn|promontory",
    ),
    Thing(
        "a beach",
        r"beach(?:es)?(?! (?:balls?|chairs?|wagon))|seashore",
        r"sand|sandy|ocean|sea|shores?|surf\w*|waves?|coast|island|lakeside|sandbar|promontory",
    ),
    Thing(
        "a street",
        r"streets?(?! (?:signs?|lamps?|lights?))|roads?",
        r"sidewalks?|city|traffic|crosswalk|pavement|alley|park(?:ed|ing)|bus|trucks?|downtown|urban|highways?|"
        rf"driv\w+|vehicles?|intersection|market|parade|vans?|pickup|streetcar|trolleybus|cyclists?|bikes?|biking|bikers?|{_CARS}",
    ),
    Thing(
        "a boat",
        r"\w*boats?|canoes?|kayaks?|gondolas?|catamarans?|trimarans?|yawls?|schooners?",
        r"ships?|rafts?|rafting|liners?|paddl\w+|row(?:s|ing)|sail\w*|docks?|piers?|harbou?r|boathouse|pirate|"
        r"submarine|aircraft carrier",
    ),
    Thing(
        "a swimming pool",
        r"pools?(?! (?:tables?|of|cue))",
        r"swim\w*|div(?:es?|ing|ers?)|slides?|inflatable|splash\w*|water|bathing|tub",
    ),
)
