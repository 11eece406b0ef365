"""Long streams whose moments are known, spliced out of captioned clips and photos.

    python -m bench.splices --clips DIR --photos DIR --out DIR [--streams N] [--seconds S] [--seed K]

Each queried item is shown twice in its stream, among the others, unqueried photos and idle stretches. Its text
is true while it is shown and counts as false at any other time: another item that happens to answer it too is
counted as wrong, since nobody looked. Items are drawn by the seed from the whole folders. `load` and `plan` decide
what is shown when; bench.render makes the pictures.

DIR of clips: captions.csv (clip, caption) beside <clip>.mp4. DIR of photos: flickr/captions.csv (image, caption;
several lines per image) beside the images, and imagenet/<wnid>_<class_name>.jpg.
"""

import argparse
import csv
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.render import FPS, IDLE, Kind, Segment, render
from kernels.errors import InputError, LivemomentsError

SEPARATELY_SCORED = ("car-detection", "one-by-one-person-detection")
"""Clips that are recordings with true moments of their own (streams.jsonl): splices leave them out."""

SHOWINGS = 2
SHOWING_S = (8.0, 20.0)  # triangular with its peak at the low end: 12 s in the mean
FILLER_S = (3.0, 10.0)
SHOWN_SHARE = (0.7, 0.9)  # of a stream's time; the rest is filler
SECONDS_PER_QUERY = 30  # 24 s of them true in the mean, which leaves a fifth of the stream to fillers
CLIP_S = 2  # QVHighlights' unit of saliency


@dataclass(frozen=True)
class Item:
    """Something that can be shown and asked for."""

    kind: Kind  # CLIP or PHOTO
    path: Path
    texts: tuple[str, ...]  # each true of it


@dataclass(frozen=True)
class Library:
    clips: tuple[Item, ...]
    captioned: tuple[Item, ...]
    named: tuple[Item, ...]


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

    @property
    def frames(self) -> int:
        return sum(segment.frames for segment in self.segments)


def load(clips: Path, photos: Path, exclude: Sequence[str] = SEPARATELY_SCORED) -> Library:
    """Everything that may be shown, in a fixed order.

    Raises:
        InputError: a folder, a table or a file that a table names is missing, or a table is malformed.
    """
    flickr, imagenet = photos / "flickr", photos / "imagenet"
    for folder in (clips, flickr, imagenet):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    moving = [
        Item(Kind.CLIP, path, texts)
        for path, texts in _captions(clips, "clip", ".mp4").items()
        if path.stem not in exclude
    ]
    captioned = [Item(Kind.PHOTO, path, texts) for path, texts in _captions(flickr, "image", "").items()]
    named = [
        Item(Kind.PHOTO, path, (_with_article(path.stem.partition("_")[2].replace("_", " ")),))
        for path in sorted(imagenet.glob("*_*.jpg"))
    ]
    return Library(tuple(moving), tuple(captioned), tuple(named))


def _with_article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _captions(folder: Path, column: str, suffix: str) -> dict[Path, tuple[str, ...]]:
    table = folder / "captions.csv"
    found: dict[Path, tuple[str, ...]] = {}
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if not {column, "caption"} <= set(reader.fieldnames or ()):
                raise InputError(f"{table}: the first line must name the columns {column} and caption")
            for row in reader:
                # Flickr8k's captions end in " .", which nobody types.
                name, text = (row[column] or "").strip(), (row["caption"] or "").strip(" .")
                if None in row or not name or not text:
                    raise InputError(f"{table}:{reader.line_num}: expected {','.join(reader.fieldnames or ())}")
                path = folder / (name + suffix)
                if not path.is_file():
                    raise InputError(f"{table}:{reader.line_num}: {path.name} is not in the folder")
                found[path] = (*found.get(path, ()), text)
    except OSError as error:
        raise InputError(f"{table}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not a table: {error}") from None
    return found


def plan(library: Library, *, streams: int = 15, seconds: int = 330, seed: int = 0, fps: int = FPS) -> list[Splice]:
    """Choose items and times; the same arguments give the same plan.

    A stream asks one query per 30 s: two or three clips (each again once all had their turn), one or two class
    names, and captioned photos for the rest. No queried photo appears in two streams. Boundaries lie anywhere on
    the frame grid.

    Raises:
        InputError: fewer clips or photos than that takes, or `streams` or `seconds` out of range.
    """
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
        _splice(f"splice_{index:02d}", items, distractors, seconds * fps, fps, rng)
        for index, items in enumerate(chosen)
    ]


def _splice(
    vid: str, items: list[Item], distractors: Iterator[Item], frames: int, fps: int, rng: random.Random
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
    asked = tuple(Asked(rng.choice(item.texts), item, tuple(windows[item.path])) for item in items)
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


def truths(splices: Sequence[Splice]) -> list[dict[str, Any]]:
    """The lines of a QVHighlights-style jsonl, times in seconds, plus `source`: the file that is shown.

    A 2 s clip is relevant when the item is shown for at least half of it.
    """
    lines = []
    for qid, (splice, asked) in enumerate(((s, a) for s in splices for a in s.asked), start=1):
        fps, clip = splice.fps, CLIP_S * splice.fps
        shown = np.zeros(splice.frames, dtype=bool)
        for start, end in asked.windows:
            shown[start:end] = True
        count = splice.frames // clip
        relevant = np.flatnonzero(shown[: count * clip].reshape(count, clip).mean(axis=1) >= 0.5).tolist()
        lines.append(
            {
                "qid": qid,
                "query": asked.query,
                "vid": splice.vid,
                "duration": round(splice.frames / fps, 3),
                "relevant_windows": [[round(s / fps, 3), round(e / fps, 3)] for s, e in asked.windows],
                "relevant_clip_ids": relevant,
                "saliency_scores": [[4, 4, 4]] * len(relevant),
                "source": str(Path(*asked.item.path.parts[-2:])),
            }
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.splices", description="Make long streams with known moments."
    )
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="captions.csv and <clip>.mp4")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="flickr/ and imagenet/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the mp4 files and splices.jsonl")
    parser.add_argument("--streams", type=int, default=15, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=330, metavar="S", help="length of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="(default: %(default)s)")
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=SEPARATELY_SCORED,
        metavar="CLIP",
        help="clips to leave out (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        library = load(options.clips, options.photos, options.exclude)
        splices = plan(library, streams=options.streams, seconds=options.seconds, seed=options.seed)
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
    names = sum("imagenet/" in line["source"] for line in lines)
    print(
        f"{len(splices)} streams, {len(lines)} queries ({len(lines) - names} captions, {names} class names), "
        f"mean prior {prior:.3f}, in {out}"
    )


if __name__ == "__main__":
    sys.exit(main())
