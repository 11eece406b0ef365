"""Builds an engine bundle: export, shrink or compile, hold against torch, and only then put it in its place.

For a CPU each engine takes the smallest form of its precision that agrees with torch (kernels/parity.py). For a GPU
the ONNX graph is held against torch and then compiled; the engine itself is when it first meets a GPU.
"""

import importlib.metadata
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from kernels.agreement import PENDING
from kernels.bundle import EMBEDDED, GPU_TARGETS, Manifest, check_place, describe_files
from kernels.compress import compress
from kernels.errors import BundleError
from kernels.export import export
from kernels.onnx_runtime import Graph
from kernels.parity import Agreement, Gate
from kernels.quantise import fold_constants, fuse_attention, quantise
from kernels.recipe import Recipe
from kernels.rounding import rounded
from kernels.tensorrt import CAPABILITIES, compile_engine, load_module
from models.graphs import Graph as Exported

PRECISIONS = {"onnxruntime": ("int8", "fp16", "fp32"), "tensorrt-rtx": ("fp16", "bf16", "fp32")}
PRECISIONS["tensorrt"] = PRECISIONS["tensorrt-rtx"]
"""By target, the usual one first."""
# By precision: the forms that an engine for a CPU may take, the fastest and smallest first.
_FORMS = {
    "fp32": {"image": ["fp32"], "text": ["fp32"]},
    "fp16": {"image": ["fp16 weights"], "text": ["fp16 weights"]},
    "int8": {"image": ["int8", "fp16 weights"], "text": ["int8", "int8 weights", "fp16 weights"]},
}
_HALF = dict.fromkeys(("Conv", "Gemm", "MatMul", "Gather", "Transpose", "Reshape"), "fp16")
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Least, usual and largest length of the axes that vary, for the engines of a GPU.
_PROFILES = {"frames": [1, 1, 16], "texts": [1, 1, 64], "streams": [1, 1, 32], "rows": [1, 16, 10_000]}
_EMBEDDED_BYTES = 45_000_000  # at most of the bundle that travels with the project
_TIMED = 9  # runs of which the median is told

Report = Callable[[str], None]
"""Is told what begins."""


@dataclass(frozen=True)
class Part:
    """What became of one engine."""

    name: str
    form: str  # how its weights are stored and its products computed
    bytes: int
    seconds: float  # that it took to make
    agreement: dict[str, Agreement]  # by output
    ms: float | None  # one sample; None where it cannot be run
    torch_ms: float


def build(
    recipe: Recipe,
    target: str,
    precision: str,
    out: Path,
    report: Report = lambda line: None,
    capabilities: Sequence[str] = CAPABILITIES,
) -> tuple[Manifest, list[Part]]:
    """Build a bundle and put it at `out`, in place of a bundle that stands there.

    Args:
        precision: one of PRECISIONS[target].
        capabilities: compute capabilities of the GPUs to serve, for tensorrt-rtx.
    Raises:
        BundleError: the target is missing, `out` is no place for a bundle, or an engine does not agree with torch.
        ModelError: the backbone has no such text or frame.
    """
    out = out.resolve()
    check_place(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".building-") as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            made = _build(recipe, target, precision, folder, report, capabilities, embedded=out == EMBEDDED)
            _put(folder, out, Path(scratch) / "old")
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {error.strerror or error}") from None
    return made


def _put(new: Path, out: Path, old: Path) -> None:
    """Rename a bundle to its place; what stood there goes to `old`, or comes back if that fails."""
    check_place(out)  # again: a build takes minutes
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def _build(
    recipe: Recipe,
    target: str,
    precision: str,
    folder: Path,
    report: Report,
    capabilities: Sequence[str],
    *,
    embedded: bool,
) -> tuple[Manifest, list[Part]]:
    shutil.copy(recipe.backbone.tokenizer, folder / "tokenizer.json")
    report("distractor texts")
    if texts := list(recipe.distractors()):
        np.save(folder / "distractors.npy", torch.cat(texts).half().numpy())
    if target in GPU_TARGETS:
        parts = _for_gpu(recipe, target, precision, folder, report, capabilities)
    else:
        parts = _for_cpu(recipe, precision, folder, report)
    manifest = _manifest(recipe, target, folder, parts, capabilities)
    size = sum(each["bytes"] for each in manifest.files.values())
    if embedded and size > _EMBEDDED_BYTES:
        raise BundleError(f"it takes {size / 1e6:.1f} MB, the embedded one {_EMBEDDED_BYTES / 1e6:.0f} MB at most")
    manifest.write(folder)
    return manifest, parts


def _for_cpu(recipe: Recipe, precision: str, folder: Path, report: Report) -> list[Part]:
    graphs = recipe.crop_graphs()
    gate, runs, parts = Gate(recipe, graphs), dict[str, Graph](), []
    for name, graph in graphs.items():
        report(f"{name}: export")
        start = time.perf_counter()
        exported = export_graph(graph)
        # Maps and head are small, and the head remembers: they are never computed in int8.
        forms = _FORMS[precision].get(name, _FORMS[precision]["image"][-1:])
        for form in forms:
            report(f"{name}: {form}, held against torch")
            try:
                model = formed(exported, form)
                runs[name] = Graph(model.SerializeToString())
                agreement = _check(recipe, gate, name, runs)
                break
            except (BundleError, ValueError) as error:  # ValueError: a weight that cannot be stored so
                if form == forms[-1]:
                    raise
                report(f"{name}: {error}: not as {form}")
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")
        seconds = time.perf_counter() - start
        ms, torch_ms = _speed(gate, name, runs[name])
        size = (folder / f"{name}.onnx").stat().st_size
        parts.append(Part(name, form, size, seconds, agreement, ms, torch_ms))
    return parts


def _for_gpu(
    recipe: Recipe, target: str, precision: str, folder: Path, report: Report, capabilities: Sequence[str]
) -> list[Part]:
    gate, runs, parts = Gate(recipe, recipe.pixel_graphs()), dict[str, Graph](), []
    for name, graph in recipe.pixel_graphs(_TYPES[precision]).items():
        report(f"{name}: export")
        start = time.perf_counter()
        model, form = export_graph(graph), precision if name in ("image", "text") else "fp32"
        report(f"{name}: {form}, held against torch")
        runs[name] = Graph((model if form == "fp32" else rounded(model)).SerializeToString())
        agreement = _check(recipe, gate, name, runs)
        report(f"{name}: compile")
        axes = {
            each.name: [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
            for each in model.graph.input
        }
        profiles = _profiles(recipe)
        if name == "query":
            profiles["rows"] = profiles["texts"]  # it is given what the text tower gave
        engine = compile_engine(model.SerializeToString(), axes, target, profiles, capabilities)
        (folder / f"{name}.engine").write_bytes(engine)
        seconds = time.perf_counter() - start
        parts.append(Part(name, form, len(engine), seconds, agreement, None, _speed(gate, name, None)[1]))
    report("samples for the first load")
    np.savez_compressed(folder / "reference.npz", **gate.reference())  # type: ignore[arg-type]
    return parts


def _profiles(recipe: Recipe) -> dict[str, list[int]]:
    backbone = recipe.backbone
    return _PROFILES | {"patches": [1 + backbone.patches] * 3, "words": [1, 12, backbone.context]}


def _check(recipe: Recipe, gate: Gate, name: str, runs: Mapping[str, Graph]) -> dict[str, Agreement]:
    if name != "head":
        return gate.check(name, runs[name])
    assert recipe.trained is not None
    return gate.check_head(recipe.trained.shape, runs["video"], runs["query"], runs["head"])


def export_graph(graph: Exported) -> onnx.ModelProto:
    """A graph in fp32."""
    model = export(*graph)
    del model.graph.value_info[:]  # some are wrong (torch 2.13), and whatever needs them can infer them
    return model


def formed(exported: onnx.ModelProto, form: str) -> onnx.ModelProto:
    """A copy in one of the forms of _FORMS."""
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    if form == "fp16 weights":
        compress(model, _HALF)
    elif form == "int8 weights":
        compress(model, _HALF | {"MatMul": "int8", "Gather": "int8"})
    elif form == "int8":
        model = fold_constants(model)
        compress(model, {"Conv": "fp16", "Gemm": "fp16", "Gather": "int8"})
        model = fuse_attention(quantise(model))
    return model


def _speed(gate: Gate, name: str, run: Graph | None) -> tuple[float | None, float]:
    """Median ms of one sample in the engine, if it can be run, and in torch, in turns."""
    given = gate.sample(name)
    arrays = {part: each.numpy() for part, each in given.items()}
    calls: list[Callable[[], Any]] = [lambda: gate.run(name, given)]
    if run:
        calls.append(lambda: run(**arrays))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_TIMED):
        for call, times in zip(calls, taken, strict=True):
            call()  # what the other left in the caches
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    theirs, *ours = map(statistics.median, taken)
    return ours[0] if ours else None, theirs


def _manifest(
    recipe: Recipe, target: str, folder: Path, parts: Sequence[Part], capabilities: Sequence[str]
) -> Manifest:
    on_gpu, backbone = target in GPU_TARGETS, recipe.backbone
    agreed = {output: found.cosine for part in parts for output, found in part.agreement.items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")}
    if on_gpu:
        versions[target] = load_module(target).__version__
    return Manifest(
        model=backbone.name + (" and R2" if recipe.trained else ""),
        target=target,
        width=backbone.embedding,
        image_resize=backbone.resize,
        image_size=backbone.size,
        mean=backbone.mean,
        std=backbone.std,
        max_tokens=backbone.context,
        calibration=recipe.calibration,
        precision={part.name: part.form for part in parts},
        parity=PENDING if on_gpu else agreed,
        versions=versions,
        sources=recipe.sources,
        files=describe_files(folder),
        head=recipe.trained.shape if recipe.trained else None,
        profiles=_profiles(recipe) if on_gpu else {},
        compute_capabilities=list(capabilities) if target == "tensorrt-rtx" else [],
        onnx_parity=agreed if on_gpu else {},
    )
