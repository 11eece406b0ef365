"""What each part of the model and of its training is worth: one run a variant, then the test split once.

    python -m bench.ablation tvstream --features DIR --out DIR [--jobs N] [--test]
    python -m bench.ablation lite --features DIR --train FILE --val FILE --streams FILE --out DIR [--jobs N] [--test]

Each run is a `livemoments train` in a process of its own, in a folder of its own under `--out`; what is there is kept,
and a run that was cut off goes on. Choices are made on val; `--test` scores the test split with `livemoments bench
accuracy`. The table is written to val.json or test.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from kernels.errors import InputError, LivemomentsError
from stream.output import write


@dataclass(frozen=True)
class Variant:
    name: str
    options: str = ""
    seeds: int = 1


SUITES = {
    "tvstream": (
        Variant("causal, W = 32", seeds=3),
        Variant("no memory, W = 1", "--window 1", seeds=3),
        Variant("W = 8", "--window 8"),
        Variant("W = 75", "--window 75"),
        Variant("clip mode, sees ahead", "--mode clip"),
        Variant("Rep/MR", "--refine before", seeds=3),
        Variant("Rep/MR, clip alone", "--refine before --inputs clip"),
        Variant("Rep/MR, query alone", "--refine before --inputs query"),
        Variant("Rep+MR", "--refine joint --refine-weight 0.1"),
    ),
    "lite": (
        Variant("K = 4"),
        Variant("K = 1", "--depth 1"),
        Variant("K = 4, Rep/MR", "--refine before"),
        Variant("K = 1, Rep/MR", "--depth 1 --refine before"),
    ),
}
RECIPES = {
    "tvstream": "--width 128 --epochs 6 --lr 3e-3 --dropout 0.2 --weight-saliency 1 --weight-batch 0 --zero-shot 4.5",
    "lite": "--width 128 --window 16 --length 80 --crops 4 --queries 8 --piece 8 --align 300 --epochs 4 --lr 1e-3 "
    "--dropout 0.5 --weight-saliency 1 --weight-video 1 --zero-shot 0.15 --refine-epochs 1",
}
SHOWN = (
    "frame_ap",
    "frame_ap_seen",
    "frame_ap_unseen",
    "f1",
    "frame_recall",
    "mr_r1_50",
    "recall",
    "sd",
    "false_alarms_per_hour",
)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--features", type=Path, required=True, metavar="DIR")
    for split in ("train", "val"):
        parser.add_argument(f"--{split}", type=Path, metavar="FILE", help="of suite lite: annotations")
    parser.add_argument("--streams", type=Path, metavar="FILE", help="of suite lite: annotations of the test split")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, a thread each (default 1)")
    parser.add_argument("--only", metavar="TEXT", help="variants whose name holds TEXT")
    parser.add_argument("--test", action="store_true", help="score the test split too")
    args = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    try:
        variants = [variant for variant in SUITES[args.suite] if (args.only or "") in variant.name]
        runs = [(variant, seed) for variant in variants for seed in range(variant.seeds)]
        args.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            found = list(pool.map(lambda run: _measure(args, run[0], run[1], console), runs))
    except LivemomentsError as error:
        console.print(f"error: {error}")
        return 2
    rows: dict[str, list[dict[str, Any]]] = {}
    for (variant, _), result in zip(runs, found, strict=True):
        rows.setdefault("zero-shot", [result["zero-shot"]] if result.get("zero-shot") else [])
        rows.setdefault(variant.name, []).append(result["trained"])
    summary = {name: _summary(results) for name, results in rows.items() if results}
    _print(Console(highlight=False), summary, "test" if args.test else "val")
    split = "test" if args.test else "val"
    write(args.out / f"{split}.json", json.dumps({"split": split, "rows": summary} | environment(), indent=2) + "\n")
    return 0


def _measure(args: argparse.Namespace, variant: Variant, seed: int, console: Console) -> dict[str, Any]:
    out = args.out / f"{variant.name.replace(' ', '_').replace('/', '-')}_{seed}"
    data = ["--features", str(args.features)]
    if args.suite == "lite":
        data += ["--train", str(args.train), "--val", str(args.val)]
    options = [*RECIPES[args.suite].split(), *variant.options.split(), "--seed", str(seed)]
    out.mkdir(exist_ok=True)
    made = out / "command.json"
    if made.exists() and json.loads(made.read_text()) != [*data, *options]:
        raise InputError(f"{out} holds a run of other options: remove it, or choose another --out")
    made.write_text(json.dumps([*data, *options]))
    if not (out / "report.json").exists():
        resume = ["--resume"] if (out / "state.pt").exists() else []
        _call(["train", *data, "--out", str(out), *options, *resume], out.with_suffix(".log"))
        console.print(f"{variant.name}, seed {seed}: trained")
    if not args.test:
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report
    tested = out / "test.json"
    if not tested.exists():
        streams = ["--streams", str(args.streams)] if args.suite == "lite" else []
        command = ["bench", "accuracy", *data[:2], *streams, "--checkpoint", str(out / "best.safetensors")]
        command += ["--out", str(out / "queries.jsonl"), "--whole"]
        write(tested, _call(command, out.with_suffix(".test.log")).strip().splitlines()[-1])
        console.print(f"{variant.name}, seed {seed}: tested")
    result: dict[str, Any] = json.loads(tested.read_text())
    return result


def _call(arguments: list[str], log: Path) -> str:
    with log.open("a") as errors:
        # One thread: small tensors gain nothing from two, and two runs share the machine.
        done = subprocess.run(
            [sys.executable, "-m", "livemoments", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise InputError(f"livemoments {' '.join(arguments)} failed: see {log}")
    return done.stdout


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every measure that all have."""
    found: dict[str, Any] = {"seeds": len(results)}
    for name in results[0]:
        values = [result[name] for result in results if isinstance(result.get(name), int | float)]
        if len(values) == len(results):
            found[name] = float(np.mean(values))
            found[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def _print(console: Console, rows: dict[str, dict[str, Any]], split: str) -> None:
    table = Table(title=split, title_justify="left")
    table.add_column("variant")
    shown = [name for name in SHOWN if name in next(iter(rows.values()))]
    for name in shown:
        table.add_column(name, justify="right")
    for variant, row in rows.items():
        cells = []
        for name in shown:
            spread = row.get(f"{name}_std")
            cells.append("-" if name not in row else f"{row[name]:.3f}" + (f" ± {spread:.3f}" if spread else ""))
        table.add_row(variant, *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
