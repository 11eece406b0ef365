"""R2 as functions of plain tensors, for export: state goes in and comes out, nothing mutable hides in a graph.

    video.onnx   a window's backbone features      -> VideoMaps       once a stream and window
    query.onnx   a text's backbone features        -> QueryMaps       once a query
    step.onnx    maps, rings and counts of R rows  -> outputs and the new columns

The inputs of each graph are named as the arguments of its `forward`, its outputs as in OUTPUTS: what `video` and
`query` give is what `step` takes. The axes that may have any length are in AXES. The export is `kernels.export`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.r2 import R2, QueryMaps, VideoMaps
from models.temporal import TemporalState

OUTPUTS = {
    "video": ("video_tokens", "video_projected", "video_embedding"),
    "query": ("query_tokens", "query_projected", "query_keys", "query_values", "query_pooled", "query_embedding"),
    "step": ("logits", "distances", "saliency", "new_keys", "new_values", "new_history"),
}
AXES: dict[str, dict[str, dict[int, str]]] = {
    "video": {"layers": {0: "windows", 2: "patches"}, "embedding": {0: "windows"}},
    "query": {"layers": {0: "rows", 2: "words"}, "embedding": {0: "rows"}, "mask": {0: "rows", 1: "words"}},
    "step": {
        "video_tokens": {0: "streams", 2: "patches"},
        "video_projected": {0: "streams", 2: "patches"},
        "video_embedding": {0: "streams"},
        "row_stream": {0: "rows"},
        "query_tokens": {0: "rows", 2: "words"},
        "query_projected": {0: "rows", 2: "words"},
        "query_keys": {0: "rows", 2: "words"},
        "query_values": {0: "rows", 2: "words"},
        "query_mask": {0: "rows", 1: "words"},
        "query_pooled": {0: "rows"},
        "query_embedding": {0: "rows"},
        "keys": {0: "rows"},
        "values": {0: "rows"},
        "history": {0: "rows"},
        "count": {0: "rows"},
    },
}


class VideoGraph(nn.Module):
    """`R2.video_maps`."""

    def __init__(self, model: R2) -> None:
        super().__init__()
        self.model = model

    def forward(self, layers: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        """layers (S, K, 1+P, width), embedding (S, D)."""
        return tuple(self.model.video_maps(layers, embedding))


class QueryGraph(nn.Module):
    """`R2.query_maps`."""

    def __init__(self, model: R2) -> None:
        super().__init__()
        self.model = model

    def forward(self, layers: Tensor, embedding: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """layers (R, K, L, width), embedding (R, D), mask (R, L) bool."""
        maps = self.model.query_maps(layers, embedding, mask)
        return maps.tokens, maps.projected, maps.keys, maps.values, maps.pooled, maps.embedding


class StepGraph(nn.Module):
    """`R2.step`."""

    def __init__(self, model: R2) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        video_tokens: Tensor,
        video_projected: Tensor,
        video_embedding: Tensor,
        row_stream: Tensor,
        query_tokens: Tensor,
        query_projected: Tensor,
        query_keys: Tensor,
        query_values: Tensor,
        query_mask: Tensor,
        query_pooled: Tensor,
        query_embedding: Tensor,
        keys: Tensor,
        values: Tensor,
        history: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, ...]:
        """Shapes as in `VideoMaps` (S first), `QueryMaps` and `TemporalState` (R first)."""
        video = VideoMaps(video_tokens, video_projected, video_embedding)
        query = QueryMaps(
            query_tokens, query_projected, query_keys, query_values, query_mask, query_pooled, query_embedding
        )
        outputs, columns = self.model.step(video, row_stream, query, TemporalState(keys, values, history, count))
        return outputs.logits, outputs.distances, outputs.saliency, *columns


def graphs(model: R2) -> dict[str, nn.Module]:
    """The modules to export, by name."""
    return {"video": VideoGraph(model), "query": QueryGraph(model), "step": StepGraph(model)}


def examples(model: R2, patches: int, *, streams: int = 2, rows: int = 3, words: int = 5) -> dict[str, dict[str, Any]]:
    """Random inputs of every graph, by graph and argument: what an export traces."""
    c, k = model.config, model.config.depth
    like = torch.randn
    video = like(streams, k, 1 + patches, c.video_width), like(streams, c.embedding)
    mask = torch.ones(rows, words, dtype=torch.bool)
    query = like(rows, k, words, c.text_width), like(rows, c.embedding), mask
    with torch.no_grad():
        maps, asked = model.video_maps(*video), model.query_maps(*query)
    state = model.new_state(rows)
    state.count[:] = torch.arange(rows)
    step = (*maps, torch.arange(rows) % streams, *asked, state.keys, state.values, state.history, state.count)
    # The query's mask goes in beside its maps, in the order of `StepGraph.forward`.
    return {
        name: dict(zip(AXES[name], values, strict=True))
        for name, values in (("video", video), ("query", query), ("step", step))
    }
