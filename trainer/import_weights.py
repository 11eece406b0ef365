"""`livemoments import-weights`: published R2-Tuning weights into a checkpoint of ours."""

import argparse
from pathlib import Path

from rich.console import Console

from kernels.errors import InputError
from models.checkpoint import Provenance, save_checkpoint
from models.errors import ModelError
from models.published import load_published, to_causal

_BACKBONE = "openai/clip-vit-base-patch32"  # what the published models were trained on
_WIDTHS = 768, 512  # of its image and text tokens
_EMBEDDING = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        type=Path,
        metavar="FILE",
        help="r2_tuning_*.pth as published: the moment retrieval models (QVHighlights, Ego4D, Charades-STA, TACoS)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint (.safetensors)")
    parser.add_argument(
        "--causal",
        action="store_true",
        help="as the beginning of a causal model; without it the model is the published one, for recorded files",
    )
    parser.add_argument("--window", type=int, metavar="W", help="with --causal: windows that a step sees (default 32)")
    parser.add_argument(
        "--hop",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds between the windows it was trained on: 2 (default), 1 for Charades-STA",
    )


def run(args: argparse.Namespace) -> int:
    if args.window is not None and not args.causal:
        raise InputError("--window belongs to --causal: the published model sees a whole recording")
    if not 0.01 <= args.hop <= 60:
        raise InputError(f"--hop must be between 0.01 and 60 seconds, got {args.hop:g}")
    try:
        model = load_published(args.weights)
        widths = model.config.video_width, model.config.text_width
        if widths != _WIDTHS:
            raise InputError(f"{args.weights} reads features {widths} wide, those of CLIP ViT-B/32 are {_WIDTHS}")
        if args.causal:
            model = to_causal(model, window=args.window or 32, embedding=_EMBEDDING)
        source = f"imported from {args.weights.name}" + (", not trained as causal" if args.causal else "")
        save_checkpoint(args.out, model, Provenance(source, _BACKBONE, args.hop))
    except ModelError as error:
        raise InputError(str(error)) from None
    size = sum(value.numel() for value in model.parameters()) / 1e6
    console = Console(highlight=False)
    console.print(f"{args.out}: mode {model.config.mode}, {size:.1f} M parameters", soft_wrap=True)
    if args.causal:
        console.print(
            "Published weights do not transfer to causal as they are: train before you use it.", soft_wrap=True
        )
    return 0
