"""Captioned clips and photos on disk, and the three sets they are dealt into.

DIR of clips: captions.csv (clip, caption) beside <clip>.mp4. DIR of photos: flickr/captions.csv (image, caption;
several lines per image) beside the images, and imagenet/<wnid>_<class_name>.jpg.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import InputError
from trainer.render import Kind

SEPARATELY_SCORED = ("car-detection", "one-by-one-person-detection")
"""Clips that are recordings with true moments of their own (streams.jsonl): splices leave them out."""

SPLITS = ("train", "val", "test")
PHOTO_SHARES = (60, 15, 25)  # of SPLITS, percent
CLIP_SHARES = (7, 2, 4)  # of 13, which are all that there are for splices


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


def part(library: Library, split: str) -> Library:
    """What one of SPLITS may show. The three share nothing and are together everything.

    Photos are dealt by their own name alone, so that new ones move no other. Clips are dealt by rank, since a dozen
    dealt singly could leave a set without any: other clips, or another `exclude`, deal all of them anew.
    """
    index = SPLITS.index(split)
    low, high = sum(PHOTO_SHARES[:index]), sum(PHOTO_SHARES[: index + 1])
    captioned, named = (
        tuple(item for item in items if low <= _hash(item) % 100 < high) for items in (library.captioned, library.named)
    )
    first, last = (
        round(len(library.clips) * sum(CLIP_SHARES[:count]) / sum(CLIP_SHARES)) for count in (index, index + 1)
    )
    kept = sorted(library.clips, key=_hash)[first:last]
    return Library(tuple(item for item in library.clips if item in kept), captioned, named)


def _hash(item: Item) -> int:
    """Of the file's name alone; the same on every machine, unlike hash()."""
    return int.from_bytes(hashlib.sha256(item.path.name.encode()).digest())
