"""Long streams whose moments are known, spliced out of captioned clips and photos.

    python -m trainer.splices --clips DIR --photos DIR --out DIR [--streams N] [--seconds S] [--seed K]
        [--split train|val|test] [--captions N] [--things [--assume-absent]]

Each queried item is shown twice in its stream, among the others, unqueried photos and idle stretches. Its text
is true while it is shown and counts as false at any other time: another item that happens to answer it too is
counted as wrong, since nobody looked. Items are drawn by the seed from the whole folders, or from one of the three
sets they are dealt into. `plan` decides what is shown when; trainer.library has what can be shown, trainer.things the
generic queries, trainer.render the pictures.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernels.errors import InputError, LivemomentsError
from trainer.library import SEPARATELY_SCORED, SPLITS, Item, Library, load, part
from trainer.render import FPS, IDLE, Kind, Segment, render
from trainer.things import AskedThing, ask

SHOWINGS = 2
SHOWING_S = (8.0, 20.0)  # triangular with its peak at the low end: 12 s in the mean
FILLER_S = (3.0, 10.0)
SHOWN_SHARE = (0.7, 0.9)  # of a stream's time; the rest is filler
SECONDS_PER_QUERY = 30  # 24 s of them true in the mean, which leaves a fifth of the stream to fillers
CLIP_S = 2  # QVHighlights' unit of saliency


@dataclass(frozen=True)
class Asked:
    """One query of a stream, with the frames [start, end) that answer it."""

    query: str
    item: Item
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Splice:
    vid: str
    fps: int
    segments: tuple[Segment, ...]
    asked: tuple[Asked, ...]
    things: tuple[AskedThing, ...] = ()

    @property
    def frames(self) -> int:
        return sum(segment.frames for segment in self.segments)


def plan(
    library: Library,
    *,
    streams: int = 15,
    seconds: int = 330,
    seed: int = 0,
    fps: int = FPS,
    captions: int = 1,
    name: str = "splice",
) -> list[Splice]:
    """Choose items and times; the same arguments give the same plan. Streams are called <name>_00 and so on.

    A stream asks for one item per 30 s: two or three clips (each again once all had their turn), one or two class
    names, and captioned photos for the rest, each by up to `captions` of its texts. No queried photo appears in two
    streams. Boundaries lie anywhere on the frame grid.

    Raises:
        InputError: fewer clips or photos than that takes, or `streams`, `seconds` or `captions` out of range.
    """
    if captions < 1:
        raise InputError(f"at least 1 caption of each item, got {captions}")
    queries = seconds // SECONDS_PER_QUERY
    if streams < 1 or queries < SHOWINGS:
        raise InputError(f"at least 1 stream of {SHOWINGS * SECONDS_PER_QUERY} s, got {streams} of {seconds} s")
    if not library.clips:
        raise InputError("no clips to splice")
    rng = random.Random(seed)
    clips = itertools.cycle(_shuffled(library.clips, rng))
    captioned, named = _shuffled(library.captioned, rng), _shuffled(library.named, rng)
    chosen: list[list[Item]] = []
    for index in range(streams):
        moving = min(2 + (index % 5 < 3), max(1, queries // 3), len(library.clips))
        names = min(1 + index % 2, queries - moving)
        items = [next(clips) for _ in range(moving)]
        for pool, wanted in ((named, names), (captioned, queries - moving - names)):
            if len(pool) < wanted:
                raise InputError(f"not enough photos for {streams} streams of {seconds} s: ask for fewer, or shorter")
            items += [pool.pop() for _ in range(wanted)]
        chosen.append(items)
    rest = _shuffled(captioned + named, rng)
    if not rest:
        raise InputError(f"not enough photos for {streams} streams of {seconds} s: none is left to distract")
    distractors = itertools.cycle(rest)
    return [
        _splice(f"{name}_{index:02d}", items, distractors, seconds * fps, fps, captions, rng)
        for index, items in enumerate(chosen)
    ]


def _splice(
    vid: str,
    items: list[Item],
    distractors: Iterator[Item],
    frames: int,
    fps: int,
    captions: int,
    rng: random.Random,
) -> Splice:
    order = _shuffled(items * SHOWINGS, rng)
    while any(a is b for a, b in itertools.pairwise(order)):
        rng.shuffle(order)
    low, high = SHOWING_S
    lengths: list[int] = []
    fillers: list[int] = []
    # Few draws miss: the share has room for two standard deviations either way.
    while not fillers or len(fillers) > len(order) + 1:
        lengths = [round(rng.triangular(low, high, low) * fps) for _ in order]
        if SHOWN_SHARE[0] * frames <= sum(lengths) <= SHOWN_SHARE[1] * frames:
            fillers = _split(frames - sum(lengths), round(FILLER_S[0] * fps), round(FILLER_S[1] * fps), rng)
    gaps = dict(zip(rng.sample(range(len(order) + 1), len(fillers)), fillers, strict=True))

    segments: list[Segment] = []
    windows: dict[Path, list[tuple[int, int]]] = {item.path: [] for item in items}
    at = 0
    for position in range(len(order) + 1):
        if position in gaps:
            segments.append(_filler(gaps[position], distractors, rng))
            at += gaps[position]
        if position < len(order):
            item, length = order[position], lengths[position]
            segments.append(Segment(item.kind, length, item.path, rng.getrandbits(32)))
            windows[item.path].append((at, at + length))
            at += length
    asked = tuple(
        Asked(text, item, tuple(windows[item.path]))
        for item in items
        # Two people may have written the same.
        for text in dict.fromkeys(rng.sample(item.texts, min(captions, len(item.texts))))
    )
    return Splice(vid, fps, tuple(segments), asked)


def _split(total: int, low: int, high: int, rng: random.Random) -> list[int]:
    """Random parts of `low` to `high` (>= 2 low) that add up to `total` (>= low)."""
    parts = []
    while total > high:
        parts.append(rng.randint(low, min(high, total - low)))
        total -= parts[-1]
    return [*parts, total]


def _filler(frames: int, distractors: Iterator[Item], rng: random.Random) -> Segment:
    if rng.random() < 0.5:
        return Segment(Kind.PHOTO, frames, next(distractors).path, rng.getrandbits(32))
    return Segment(rng.choice(IDLE), frames, seed=rng.getrandbits(32))


def _shuffled(items: Sequence[Item], rng: random.Random) -> list[Item]:
    return rng.sample(items, len(items))


def with_things(
    splices: Sequence[Splice], library: Library, *, seed: int = 0, assume_absent: bool = False
) -> list[Splice]:
    """The same streams, which also ask a few generic queries."""
    rng = random.Random(seed)
    return [
        replace(
            splice,
            things=tuple(
                ask(
                    splice.segments,
                    library,
                    rng,
                    besides={asked.query for asked in splice.asked},
                    assume_absent=assume_absent,
                )
            ),
        )
        for splice in splices
    ]


def with_fillers(splices: Sequence[Splice], library: Library, *, captions: int = 1) -> list[Splice]:
    """The same streams, which also ask for the photos between the items, each by the first `captions` of its texts.

    For training: it doubles the photos that something is known of. A photo that fills two gaps is true in both.
    """
    known = {item.path: item for item in (*library.captioned, *library.named)}
    asking = []
    for splice in splices:
        taken = {asked.item.path for asked in splice.asked}
        texts = {asked.query for asked in splice.asked}
        more: dict[str, Asked] = {}
        at = 0
        for segment in splice.segments:
            window = at, at + segment.frames
            at += segment.frames
            if segment.path is None or segment.path in taken or (item := known.get(segment.path)) is None:
                continue
            for text in item.texts[:captions]:  # two photos of ants answer the same
                earlier = more[text].windows if text in more else ()
                if text not in texts and window not in earlier:
                    more[text] = Asked(text, item, (*earlier, window))
        asking.append(replace(splice, asked=(*splice.asked, *more.values())))
    return asking


def truths(splices: Sequence[Splice]) -> list[dict[str, Any]]:
    """The lines of a QVHighlights-style jsonl, times in seconds, the things of a stream after its items.

    An item's line has `source`, the file that is shown; a thing's has `ignored_windows`, the times at which nobody
    knows. A 2 s clip is relevant when the answer is shown for at least half of it.
    """
    lines: list[dict[str, Any]] = []
    for splice in splices:
        for asked in splice.asked:
            source = str(Path(*asked.item.path.parts[-2:]))
            lines.append(_line(len(lines) + 1, splice, asked.query, asked.windows) | {"source": source})
        for thing in splice.things:
            ignored = _seconds(thing.ignored, splice.fps)
            lines.append(_line(len(lines) + 1, splice, thing.query, thing.windows) | {"ignored_windows": ignored})
    return lines


def _line(qid: int, splice: Splice, query: str, windows: Sequence[tuple[int, int]]) -> dict[str, Any]:
    clip = CLIP_S * splice.fps
    shown = np.zeros(splice.frames, dtype=bool)
    for start, end in windows:
        shown[start:end] = True
    count = splice.frames // clip
    relevant = np.flatnonzero(shown[: count * clip].reshape(count, clip).mean(axis=1) >= 0.5).tolist()
    return {
        "qid": qid,
        "query": query,
        "vid": splice.vid,
        "duration": round(splice.frames / splice.fps, 3),
        "relevant_windows": _seconds(windows, splice.fps),
        "relevant_clip_ids": relevant,
        "saliency_scores": [[4, 4, 4]] * len(relevant),
    }


def _seconds(windows: Sequence[tuple[int, int]], fps: int) -> list[list[float]]:
    return [[round(start / fps, 3), round(end / fps, 3)] for start, end in windows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.splices", description="Make long streams with known moments."
    )
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="captions.csv and <clip>.mp4")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="flickr/ and imagenet/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the mp4 files and splices.jsonl")
    parser.add_argument("--streams", type=int, default=15, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=330, metavar="S", help="length of each (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="K", help="draws items, times and texts (default: %(default)s)"
    )
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=SEPARATELY_SCORED,
        metavar="CLIP",
        help="clips to leave out, the same ones for each split (default: %(default)s)",
    )
    parser.add_argument(
        "--split", choices=SPLITS, help="show and ask for the clips and photos of one of three sets that share none"
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=1,
        metavar="N",
        help="ask for each item by up to N of its captions, each a query of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--fillers", action="store_true", help="ask for the photos between the items too, by --captions of theirs"
    )
    parser.add_argument(
        "--things",
        action="store_true",
        help='also ask up to 4 generic queries a stream ("a dog", "snow"), true where captions say so; '
        "ignored_windows in splices.jsonl are where nobody knows",
    )
    parser.add_argument(
        "--assume-absent",
        action="store_true",
        help="with --things: what the name of an imagenet photo does not suggest is not in it (some of it is: "
        "for training only)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.assume_absent and not options.things:
            raise InputError("--assume-absent is about --things: ask for these too")
        library = load(options.clips, options.photos, options.exclude)
        if options.split:
            library = part(library, options.split)
        splices = plan(
            library,
            streams=options.streams,
            seconds=options.seconds,
            seed=options.seed,
            captions=options.captions,
            name=options.split or "splice",
        )
        if options.fillers:
            splices = with_fillers(splices, library, captions=options.captions)
        if options.things:
            splices = with_things(splices, library, seed=options.seed, assume_absent=options.assume_absent)
        write(splices, options.out)
    except LivemomentsError as error:
        print(f"splices: {error}", file=sys.stderr)
        return 2
    return 0


def write(splices: Sequence[Splice], out: Path) -> None:
    """Render every stream into `out` and, once all are there, list their queries in splices.jsonl."""
    lines = truths(splices)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "splices.jsonl").unlink(missing_ok=True)  # an older one would not describe the new videos
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=sum(splice.frames for splice in splices))
        for splice in splices:
            progress.update(task, description=splice.vid)
            render(
                splice.segments,
                out / f"{splice.vid}.mp4",
                fps=splice.fps,
                advance=lambda: progress.advance(task),
            )
    (out / "splices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    true = sum(end - start for line in lines for start, end in line["relevant_windows"])
    prior = true / sum(line["duration"] for line in lines)
    things = sum(len(splice.things) for splice in splices)
    names = sum("imagenet/" in line.get("source", "") for line in lines)
    kinds = f"{len(lines) - names - things} captions, {names} class names" + (f", {things} things" if things else "")
    print(f"{len(splices)} streams, {len(lines)} queries ({kinds}), mean prior {prior:.3f}, in {out}")


if __name__ == "__main__":
    sys.exit(main())
