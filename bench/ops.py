"""`livemoments bench ops`: what each engine and kernel takes on this CPU, beside its reference and its floor.

Engines stand beside the same graph in torch, in fp32; kernels on a CPU are their own references (`make gpu-check` holds
the CUDA kernels against them). The floor is what the machine could do at best: operations at the rate of a large
product, or bytes at the rate of a large copy, whichever takes longer, both measured in the same run. All take turns, so
that a noisy neighbour meets all alike, and nothing is timed that does not agree with its reference.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.model import CAUSAL, count_gflop, measure
from kernels.agreement import PARITY, worst_cosine
from kernels.build import export_graph, formed
from kernels.compress import compress
from kernels.errors import InputError
from kernels.onnx_runtime import Graph
from kernels.parity import real_crops, spread
from kernels.preprocess import crop, normalise
from kernels.recipe import make_recipe
from kernels.ring import ring_attention
from kernels.saliency import Calibration, crossings, row_saliency
from models.backbone import FromCrops
from models.clip import VIT_B32, ClipImageTower
from models.graphs import Graph as Exported
from models.graphs import graphs as step_graphs
from models.lite_packages import class_captions
from models.r2 import R2

SIZE = (720, 1280)
SAMPLES = 16  # frames and texts that must agree with torch before one of them is timed
SIDE = 1024  # of the product, and 2^26 the bytes of the copy, that show what the machine can do
ROWS = (16, 1000)
STREAMS, HEADS, WINDOW, CHANNELS, WIDTH = 4, 8, 32, 32, 512
OPENVINO_GROUP = 768  # activations that share a scale: of 32 to 3072 that with which ViT-B/32 is fastest
CPU, FP32, INT8 = "CPU path", "fp32", "int8"


Run = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]


@dataclass(frozen=True)
class Work:
    """One operation: its first runtime is the reference."""

    name: str
    runtimes: dict[str, Callable[[], Any]]
    gflop: float
    bytes: dict[str, float]  # by runtime, at least to be moved
    integer: frozenset[str] = frozenset()  # runtimes whose products are of int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="times that everything is timed in turn (default 15)")


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1")
    console = Console(stderr=True, highlight=False)
    torch.manual_seed(0)
    with torch.inference_mode():
        with console.status("making the engines, and holding them against torch"):
            works = [*engines(), *kernels(np.random.default_rng(0))]
        peaks = {"peak": _peaks()}
        times = measure({work.name: work.runtimes for work in works} | peaks, args.rounds, console)
    rate = {
        FP32: 2 * SIDE**3 / times[FP32]["peak"] / 1e6,
        INT8: 2 * SIDE**3 / times[INT8]["peak"] / 1e6,
        "copy": 2 * 2**26 / times["copy"]["peak"] / 1e6,
    }
    result = [_row(work, runtime, times, rate) for work in works for runtime in work.runtimes]
    _print(Console(highlight=False), result, rate)
    print(json.dumps({"ops": result, "giga_per_s": {k: round(v, 1) for k, v in rate.items()}} | environment()))
    return 0


def engines() -> list[Work]:
    """A CLIP's image tower and a head of full size, with random weights, and the towers of lite."""
    c, lite = VIT_B32, make_recipe("lite", None)
    mean, std = ([255 * each for each in values] for values in (c.mean, c.std))
    tower = FromCrops(ClipImageTower(c, CAUSAL.depth).eval(), c.image_size, mean, std)
    crops, small = _crops(c.image_size, c.image_size), _crops(lite.backbone.resize, lite.backbone.size)
    words = lite.backbone.tokenize(spread(class_captions(), SAMPLES))
    vit, graphs = Exported(tower, {"crops": crops}, ("layers", "pooled"), {"crops": {0: "frames"}}), lite.crop_graphs()
    works = [
        _engine("image tower, ViT-B/32", vit, export_graph(vit), [crops], [crops[:1]], ("fp32", "int8")),
        _lite("image", graphs["image"], [small]),
        _lite("text", graphs["text"], words),
    ]
    head = step_graphs(R2(CAUSAL).eval(), c.patches)["solo"]
    exported = export_graph(head)
    for rows in ROWS:
        given = [
            each[torch.arange(rows) % len(each)] if head.axes[name].get(0) == "rows" else each
            for name, each in head.inputs.items()
        ]
        works.append(_engine(f"head, {rows} queries", head, exported, given, given, ("fp32",)))
    return works


def _lite(tower: str, graph: Exported, samples: Sequence[torch.Tensor]) -> Work:
    return _engine(
        f"{tower} tower, lite", graph, export_graph(graph), samples, [each[:1] for each in samples], ("fp32",)
    )


def _crops(resize: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(spread(list(real_crops(resize, size)), SAMPLES)))


def _engine(
    name: str,
    graph: Exported,
    exported: onnx.ModelProto,
    samples: Sequence[torch.Tensor],
    timed: Sequence[torch.Tensor],
    forms: tuple[str, ...],
) -> Work:
    """A graph in each runtime that agrees with torch on the samples."""
    models = {form: formed(exported, form).SerializeToString() for form in forms}
    runs: dict[str, Run] = {f"ONNX Runtime {form}": partial(_onnxruntime, Graph(each)) for form, each in models.items()}
    if find_spec("openvino"):
        runs |= {f"OpenVINO {each}": _openvino(models["fp32"], each) for each in ("f32", "bf16")}
        if INT8 in forms:
            compress(exported, {"MatMul": INT8}, OPENVINO_GROUP)
            runs["OpenVINO int8"] = _openvino(exported.SerializeToString(), "bf16")
    found, given = graph.module(*samples), _named(graph, samples)
    want = [each.numpy() for each in ([found] if isinstance(found, torch.Tensor) else found)]
    runtimes: dict[str, Callable[[], Any]] = {"torch": partial(graph.module, *timed)}
    for runtime, run in runs.items():
        # What is wrong may be fast.
        if min(worst_cosine(given, each) for given, each in zip(run(given), want, strict=True)) >= PARITY:
            runtimes[runtime] = partial(run, _named(graph, timed))
    sizes = {f"ONNX Runtime {form}": len(model) for form, model in models.items()}
    whole = sum(each.numel() * each.element_size() for each in graph.module.parameters())
    integer = frozenset(runtime for runtime in runtimes if runtime.endswith(INT8))
    return Work(
        name, runtimes, count_gflop(runtimes["torch"]), {each: sizes.get(each, whole) for each in runtimes}, integer
    )


def _named(graph: Exported, inputs: Sequence[torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: each.numpy() for name, each in zip(graph.inputs, inputs, strict=True)}


def _onnxruntime(graph: Graph, arrays: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return list(graph(**arrays).values())


def _openvino(model: bytes, precision: str) -> Run:
    """A graph in OpenVINO, where it is installed: it is none of our targets, being no faster where it counts."""
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(OPENVINO_GROUP)
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    return lambda arrays: [np.array(each) for each in request.infer(dict(arrays)).values()]


def kernels(rng: np.random.Generator) -> list[Work]:
    """The arithmetic of kernels/cuda in numpy and Pillow: a 720p frame, and rows of (stream, query)."""
    works = [_preprocessing(rng)]
    for rows in ROWS:
        works += [_attention(rows, rng), _saliency(rows, rng)]
    return works


def _preprocessing(rng: np.random.Generator) -> Work:
    frame, side = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8), VIT_B32.image_size

    def call() -> NDArray[np.float16]:
        return normalise(crop(frame, resize=side, size=side), VIT_B32.mean, VIT_B32.std)

    return Work("preprocessing, 720p", {CPU: call}, 0.0, {CPU: 3 * SIZE[0] ** 2 + 6 * side**2})


def _attention(rows: int, rng: np.random.Generator) -> Work:
    query, key, value = rng.normal(size=(3, rows, HEADS, CHANNELS)).astype(np.float32)
    keys, values = rng.normal(size=(2, rows, HEADS, WINDOW, CHANNELS)).astype(np.float32)
    count, rates = rng.integers(0, 1000, rows), np.ones(CHANNELS, np.float32)

    def call() -> NDArray[np.float32]:
        return ring_attention(query, key, value, keys, values, count, rates)

    return Work(f"ring attention, {rows} rows", {CPU: call}, 4e-9 * keys.size, {CPU: 2 * keys.nbytes})


def _saliency(rows: int, rng: np.random.Generator) -> Work:
    windows, queries = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (STREAMS, rows))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    level, spread, threshold = (np.full(rows, value, np.float32) for value in (0.0, 0.02, 0.5))
    stream, state = rng.integers(0, STREAMS, rows).astype(np.int32), np.zeros(rows, np.uint8)
    calibration = Calibration(0.02, 1.0, 1.0)

    def call() -> NDArray[np.intp]:
        score = row_saliency(windows, stream, queries, level, spread, calibration)[1]
        return crossings(score, threshold, state)

    return Work(f"saliency and crossings, {rows} rows", {CPU: call}, 2e-9 * queries.size, {CPU: queries.nbytes})


def _peaks() -> dict[str, Callable[[], Any]]:
    """What the machine does at best."""
    a, b = np.ones((SIDE, SIDE), np.float32), np.empty(2**26, np.uint8)
    source, whole = np.ones_like(b), np.ones((SIDE, SIDE), np.int8)
    product, integers = _product("MatMul", a), _product("MatMulInteger", whole)
    return {
        FP32: lambda: product(x=a),
        INT8: lambda: integers(x=whole.astype(np.uint8)),
        "copy": lambda: np.copyto(b, source),
    }


def _product(operator: str, weight: NDArray[Any]) -> Graph:
    """x @ weight, of uint8 by int8 or of floats."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT) if operator == "MatMul" else (TensorProto.UINT8, TensorProto.INT32)
    names = (helper.make_tensor_value_info(name, kind, [SIDE, SIDE]) for name, kind in zip("xy", kinds, strict=True))
    x, y = names
    node = helper.make_node(operator, ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Graph(model.SerializeToString())


def _row(
    work: Work, runtime: str, times: Mapping[str, Mapping[str, float]], rate: Mapping[str, float]
) -> dict[str, Any]:
    ms, reference = times[runtime][work.name], next(iter(work.runtimes))
    peak = rate[INT8 if runtime in work.integer else FP32]
    floor = max(work.gflop / peak, work.bytes[runtime] / 1e9 / rate["copy"]) * 1e3
    return {
        "op": work.name,
        "runtime": runtime,
        "ms": ms,
        "reference": reference,
        "faster_than_reference": round(times[reference][work.name] / ms, 2),
        "floor_ms": round(floor, 4),
        "over_floor": round(ms / floor, 2),
    }


def _print(console: Console, result: list[dict[str, Any]], rate: Mapping[str, float]) -> None:
    table = Table(title="one call", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("", " "):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "reference / it", "floor, ms", "it / floor"):
        table.add_column(column, justify="right")
    before = ""
    for row in result:
        cells = (f"{row[key]:g}" for key in ("ms", "faster_than_reference", "floor_ms", "over_floor"))
        table.add_row("" if row["op"] == before else row["op"], row["runtime"], *cells)
        before = row["op"]
    console.width = max(console.width, 100)  # a table that is cut tells nothing
    console.print(table)
    console.print(
        f"at best: {rate[FP32]:.0f} GFLOP/s in fp32, {rate[INT8]:.0f} G/s in int8, {rate['copy']:.1f} GB/s copied",
        soft_wrap=True,
    )
