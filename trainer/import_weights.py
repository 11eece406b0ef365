"""`livemoments import-weights`: published R2-Tuning weights into a checkpoint of ours."""

import argparse
from pathlib import Path

from rich.console import Console

from kernels.errors import InputError
from models.checkpoint import Provenance, save_checkpoint
from models.errors import ModelError
from models.published import load_published, to_causal

_BACKBONE = "openai/clip-vit-base-patch32"  # what the published models were trained on, at 0.5 frames a second
_EMBEDDING = 512
_HOP_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=Path, metavar="FILE", help="r2_tuning_*.pth as published")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint (.safetensors)")
    parser.add_argument(
        "--causal",
        action="store_true",
        help="as the beginning of a causal model; without it the model is the published one, for recorded files",
    )
    parser.add_argument(
        "--window", type=int, default=32, metavar="W", help="with --causal: windows that a step sees (default 32)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        model = load_published(args.weights)
        if args.causal:
            model = to_causal(model, window=args.window, embedding=_EMBEDDING)
        source = f"imported from {args.weights.name}" + (", not trained as causal" if args.causal else "")
        save_checkpoint(args.out, model, Provenance(source, _BACKBONE, _HOP_S))
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
