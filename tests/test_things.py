"""Generic queries follow from captions and class names; streams ask a few of them."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from trainer.library import Item, Library, load
from trainer.metrics import Truth, read_jsonl
from trainer.render import Kind, Segment
from trainer.splices import main, plan, truths, with_things
from trainer.things import THINGS, Thing, ask

DOG, WATER, BALL, MAN, CAR = (
    next(thing for thing in THINGS if thing.query == query) for query in ("a dog", "water", "a ball", "a man", "a car")
)


def photo(name: str, *texts: str) -> Item:
    return Item(Kind.PHOTO, Path(name), texts)


def test_the_table_is_sound() -> None:
    queries = [thing.query for thing in THINGS]
    assert len(set(queries)) == len(queries)
    for thing in THINGS:
        assert thing.in_captions([thing.query]) is True
        assert thing.in_captions(["nothing of the kind"]) is False


@pytest.mark.parametrize(
    ("thing", "captions", "truth"),
    [
        (DOG, ["Two dogs run", "a puppy", "x", "y", "z"], True),
        (DOG, ["A dog", "x", "y", "z", "u"], None),
        (DOG, ["dogma", "hotdog", "x", "y", "z"], False),
        (DOG, ["a woman and a dog"], True),  # the only caption of a clip
        (MAN, ["A man .", "the men", "x"], True),
        (MAN, ["two people", "x", "y"], None),
        (MAN, ["a woman", "women", "manly"], False),
        (WATER, ["water bottles on a table"], None),
        (CAR, ["car-shaped strollers", "x"], None),
    ],
)
def test_captions_tell(thing: Thing, captions: list[str], truth: bool | None) -> None:
    assert thing.in_captions(captions) is truth


@pytest.mark.parametrize(
    ("thing", "name", "truth", "assumed"),
    [
        (BALL, "n1_a rugby ball", True, True),
        (WATER, "n1_a water bottle", None, None),
        (WATER, "n1_an abacus", None, False),
        (DOG, "n1_an Eskimo dog", True, True),
        (DOG, "n02085620_a Chihuahua", True, True),
        (DOG, "n02113978_a Mexican hairless", True, True),
        (DOG, "n02114367_a timber wolf", None, False),
        (CAR, "n1_a sports car", True, True),
        (CAR, "n1_a freight car", None, None),
        (CAR, "n1_a car mirror", None, None),
    ],
)
def test_class_names_tell(thing: Thing, name: str, truth: bool | None, assumed: bool | None) -> None:
    item = photo(f"{name}.jpg", name.partition("_")[2])
    assert thing.in_class(item, False) is truth
    assert thing.in_class(item, True) is assumed


DOGS = photo("d", "a dog", "a dog")
MAYBE = photo("m", "a dog", "a cat")
CAT = photo("c", "a cat", "a cat")
CLASS = photo("n1_abacus.jpg", "an abacus")
SMALL = Library((), (DOGS, MAYBE, CAT), (CLASS,))


def segments(*shown: tuple[Item | None, int]) -> list[Segment]:
    return [
        Segment(Kind.GREY if item is None else item.kind, frames, item.path if item else None) for item, frames in shown
    ]


def test_windows_are_where_it_is_shown_and_ignored_where_nobody_knows() -> None:
    shown = segments((DOGS, 10), (DOGS, 5), (MAYBE, 10), (CAT, 30), (CLASS, 5), (None, 20), (DOGS, 15), (CLASS, 5))
    (asked,) = ask(shown, SMALL, Random(0))
    assert (asked.query, asked.windows) == ("a dog", ((0, 15), (80, 95)))
    assert asked.ignored == ((15, 25), (55, 60), (95, 100))
    (asked,) = ask(shown, SMALL, Random(0), assume_absent=True)
    assert (asked.windows, asked.ignored) == (((0, 15), (80, 95)), ((15, 25),))
    assert not ask(shown, SMALL, Random(0), besides=("a dog",))


@pytest.mark.parametrize(("dogs", "asked"), [(4, 0), (5, 1), (60, 1), (61, 0)])
def test_only_what_is_neither_rare_nor_common_is_asked(dogs: int, asked: int) -> None:
    assert len(ask(segments((DOGS, dogs), (None, 100 - dogs)), SMALL, Random(0))) == asked


def test_at_most_four_are_asked_and_the_seed_draws_them() -> None:
    item = photo("p", "a man, a dog, a horse, a bird, snow, grass and a ball on the beach")
    shown, library = segments((item, 30), (None, 70)), Library((item,), (), ())
    draws = [[asked.query for asked in ask(shown, library, Random(seed))] for seed in range(5)]
    assert draws[0] == [asked.query for asked in ask(shown, library, Random(0))]
    assert all(len(set(draw)) == 4 for draw in draws) and any(a != b for a, b in pairwise(draws))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A clip, 40 photos of dogs, balls or neither, and 10 photos with a class name."""
    clips, photos = tmp_path / "clips", tmp_path / "photos"
    for folder in (clips, photos / "flickr", photos / "imagenet"):
        folder.mkdir(parents=True)
    (clips / "captions.csv").write_text("clip,caption\none,a man on a bench\n")
    (clips / "one.mp4").touch()
    lines = ["image,caption"]
    for number in range(40):
        Image.new("RGB", (32, 24)).save(photos / "flickr" / f"{number}.jpg")
        what = ("a dog", "a ball", "a chair")[number % 3]
        lines += [f"{number}.jpg,{number}: {what} {how} ." for how in ("stands", "rolls", "shines")]
    (photos / "flickr" / "captions.csv").write_text("\n".join(lines))
    for number in range(10):
        Image.new("RGB", (24, 32)).save(photos / "imagenet" / f"n{number}_abacus.jpg")
    return clips, photos


@pytest.mark.parametrize("assume_absent", [False, True])
def test_a_stream_with_things_is_the_same_stream(
    folders: tuple[Path, Path], assume_absent: bool, tmp_path: Path
) -> None:
    library = load(*folders)
    plain = plan(library, streams=2, seed=1)
    asking = with_things(plain, library, seed=1, assume_absent=assume_absent)
    assert asking == with_things(plain, library, seed=1, assume_absent=assume_absent)
    assert [splice.segments for splice in asking] == [splice.segments for splice in plain]
    lines = truths(asking)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_jsonl(path, Truth)) == len(lines), "each line has a qid of its own"

    def told(line: dict[str, object]) -> dict[str, object]:
        return {key: value for key, value in line.items() if key != "qid"}

    assert [told(line) for line in lines if "source" in line] == [told(line) for line in truths(plain)]
    things = [line for line in lines if "source" not in line]
    assert {line["query"] for line in things} >= {"a dog", "a ball"}
    for line in things:
        assert 0.05 <= sum(end - start for start, end in line["relevant_windows"]) / line["duration"] <= 0.6
        spans = sorted(line["relevant_windows"] + line["ignored_windows"])
        assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "nothing is both true and unknown"
        assert bool(line["ignored_windows"]) == (not assume_absent), "class names are all that leaves dogs open here"
        assert len(line["relevant_clip_ids"]) == len(line["saliency_scores"]) > 0


def test_assuming_absence_without_things_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, photos = map(str, folders)
    assert main(["--clips", clips, "--photos", photos, "--out", str(tmp_path / "out"), "--assume-absent"]) == 2
    error = capsys.readouterr().err
    assert "--things" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
