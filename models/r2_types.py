"""What R2 takes and gives: its shape, what it keeps of a window and of a query, and what it says of both.

Letters: B batch, T windows, K layers, P patches, L text tokens, C width, H heads, D width of the backbone's embedding.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.errors import ModelError


@dataclass(frozen=True, slots=True)
class R2Config:
    """Shape of the model; a checkpoint carries it."""

    mode: Literal["clip", "causal"]
    video_width: int
    """Of the backbone's image tokens."""
    text_width: int
    """Of its text tokens."""
    embedding: int = 0
    """D of its image embedding, for the zero-shot part of a causal score; 0 leaves that out."""
    floor: float = 0.0
    """Length that an image embedding must exceed to count in full in it, see `models.backbone.Backbone`."""
    depth: int = 4
    """K: how many of the backbone's last layers are read."""
    width: int = 256
    heads: int = 8
    ratio: int = 4
    """Of the feed-forward layer."""
    strides: tuple[int, ...] = (1, 2, 4, 8)
    """Of the temporal pyramid, powers of two, ascending."""
    window: int = 32
    """W, causal only: windows that each depth step sees, the present one included. With 1 the convolutions remember
    nothing either: the model without its temporal buffer."""
    dropout: float = 0.5
    """On the inputs of the maps, in training."""

    def __post_init__(self) -> None:
        if self.mode not in ("clip", "causal"):
            raise ModelError(f'mode must be "clip" or "causal", got {self.mode!r}')
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < (0 if field.name == "embedding" else 1):
                raise ModelError(f"{field.name} must be positive, got {value}")
        if not 0 <= self.floor < math.inf:
            raise ModelError(f"floor must be at least 0, got {self.floor:g}")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be at least 0 and less than 1, got {self.dropout:g}")
        if self.width % (2 * self.heads):
            raise ModelError(f"width must be a multiple of twice the {self.heads} heads, got {self.width}")
        ascending = sorted(set(self.strides))
        if not self.strides or list(self.strides) != ascending or any(s < 1 or s & (s - 1) for s in ascending):
            raise ModelError(f"strides must be powers of two, each larger than the one before, got {self.strides}")


class VideoMaps(NamedTuple):
    """What of a window does not depend on the query: computed once a stream, kept for backfill."""

    tokens: Tensor  # (.., K, 1+P, C): CLS and patches
    embedding: Tensor  # (.., D), of length 1, or less where there is little to see


class WordMaps(NamedTuple):
    """A query as one depth step reads it."""

    tokens: Tensor  # (B, L, C), -inf on padding, which therefore never is the largest
    pooling: Tensor  # (B, L, C): what the spatial pooling asks the tokens of a window
    keys: Tensor  # (B, H, L, C / H), of the cross-attention
    values: Tensor  # (B, H, L, C / H)


class QueryMaps(NamedTuple):
    """What of a query does not depend on the video: computed once when it is subscribed."""

    words: tuple[WordMaps, ...]  # K
    bias: Tensor  # (B, L): 0 on words, -inf on padding
    pooled: Tensor  # (B, C)
    embedding: Tensor  # (B, D + 1), see `models.backbone.Backbone`


class ClipOutputs(NamedTuple):
    """Of a whole recording. Levels longer than T are left out."""

    hidden: Tensor  # (B, T, C)
    cls: Tensor  # (B, K, T, C): mapped CLS tokens, for the contrastive losses
    logits: list[Tensor]  # per level (B, T / stride)
    distances: list[Tensor]  # per level (B, T / stride, 2): to start and end, in windows
    saliency: Tensor  # (B, T)

    def boundaries(self, strides: tuple[int, ...], limit: int = 50) -> Tensor:
        """The likeliest moments of each recording, (B, n, 3): start and end in windows, probability; best first."""
        point = [
            torch.arange(logit.shape[1], device=logit.device) * stride
            for logit, stride in zip(self.logits, strides, strict=False)
        ]
        place, distance = torch.cat(point)[None, :, None], torch.cat(self.distances, 1)
        spans = torch.cat([place - distance[..., :1], place + distance[..., 1:]], -1)
        sure, order = torch.cat(self.logits, 1).sigmoid().sort(descending=True, stable=True)
        return torch.cat([spans.take_along_dim(order[..., None], 1), sure[..., None]], -1)[:, :limit]


class CausalOutputs(NamedTuple):
    """Of one window per row (T is left out) or of T of them."""

    hidden: Tensor  # (.., T, C)
    logits: Tensor  # (.., T, levels)
    distances: Tensor  # (.., T, levels, 2): to start and end of the moment, in windows
    saliency: Tensor  # (.., T)

    def foreground(self) -> tuple[Tensor, Tensor]:
        """Probability (.., T) of being inside a moment, and the distances (.., T, 2) of the level most sure of it."""
        logit, level = self.logits.max(-1)
        chosen = self.distances.take_along_dim(level[..., None, None], -2).squeeze(-2)
        return logit.sigmoid(), chosen
