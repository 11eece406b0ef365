"""Which data a command works on: the options, and the dataset that they name."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kernels.errors import InputError
from trainer.annotated import load_annotated
from trainer.dataset import Dataset
from trainer.tvstream import load_tvstream

TVSTREAM_HOP_S = 2.0
"""Keyframes come every 3.3 s: shorter hops would hold each of them for longer, and windows of 2 s blend neighbours."""


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="of `livemoments extract`, of the tvstream form, or of files <vid>.npy, .npz, .safetensors; given more "
        "than once, features are joined (CLIP and SlowFast)",
    )
    annotations = "annotations, QVHighlights style; the tvstream form brings its own"
    parser.add_argument("--train", type=Path, metavar="FILE", help=annotations)
    parser.add_argument("--val", type=Path, metavar="FILE", help="the same, to choose the best epoch by")
    parser.add_argument(
        "--text", type=Path, metavar="DIR", help="features of the queries by qid, where they lie apart from the videos'"
    )
    parser.add_argument(
        "--backbone", metavar="NAME", help="what made features that do not say so: lite, a CLIP on the hub, a folder"
    )
    parser.add_argument(
        "--layers", type=int, metavar="K", help="how many layers of the backbone lie in flattened features"
    )
    parser.add_argument(
        "--hop", type=float, metavar="S", help="seconds between windows, of features that do not say so (default 2)"
    )


def open_dataset(args: argparse.Namespace, splits: Sequence[str] = ("train", "val")) -> Dataset:
    """Raises InputError."""
    folders: list[Path] = args.features
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    if (folders[0] / "index.json").is_file():
        if args.train or args.val or args.text or len(folders) > 1:
            raise InputError(
                f"{folders[0]} holds its own truth and texts: give it alone, without --train, --val, --text"
            )
        return load_tvstream(folders[0], TVSTREAM_HOP_S if args.hop is None else args.hop, splits)
    if not (args.train and args.val):
        raise InputError(f"{folders[0]} holds no truth (no index.json): give --train and --val, QVHighlights style")
    annotations = {"train": args.train, "val": args.val}
    return load_annotated(annotations, folders, args.text, args.hop, backbone=args.backbone, depth=args.layers)
