"""`livemoments build-engine`: a backbone, or a checkpoint, becomes a bundle that runs on this machine or another."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kernels.build import PRECISIONS, Part, build
from kernels.bundle import EMBEDDED, GPU_TARGETS, TARGETS, Manifest, check_place
from kernels.errors import InputError
from kernels.recipe import make_recipe
from kernels.tensorrt import CAPABILITIES, compute_capability, load_module
from models.errors import ModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the backbone: lite, clip (ViT-B/32 from the hub), another CLIP's name on the hub, or a local folder; "
        "with --checkpoint by default the one it was trained on",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained head, to go with the backbone")
    parser.add_argument(
        "--target", choices=TARGETS, default=TARGETS[0], help="what will run it (default onnxruntime, on a CPU)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="of weights and products (default: int8 on a CPU where it agrees with torch, fp16 on a GPU)",
    )
    parser.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help=f"tensorrt-rtx: of the GPUs to serve; may be repeated (default {', '.join(CAPABILITIES)})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle")


def run(args: argparse.Namespace) -> int:
    if args.model is None and args.checkpoint is None:
        raise InputError("nothing to build: give --model lite, --model DIR or --checkpoint FILE")
    if args.compute_capability and args.target != "tensorrt-rtx":
        raise InputError(
            "--compute-capability belongs to --target tensorrt-rtx: others serve the machine they are built on"
        )
    if args.out.resolve() == EMBEDDED and args.checkpoint is None:
        raise InputError(f"{args.out} is the embedded engine: without --checkpoint it would lose its trained head")
    precision, capabilities = args.precision or PRECISIONS[args.target][0], args.compute_capability or CAPABILITIES
    if precision not in PRECISIONS[args.target]:
        raise InputError(f"{args.target} is not built in {precision}, but in {', '.join(PRECISIONS[args.target])}")
    check_place(args.out.resolve())  # before minutes of work
    if args.target in GPU_TARGETS:
        module = load_module(args.target)
        for capability in capabilities if args.target == "tensorrt-rtx" else ():
            compute_capability(module, capability)
    errors = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    # Each engine is exported, checked and, for a GPU, compiled.
    steps = 3 + (5 if args.checkpoint else 2) * (3 if args.target in GPU_TARGETS else 2)
    try:
        with bar:
            task = bar.add_task("loading the weights", total=steps)

            def report(line: str) -> None:
                bar.update(task, description=line, advance=1)

            recipe = make_recipe(args.model, args.checkpoint)
            manifest, parts = build(recipe, args.target, precision, args.out, report, capabilities)
    except ModelError as error:
        raise InputError(str(error)) from None
    console = Console(highlight=False)
    _print(console, manifest, parts)
    console.print(_closing(args.out, manifest), soft_wrap=True)
    return 0


def _print(console: Console, manifest: Manifest, parts: Sequence[Part]) -> None:
    on_gpu = manifest.target in GPU_TARGETS
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("engine", "form"):
        table.add_column(column, no_wrap=True)
    for column in ("MB", "built, s", "worst cosine", "largest error", "torch, ms") + (() if on_gpu else ("ms", "x")):
        table.add_column(column, justify="right", no_wrap=True)
    for part in parts:
        speed = [] if part.ms is None else [f"{part.ms:.2f}", f"{part.torch_ms / part.ms:.1f}"]
        for output, (cosine, error) in part.agreement.items():
            table.add_row(output, "", "", "", f"{cosine:.6f}", f"{error:.1e}")
        cells = f"{part.bytes / 1e6:.1f}", f"{part.seconds:.1f}", "", "", f"{part.torch_ms:.2f}"
        table.add_row(f"[bold]{part.name}", part.form, *cells, *speed, end_section=True)
    console.width = max(console.width, 120)  # a table that is cut tells nothing
    console.print(table)


def _closing(out: Path, manifest: Manifest) -> str:
    size = sum(each["bytes"] for each in manifest.files.values())
    line = f"{out}: {size / 1e6:.1f} MB for {manifest.target}."
    if manifest.target in GPU_TARGETS:
        return (
            f"{line} The graphs agree with torch; the engines are held against it when they first meet a GPU "
            f"(compute capability {', '.join(manifest.compute_capabilities) or 'of this machine'})."
        )
    return f"{line} livemoments run SOURCE -q QUERY --engine {out}"
