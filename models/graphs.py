"""R2 as functions of plain tensors, for export: state goes in and comes out, nothing mutable hides in a graph.

    video   a window's backbone features      -> VideoMaps       once a stream and window
    query   a text's backbone features        -> QueryMaps       once a query
    step    maps, rings and counts of R rows  -> outputs and the new columns
    solo    step where all rows watch one stream: no `row_stream`, and cheaper

What `video` and `query` give is what `step` takes, under the same names. What a depth step alone reads is a tensor of
its own, numbered by its layer: taken together an engine would copy it apart again at every step.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.r2 import R2
from models.r2_types import CausalOutputs, QueryMaps, VideoMaps, WordMaps
from models.temporal import Columns, TemporalState

_VIDEO = {"video_tokens": ("streams", None, "patches"), "video_embedding": ("streams",)}
_WORDS = {
    "word_tokens": ("rows", "words"),
    "word_pooling": ("rows", "words"),
    "word_keys": ("rows", None, "words"),
    "word_values": ("rows", None, "words"),
}
_QUERY = {"query_bias": ("rows", "words"), "query_pooled": ("rows",), "query_embedding": ("rows",)}
_OUTPUTS = ("logits", "distances", "saliency")


class Graph(NamedTuple):
    """What `kernels.export.export` takes."""

    module: nn.Module
    inputs: Mapping[str, Tensor]  # random examples
    outputs: Sequence[str]
    axes: Mapping[str, Mapping[int, str]]  # of the inputs, those that may have any length


def graphs(model: R2, patches: int) -> dict[str, Graph]:
    """The graphs of a causal model, by name, traced at a few rows and `patches` patches."""
    c, streams, rows, words = model.config, 2, 3, 5
    video = torch.randn(streams, c.depth, 1 + patches, c.video_width), torch.randn(streams, c.embedding)
    texts = torch.randn(rows, c.depth, words, c.text_width), torch.randn(rows, c.embedding + 1)
    mask = torch.ones(rows, words, dtype=torch.bool)
    with torch.no_grad():
        maps, query = model.video_maps(*video), model.query_maps(*texts, mask)
    state = model.new_state(rows)
    state.count[:] = torch.arange(rows)
    axes, outputs = step_axes(c.depth), [*_OUTPUTS, *_each(("new_keys", "new_values"), c.depth), "new_history"]
    step = dict(zip(axes, step_inputs(maps, torch.arange(rows) % streams, query, state), strict=True))
    solo = {name: value[:1] if name in _VIDEO else value for name, value in step.items() if name != "row_stream"}
    solo_axes = {name: {i: axis for i, axis in axes[name].items() if axis != "streams"} for name in solo}
    query_names = [name for name in axes if name.startswith(("word_", "query_"))]
    return {
        "video": Graph(
            _Video(model),
            dict(zip(("layers", "embedding"), video, strict=True)),
            tuple(_VIDEO),
            {"layers": {0: "streams", 2: "patches"}, "embedding": {0: "streams"}},
        ),
        "query": Graph(
            _Query(model),
            dict(zip(("layers", "embedding", "mask"), (*texts, mask), strict=True)),
            query_names,
            {"layers": {0: "rows", 2: "words"}, "embedding": {0: "rows"}, "mask": {0: "rows", 1: "words"}},
        ),
        "step": Graph(_Step(model), step, outputs, axes),
        "solo": Graph(_Step(model, solo=True), solo, outputs, solo_axes),
    }


def step_axes(depth: int) -> dict[str, dict[int, str]]:
    """The inputs of `step` in their order, and which of their axes may have any length."""
    words = {f"{name}_{k}": axes for k in range(depth) for name, axes in _WORDS.items()}
    rings = dict.fromkeys([*_each(("keys", "values"), depth), "history", "count"], ("rows",))
    named = _VIDEO | {"row_stream": ("rows",)} | words | _QUERY | rings
    return {name: {i: axis for i, axis in enumerate(axes) if axis} for name, axes in named.items()}


def step_inputs(video: VideoMaps, row_stream: Tensor, query: QueryMaps, state: TemporalState) -> tuple[Tensor, ...]:
    """The arguments of `R2.step` as the inputs of its graph."""
    return *video, row_stream, *_flat(query), *state.tensors


def step_columns(outputs: Mapping[str, Tensor], depth: int) -> Columns:
    """The columns among the outputs of `step`, by name."""
    keys, values = (tuple(outputs[f"{name}_{k}"] for k in range(depth)) for name in ("new_keys", "new_values"))
    return Columns(keys, values, outputs["new_history"])


class _Video(nn.Module):
    def __init__(self, model: R2) -> None:
        super().__init__()
        self.model = model

    def forward(self, layers: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.video_maps(layers, embedding))


class _Query(nn.Module):
    def __init__(self, model: R2) -> None:
        super().__init__()
        self.model = model

    def forward(self, layers: Tensor, embedding: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.model.query_maps(layers, embedding, mask))


class _Step(nn.Module):
    def __init__(self, model: R2, *, solo: bool = False) -> None:
        super().__init__()
        self.model, self.solo = model, solo

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        depth, given = self.model.config.depth, iter(tensors)
        video = VideoMaps(next(given), next(given))
        row_stream = None if self.solo else next(given)
        words = tuple(WordMaps(*(next(given) for _ in _WORDS)) for _ in range(depth))
        query = QueryMaps(words, next(given), next(given), next(given))
        keys, values = ([next(given) for _ in range(depth)] for _ in range(2))
        outputs: CausalOutputs
        outputs, columns = self.model.step(
            video, row_stream, query, TemporalState(keys, values, next(given), next(given))
        )
        return outputs.logits, outputs.distances, outputs.saliency, *columns.keys, *columns.values, columns.history


def _flat(query: QueryMaps) -> tuple[Tensor, ...]:
    return *(tensor for words in query.words for tensor in words), query.bias, query.pooled, query.embedding


def _each(names: Sequence[str], depth: int) -> list[str]:
    return [f"{name}_{k}" for name in names for k in range(depth)]
