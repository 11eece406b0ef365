"""`livemoments bench model`: what one window costs the causal model, and what it would cost without it.

Random weights in the shapes of ViT-B/32, because weights do not change the time. Beside each other, in turns, in one
run: the image tower alone, the published model over a buffer of 75 windows (streaming with it means running that again
at every window), and one causal window for more and more queries. A window is all of it: the maps of its features, the
step of every query and the writing of the rings. Both runtimes must agree before anything is timed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import environment, resident_mb
from bench.plots import plot_cost
from kernels.errors import InputError
from kernels.export import export
from kernels.onnx_runtime import Graph
from models.clip import VIT_B32, ClipImageTower
from models.graphs import Graph as Exported
from models.graphs import graphs, step_axes, step_columns, step_inputs
from models.r2 import R2
from models.r2_types import ClipOutputs, QueryMaps, R2Config
from models.temporal import TemporalState
from stream.output import check_writable

BUFFER = 75  # windows of 2 s, as the recordings of QVHighlights have
QUERIES = (1, 10, 16, 100, 1000)
WORDS = 12  # tokens of a query
FEW = 4
YOUNG = 100  # windows
TURN_S = 0.1  # of each work, at least, until the next has its turn
TOWER, WHOLE = "image tower", "published model again"
TOLERANCE = 1e-4
CAUSAL = R2Config("causal", VIT_B32.image.width, VIT_B32.text.width, embedding=VIT_B32.projection)

Runtimes = dict[str, Callable[[], Any]]
"""The same work in each runtime, by its name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="times that everything is timed in turn (default 15)")
    parser.add_argument(
        "--windows", type=int, default=100_000, help="of the long run that ends the measure (default 100000)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the cost over the number of queries")


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.windows <= YOUNG:
        raise InputError(f"--rounds must be at least 1 and --windows more than {YOUNG}")
    if args.plot:
        check_writable(args.plot)
        if find_spec("matplotlib") is None:
            raise InputError("--plot needs matplotlib: pip install 'livemoments[bench]'")
    console = Console(stderr=True, highlight=False)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with console.status("exporting the graphs"):
            causal = _Causal(Path(folder))
            causal.check()
            works = {TOWER: _tower(Path(folder)), WHOLE: _whole(Path(folder))}
            works |= {_label(rows): causal.full(rows) for rows in QUERIES}
        gflop = {name: count_gflop(work["torch"]) for name, work in works.items()}
        times = measure(works, args.rounds, console)
        result = {"ms": times, "gflop": gflop} | ratios(times, gflop) | long_run(causal, args.windows, console)
    _print(Console(highlight=False), result)
    print(json.dumps(result | environment()))
    if args.plot:
        cost = {name: [ms[_label(n)] / ms[TOWER] for n in QUERIES] for name, ms in times.items()}
        plot_cost(QUERIES, cost, {name: ms[WHOLE] / ms[TOWER] for name, ms in times.items()}, args.plot)
    return 0


def measure(works: dict[str, Runtimes], rounds: int, console: Console) -> dict[str, dict[str, float]]:
    """Median ms of each work in each runtime; they take turns, so that a noisy neighbour meets all alike."""
    turns = [(runtime, name, call) for name, work in works.items() for runtime, call in work.items()]
    taken: dict[tuple[str, str], list[float]] = {(runtime, name): [] for runtime, name, _ in turns}
    for _ in track(range(rounds), "measuring", console=console):
        for runtime, name, call in turns:
            call()  # whatever the one before left in the caches
            start, calls = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < TURN_S or calls == 0:
                call()
                calls += 1
            taken[runtime, name].append(spent / calls * 1e3)
    result: dict[str, dict[str, float]] = {}
    for (runtime, name), values in taken.items():
        result.setdefault(runtime, {})[name] = round(statistics.median(values), 3)
    return result


def ratios(times: dict[str, dict[str, float]], gflop: dict[str, float]) -> dict[str, Any]:
    """The three figures, in each runtime and, as `arithmetic`, in operations alone."""

    def figures(cost: dict[str, float]) -> dict[str, float]:
        further = (cost[_label(100)] - cost[_label(10)]) / 90
        return {
            "published_again_over_window": round(cost[WHOLE] / cost[_label(1)], 1),
            "window_16_queries_over_tower": round(cost[_label(16)] / cost[TOWER], 4),
            "tower_over_further_query": round(cost[TOWER] / further, 1),
        }

    return {name: figures(cost) for name, cost in (times | {"arithmetic": gflop}).items()}


def long_run(causal: "_Causal", windows: int, console: Console) -> dict[str, Any]:
    """The cost of a window early and late in a stream of `windows`, and the memory that they take."""
    old, young = causal.model.new_state(1), causal.model.new_state(1)
    late, early = causal.window(1, old)["onnxruntime"], causal.window(1, young)["onnxruntime"]
    for _ in range(YOUNG):
        early()
        late()
    before = resident_mb()
    for _ in track(range(windows - YOUNG), f"{windows} windows", console=console):
        late()
    after = resident_mb()
    taken: dict[Callable[[], Any], list[float]] = {early: [], late: []}
    for _ in range(2 * YOUNG):
        for call, times in taken.items():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    ratio = statistics.median(taken[late]) / statistics.median(taken[early])
    return {"windows": windows, "late_over_early": round(ratio, 3), "rss_growth_mb": round(after - before, 2)}


class _Causal:
    """The causal model in both runtimes, on one stream."""

    def __init__(self, folder: Path) -> None:
        self.model = R2(CAUSAL).eval()
        made = graphs(self.model, VIT_B32.patches)
        self.video = _graph(folder / "video", made["video"])
        self.many = _graph(folder / "step", made["solo"])
        # With few rows a step is hundreds of tiny operators, and handing them to a second thread costs more than it
        # brings: 1 row takes 1.2 ms on one thread and 1.6 ms on two, 16 rows 4.7 and 4.2, 100 rows 24 and 17.
        self.few = Graph(folder / "step.onnx", threads=1)
        self.layers = torch.randn(1, CAUSAL.depth, 1 + VIT_B32.patches, CAUSAL.video_width)
        self.embedding = torch.randn(1, CAUSAL.embedding)

    def window(self, rows: int, state: TemporalState) -> Runtimes:
        """One window for as many queries as `state` has rows, which it is written into."""
        words = torch.randn(rows, CAUSAL.depth, WORDS, CAUSAL.text_width)
        mask = torch.ones(rows, WORDS, dtype=torch.bool)
        query = self.model.query_maps(words, torch.randn(rows, CAUSAL.embedding + 1), mask)
        video = self.model.video_maps(self.layers, self.embedding)
        given = step_inputs(video, torch.zeros(rows, dtype=torch.int64), query, state)
        step = self.few if rows <= FEW else self.many
        fixed = {name: each.numpy() for name, each in zip(step_axes(CAUSAL.depth), given, strict=True)}
        del fixed["row_stream"]

        def in_torch() -> Tensor:
            video = self.model.video_maps(self.layers, self.embedding)
            outputs, columns = self.model.step(video, None, query, state)
            state.append(columns)
            return outputs.saliency

        def in_onnxruntime() -> Tensor:
            video = self.video(layers=self.layers.numpy(), embedding=self.embedding.numpy())
            outputs = {name: torch.from_numpy(each) for name, each in step(**(fixed | video)).items()}
            state.append(step_columns(outputs, CAUSAL.depth))
            return outputs["saliency"]

        return {"torch": in_torch, "onnxruntime": in_onnxruntime}

    def full(self, rows: int) -> Runtimes:
        """The same with rings that are full of something."""
        state = self.model.new_state(rows)
        for ring in (*state.keys, *state.values, state.history):
            ring.normal_()
        state.count[:] = 1_000
        return self.window(rows, state)

    def check(self) -> None:
        """Both runtimes from the first window on."""
        torch.manual_seed(1)
        one = self.window(3, self.model.new_state(3))["torch"]
        torch.manual_seed(1)
        other = self.window(3, self.model.new_state(3))["onnxruntime"]
        for _ in range(CAUSAL.window + 1):
            _agree("a window", one(), other())


class _Embedding(nn.Module):
    """The image tower, hidden states and all, as a function of one output to compare."""

    def __init__(self, tower: ClipImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        layers, embedding = self.tower(pixels)
        return torch.cat([layers.flatten(1), embedding], 1)


class _Whole(nn.Module):
    """The published model over a whole buffer, its query prepared as the causal one's is."""

    def __init__(self, model: R2, query: QueryMaps) -> None:
        super().__init__()
        self.model, self.query = model, query

    def forward(self, layers: Tensor) -> Tensor:
        outputs = self.model(layers, layers.new_zeros(1, BUFFER, 0), self.query)
        assert isinstance(outputs, ClipOutputs)
        return outputs.saliency


def _whole(folder: Path) -> Runtimes:
    model = R2(replace(CAUSAL, mode="clip", embedding=0)).eval()
    words = torch.randn(1, CAUSAL.depth, WORDS, CAUSAL.text_width)
    query = model.query_maps(words, torch.zeros(1, 1), torch.ones(1, WORDS, dtype=torch.bool))
    layers = torch.randn(1, BUFFER, CAUSAL.depth, 1 + VIT_B32.patches, CAUSAL.video_width)
    return _both(folder / "whole", _Whole(model, query), layers)


def _tower(folder: Path) -> Runtimes:
    size = VIT_B32.image_size
    return _both(
        folder / "tower", _Embedding(ClipImageTower(VIT_B32, CAUSAL.depth)).eval(), torch.randn(1, 3, size, size)
    )


def _both(path: Path, module: nn.Module, x: Tensor) -> Runtimes:
    """A module of one input in both runtimes, found equal."""

    graph = _graph(path, Exported(module, {"x": x}, ("y",), {}))
    _agree(path.name, module(x), torch.from_numpy(graph(x=x.numpy())["y"]))
    return {"torch": lambda: module(x), "onnxruntime": lambda: graph(x=x.numpy())}


def _graph(path: Path, graph: Exported) -> Graph:
    path = path.with_suffix(".onnx")
    onnx.save(export(*graph), path)
    return Graph(path)


def _agree(name: str, one: Tensor, other: Tensor) -> None:
    if not (error := float((one - other).abs().max())) <= TOLERANCE:
        raise InputError(f"{name}: ONNX Runtime differs from torch by {error:.1e}, at most {TOLERANCE:.0e} is right")


def count_gflop(call: Callable[[], Any]) -> float:
    """Of the matrix products and convolutions, two for a multiply and an add; the rest is left out."""
    with FlopCounterMode(display=False) as counter:
        call()
    return round(float(counter.get_total_flops()) / 1e9, 5)


def _label(rows: int) -> str:
    return f"causal window, {rows} " + ("query" if rows == 1 else "queries")


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table("", "GFLOP", title="one window", title_justify="left")
    for runtime in result["ms"]:
        for column in (f"{runtime}, ms", "image tower = 1"):
            table.add_column(column, justify="right")
    for name, gflop in result["gflop"].items():
        cells = [f"{gflop:.3f}"]
        for ms in result["ms"].values():
            cells += [f"{ms[name]:.2f}", f"{ms[name] / ms[TOWER]:.4f}"]
        table.add_row(name, *cells)
    console.print(table)
    figures = Table("", title="ratios", title_justify="left")
    for name in (*result["ms"], "arithmetic"):
        figures.add_column(name, justify="right")
    for figure in result["arithmetic"]:
        figures.add_row(
            figure.replace("_", " "), *(f"{result[name][figure]:g}" for name in (*result["ms"], "arithmetic"))
        )
    console.print(figures)
    console.print(
        f"{result['windows']} windows of one stream and query: the last cost {result['late_over_early']:.3f} of the "
        f"first; memory grew by {result['rss_growth_mb']:.2f} MB"
    )
