"""`python -m bench.gpu`: all of ours that needs an NVIDIA GPU, held against its references on one, and then timed.

Kernels with fresh random inputs against numpy; the engines of every bundle against torch; what a head remembers on the
GPU against the same on the host. Times are those of the GPU, by CUDA events, beside torch and beside what the card
could do at best. Without a GPU it says so, and is done.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.gpu_kernels import Errors, check_kernels
from bench.roofline import Card, card_of
from kernels.agreement import PENDING, load_samples
from kernels.bundle import EMBEDDED, GPU_TARGETS, HeadShape, Manifest, load_manifest
from kernels.device import Device
from kernels.errors import BundleError
from kernels.gpu_runtime import GpuRuntime, check_capability
from kernels.head import Head, HostRows, Maps
from kernels.tensorrt import load_module

RESULTS = Path(__file__).parent / "results"
ROWS = (1, 10, 100, 1000, 10_000)
FRAMES = ((720, 1280), (1080, 1920))  # height, width
WARM_S = 1.5  # TensorRT-RTX compiles kernels for a shape while it runs others
STATE_WINDOWS, STATE_ERROR = 45, 1e-4


@dataclass
class Timing:
    """One work on the GPU."""

    name: str
    ms: float  # median
    p95_ms: float
    megabytes: float  # that have to be read and written at least
    half: bool  # fp16 arithmetic
    gflop: float | None = None  # of matrix products and convolutions; None where torch is not there to count
    least_ms: float = math.nan
    torch_ms: float | None = None
    compiled_ms: float | None = None


def check_bundle(folder: Path, device: Device, card: Card, rounds: int) -> dict[str, Any]:
    """Load, check and time one bundle; `unsupported` or `failed` say in a line why not."""
    found: dict[str, Any] = {"bundle": str(folder)}
    try:
        manifest = load_manifest(folder)
        found |= {"model": manifest.model, "target": manifest.target, "precision": manifest.precision}
    except BundleError as error:
        return found | {"failed": str(error)}
    try:
        if manifest.target not in GPU_TARGETS:
            raise BundleError(f"it is built for {manifest.target}")
        check_capability(folder, manifest, device.name, device.compute_capability)
        load_module(manifest.target)
    except BundleError as error:
        return found | {"unsupported": str(error)}
    try:
        # Whatever GPU it met before: it is this one that counts.
        runtime = GpuRuntime(folder, replace(manifest, parity=PENDING))
        found["parity"] = runtime.manifest.parity
        if manifest.head:
            found["state_error"] = apart = state_error(runtime, folder, manifest.head)
            if not apart <= STATE_ERROR:
                raise BundleError(f"rows on the GPU go other ways than on the host: saliencies are {apart:.1e} apart")
        timings = {each.name: each for each in time_bundle(runtime, folder, manifest, rounds)}
    except BundleError as error:
        return found | {"failed": str(error)}
    found["torch"] = beside_torch(timings, folder, manifest, rounds)
    for timing in timings.values():
        timing.least_ms = card.least_ms(timing.megabytes, timing.gflop, half=timing.half)
    runtime.close()
    return found | {"timings": [asdict(each) for each in timings.values()]}


def state_error(runtime: GpuRuntime, folder: Path, shape: HeadShape) -> float:
    """A head over many windows, rows coming and going, with its rows on the GPU and on the host: how far they part."""
    queries, windows = head_samples(runtime, folder)

    class Fetched:
        """The same engine for rows on the host."""

        inputs = runtime.graph("head").inputs

        def __call__(self, **inputs: Any) -> Mapping[str, Any]:
            return runtime.sample("head", inputs)

    graphs = runtime.graph("video"), runtime.graph("query")
    heads = Head(shape, *graphs, runtime.graph("head"), runtime.rows), Head(shape, *graphs, Fetched(), HostRows)
    states, apart = [head.new_state() for head in heads], list[float]()
    for window in range(STATE_WINDOWS):
        for state in states:
            if window % 5 == 0:
                state.add(queries[window % len(queries)])
            if window % 15 == 12:
                state.remove(1)
            if window == 30:
                state.reset()
        video = windows[window % len(windows)]
        given, want = (head.step(video, state)["saliency"] for head, state in zip(heads, states, strict=True))
        apart.append(np.abs(given - want).max())
    worst = float(np.max(apart))  # not a number if one of them is none
    return worst if math.isfinite(worst) else math.inf


def head_samples(runtime: GpuRuntime, folder: Path) -> tuple[list[Maps], list[Maps]]:
    """Real queries, all of one length, and real windows, mapped by the engines."""
    samples = load_samples(folder)
    queries, windows = (_each(runtime.sample(name, samples[name][0])) for name in ("query", "video"))
    return queries, windows


def _each(maps: Maps) -> list[Maps]:
    return [{name: each[place] for name, each in maps.items()} for place in range(min(map(len, maps.values())))]


def time_bundle(runtime: GpuRuntime, folder: Path, manifest: Manifest, rounds: int) -> Iterator[Timing]:
    device, rng, size = runtime.device, np.random.default_rng(0), manifest.image_size
    half = manifest.precision.get("image") != "fp32"
    for height, width in FRAMES:
        frames = [rng.integers(0, 256, (height, width, 3), np.uint8)]
        moved = 3 * (min(height, width) * size / manifest.image_resize) ** 2 + 2 * 3 * size**2
        yield timed(device, f"preprocess, {width}x{height}", partial(runtime.crops, frames), rounds, moved)
    image, weights = runtime.graph("image"), (folder / "image.engine").stat().st_size
    for count in sorted({1, image.most}):
        with device.current():
            pixels = runtime.crops(frames * count)
            outputs = image.run({"pixels": pixels})
        moved = weights + pixels.nbytes + sum(each.nbytes for each in outputs.values())
        yield timed(device, f"image, {count}", partial(image.run, {"pixels": pixels}), rounds, moved, half)
    if manifest.head:
        video, query, step = (runtime.graph(name) for name in ("video", "query", "head"))
        head = Head(manifest.head, video, query, step, runtime.rows)
        queries, windows = head_samples(runtime, folder)
        weights = (folder / "head.engine").stat().st_size
        for count in ROWS:
            if count <= manifest.profiles["rows"][-1]:
                state = head.new_state()
                for row in range(count):
                    state.add(queries[row % len(queries)])
                moved = weights + sum(each.nbytes for each in state.inputs().values())
                yield timed(device, f"head, {count}", partial(head.step, windows[0], state), rounds, moved)


def timed(
    device: Device, name: str, work: Callable[[], object], rounds: int, moved: float, half: bool = False
) -> Timing:
    """moved: bytes."""
    with device.current():
        end = time.monotonic() + WARM_S
        while time.monotonic() < end:
            work()
            device.synchronize()
        taken = [device.time_ms(work) for _ in range(rounds)]
    return Timing(name, statistics.median(taken), float(np.quantile(taken, 0.95)), moved / 1e6, half)


def beside_torch(timings: Mapping[str, Timing], folder: Path, manifest: Manifest, rounds: int) -> str:
    """Fill in what torch takes, and say how that went."""
    try:
        theirs = import_module("bench.gpu_torch")  # torch need not be there
    except ImportError as error:
        return f"not compared: {error}"
    if problem := theirs.why_not():
        return f"not compared: {problem}"
    counts = {
        kind: [int(name.split(", ")[1]) for name in timings if name.startswith(kind)] for kind in ("image", "head")
    }
    frames = [np.zeros((*size, 3), np.uint8) for size in FRAMES]
    said = "compared"
    try:
        for work in theirs.works(
            manifest, "cuda", frames, counts["image"], counts["head"], manifest.profiles["words"][1]
        ):
            timing = timings[work.name]
            timing.gflop = work.gflop
            timing.torch_ms = statistics.median(theirs.time_ms(work.eager, 0.2, rounds))
            try:
                timing.compiled_ms = statistics.median(theirs.time_ms(work.compiled, 0.5, rounds))
            except Exception as error:  # whatever the compiler does not like, the rest is worth knowing
                said = f"{work.name} could not be compiled: {_line(error)}"
    except Exception as error:  # a backbone that is not here, or a GPU that torch was not built for
        said = f"not compared further: {_line(error)}"
    return said


def build_lite(target: str, parent: Path, console: Console) -> Path:
    """What is checked unless another bundle is named: real towers, and a head of full size with random weights.

    Raises:
        BundleError: it cannot be built here.
    """
    from models.checkpoint import Provenance, save_checkpoint
    from models.lite import EMBEDDING, FLOOR, TAP_CHANNELS
    from models.r2 import R2
    from models.r2_types import R2Config

    console.print(f"building lite for {target}")
    checkpoint, folder = parent / "r2.safetensors", parent / target
    model = R2(R2Config("causal", max(TAP_CHANNELS), EMBEDDING, EMBEDDING, FLOOR))
    save_checkpoint(checkpoint, model, Provenance("random", "lite", 1.0, calibration={"centre": 0.0, "slope": 1.0}))
    command = ["build-engine", "--checkpoint", str(checkpoint), "--target", target, "--out", str(folder)]
    done = subprocess.run([sys.executable, "-m", "livemoments", *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise BundleError(f"lite cannot be built: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    return folder


def show(console: Console, card: Card, kernels: Errors, bundles: Sequence[Mapping[str, Any]]) -> None:
    table = Table("kernel", "largest error", "allowed", "", title=card.name, title_justify="left")
    for name, (error, allowed) in kernels.items():
        table.add_row(
            name, f"{error:.1e}", f"{allowed:.0e}" if allowed else "0", "" if error <= allowed else "[red]wrong"
        )
    console.print(table)
    for found in bundles:
        title = f"{found['bundle']}: {found.get('model', '?')} for {found.get('target', '?')}"
        if problem := found.get("failed") or found.get("unsupported"):
            console.print(f"{title}: {'[red]failed[/]' if 'failed' in found else 'not on this card'}: {problem}")
            continue
        console.print(f"{title}: worst cosine {min(found['parity'].values()):.6f}; torch: {found['torch']}")
        times = Table("", "ms", "p95", "torch", "compiled", "at best", "of that")
        for each in found["timings"]:
            cells = [each[key] for key in ("ms", "p95_ms", "torch_ms", "compiled_ms", "least_ms")]
            share = f"{each['least_ms'] / each['ms']:.0%}"
            times.add_row(each["name"], *("" if cell is None else f"{cell:.3f}" for cell in cells), share)
        console.print(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "--bundle",
        type=Path,
        action="append",
        metavar="DIR",
        help="may be repeated (default: lite with a random head, built now for each target)",
    )
    parser.add_argument("--rounds", type=int, default=100, help="runs that a time is the median of (default 100)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the kernels' inputs")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        device = Device()
    except BundleError as error:
        print(f"no check on a GPU: {error}")
        return 0
    console, card = Console(highlight=False), card_of(device)
    try:
        kernels = check_kernels(device, load_manifest(EMBEDDED), args.seed)
    except BundleError as error:  # nvcc is missing
        print(f"the kernels cannot be checked: {error}")
        return 1
    bundles: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = args.bundle or []
        for target in () if paths else GPU_TARGETS:
            try:
                paths.append(build_lite(target, Path(folder), console))
            except (BundleError, ImportError) as error:
                bundles.append({"bundle": "lite", "target": target, "unsupported": str(error)})
        bundles += [check_bundle(path, device, card, args.rounds) for path in paths]
    result = {"gpu": asdict(card), "seed": args.seed, "kernels": kernels, "bundles": bundles} | environment()
    with suppress(OSError):  # an installed package may lie where nobody writes; the result is printed anyway
        (RESULTS / f"{_slug(card.name)}.json").write_text(json.dumps(result, indent=2) + "\n")
    show(console, card, kernels, bundles)
    print(json.dumps(result))
    right = all(error <= allowed for error, allowed in kernels.values())
    return 0 if right and not any("failed" in each for each in bundles) else 1


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
