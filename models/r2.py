"""R2: a query reads the last K layers of a frozen backbone, deepest last, and becomes a saliency over time.

R2-Tuning (Liu et al. 2024, arXiv:2404.00801, section 3) with two temporal modes over one set of modules. `clip` is the
published model, which sees a whole recording at once; `causal` streams: no end points, a band of W windows, rotary ages
and no look-ahead, see `models/temporal.py` and `models/heads.py`. Weights are here, what is remembered of a stream is a
`TemporalState`, and `step` (one window, serving) stands beside `prefill` (many windows at once, training and backfill).

Letters: B batch, R rows (one stream and query each), S streams, T windows, K layers, P patches, L text tokens,
C width, D width of the backbone's embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.errors import ModelError
from models.heads import Earlier, Heads, surest
from models.r2_types import CausalOutputs, ClipOutputs, QueryMaps, R2Config, VideoMaps, WordMaps
from models.temporal import Attention, Columns, TemporalState, masking, rolled, sinusoids, unrolled


class _TemporalLayer(nn.Module):
    """Cross-attention to the query's words, self-attention over time, feed-forward; post-norm."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.cross, self.time = Attention(width, heads), Attention(width, heads)
        self.norm_cross, self.norm_time, self.norm_feed_forward = (nn.LayerNorm(width) for _ in range(3))
        self.expand, self.contract = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(
        self, x: Tensor, words: WordMaps, bias: Tensor, attend: Callable[[Tensor], Tensor], place: Tensor | None
    ) -> Tensor:
        """x (B, T, C) or (R, C); `attend` mixes it over time; `place` is added to what asks the words."""
        asking = x if place is None else x + place
        x = self.norm_cross(x + self.cross.whole(asking, words.keys, words.values, bias))
        x = self.norm_time(x + attend(x))
        y: Tensor = self.norm_feed_forward(x + self.contract(F.relu(self.expand(x))))
        return y


class R2(nn.Module):
    """The model, without the backbone."""

    def __init__(self, config: R2Config) -> None:
        super().__init__()
        self.config = config
        width, depth = config.width, config.depth
        end_points = 2 if config.mode == "clip" else 0
        self.map_video = _map(config.video_width + end_points, width, config.dropout)
        self.map_query = _map(config.text_width, width, config.dropout)
        self.project_video, self.project_query = nn.Linear(width, width), nn.Linear(width, width)
        self.pooling = nn.Parameter(torch.zeros(depth))  # g_k
        self.gate = nn.Parameter(torch.zeros(depth - 1))  # f_k; the first step has nothing to mix with
        self.layer = _TemporalLayer(width, config.heads, config.ratio)
        self.word_weight = nn.Linear(width, 1, bias=False)  # of the adaptive pooling of the query
        self.heads = Heads(width, config.strides)
        if config.mode == "causal" and config.embedding:
            self.zero_shot = nn.Parameter(torch.ones(()))

    def forward(
        self, layers: Tensor, embedding: Tensor, query: QueryMaps, mask: Tensor | None = None
    ) -> ClipOutputs | CausalOutputs:
        """All windows of a recording at once.

        Args:
            layers: of the backbone, (B, T, K, 1+P, width), the deepest last.
            embedding: the backbone's own, (B, T, D).
            query: from `query_maps`.
            mask: (B, T) bool, false on padding at the end, which nothing attends to; mode `clip` only, a causal model
                cannot see it anyway. As published, end points, positions and convolutions still count it in.
        """
        if self.config.mode == "clip":
            return self._whole(layers, query, mask)
        return self.prefill(self.video_maps(layers, embedding), query)[0]

    # -- what does not depend on the other side

    def video_maps(self, layers: Tensor, embedding: Tensor) -> VideoMaps:
        """layers (.., K, 1+P, width), embedding (.., D) -> maps of the same leading axes. Causal only."""
        length = embedding.square().sum(-1, keepdim=True).add(self.config.floor**2).sqrt().clamp(min=1e-12)
        return VideoMaps(self.map_video(layers), embedding / length)

    def query_maps(self, layers: Tensor, embedding: Tensor, mask: Tensor) -> QueryMaps:
        """layers (B, K, L, width), embedding (B, D + 1), mask (B, L) bool, false on padding -> maps."""
        tokens = [self.map_query(layer) for layer in layers.unbind(1)]
        bias = masking(mask, layers.dtype)
        # The heads see the query of the last step, which reads the first of the K layers.
        return QueryMaps(
            tuple(self._words(each, bias) for each in tokens), bias, self._pool(tokens[0], bias), embedding
        )

    def pooled_layers(self, query: QueryMaps) -> Tensor:
        """The words of each layer in one vector, (B, K, C), for the contrastive losses of training."""
        padding = query.bias[..., None].isinf()
        return torch.stack([self._pool(words.tokens.masked_fill(padding, 0), query.bias) for words in query.words], 1)

    def _pool(self, tokens: Tensor, bias: Tensor) -> Tensor:
        weight = (self.word_weight(tokens) + bias[..., None]).softmax(1)
        pooled: Tensor = (weight * tokens).sum(1)
        return pooled

    def _words(self, tokens: Tensor, bias: Tensor) -> WordMaps:
        cross = self.layer.cross
        # (W_q q) (W_v v)^T = ((W_q q) W_v) v^T, and what W_v's bias adds is the same for all of v, so the softmax
        # drops it: the video needs no projection of its own, and that bias never gets a gradient.
        pooling = self.project_query(tokens) @ self.project_video.weight * self.config.width**-0.5
        keys, values = (cross.split(each(tokens)) for each in (cross.key, cross.value))
        return WordMaps(tokens + bias[..., None], pooling, keys.contiguous(), values.contiguous())

    # -- the causal mode

    def new_state(self, rows: int) -> TemporalState:
        """Empty rings for `rows` slots."""
        c, like = self.config, self.pooling
        shape = rows, c.heads, c.window, c.width // c.heads
        keys, values = ([like.new_zeros(shape) for _ in range(c.depth)] for _ in range(2))
        history = like.new_zeros(rows, self.heads.reach, self.heads.column)
        return TemporalState(keys, values, history, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def step(
        self, video: VideoMaps, row_stream: Tensor | None, query: QueryMaps, state: TemporalState
    ) -> tuple[CausalOutputs, Columns]:
        """One window of every stream, for every row.

        The cost does not depend on how many windows there were. The state is read, not changed: hand the columns to
        `TemporalState.append`, which copies far less than a new state would.

        Args:
            video: maps of S streams.
            row_stream: (R,) int64, which of the streams a row watches. None: all watch the only one, which saves a copy
                of its maps a row and makes one large product of many small ones.
            query: maps of R queries.
            state: of R rows.
        """
        if row_stream is None and video.tokens.shape[0] != 1:
            raise ModelError(f"{video.tokens.shape[0]} streams: row_stream must tell which of them each row watches")
        attention, new_keys, new_values = self.layer.time, [], []
        ages = attention.turn(state.count, self.config.window)
        rows, depth = torch.arange(state.count.shape[0], device=state.count.device), self.config.depth

        def tokens(k: int) -> Tensor:
            if row_stream is None:
                return video.tokens[0, k]
            # A copy a depth step: all K at once would not stay in the cache.
            return video.tokens.flatten(0, 1).index_select(0, row_stream * depth + k)

        def attend(k: int, x: Tensor) -> Tensor:
            mixed, key, value = attention.ring(x, state.keys[k], state.values[k], ages)
            new_keys.append(key)
            new_values.append(value)
            return mixed

        lags = torch.tensor(self.heads.lags, device=rows.device)
        turns = ((state.count[:, None] - lags) % self.heads.reach).unbind(1)
        seen = {lag: state.history[rows, turn] for lag, turn in zip(self.heads.lags, turns, strict=True)}
        hidden = self._refine(tokens, query, attend, None)
        embedding = video.embedding if row_stream is None else video.embedding.index_select(0, row_stream)

        def earlier(part: slice, now: Tensor, lag: int) -> Tensor:
            return torch.zeros_like(now) if self.config.window == 1 else seen[lag][:, part]

        outputs, history = self._judge(hidden, embedding, query.pooled, query.embedding, earlier)
        return outputs, Columns(tuple(new_keys[::-1]), tuple(new_values[::-1]), history)

    def prefill(
        self, video: VideoMaps, query: QueryMaps, state: TemporalState | None = None
    ) -> tuple[CausalOutputs, TemporalState]:
        """T windows at once, from the beginning or from `state`: what T steps give, and the state they leave.

        Args:
            video: maps (B, T, ..).
            query: maps of B queries.
            state: of B rows; it is not changed.
        """
        batch, length = video.tokens.shape[:2]
        state = state or self.new_state(batch)
        band, reach = self.config.window, self.heads.reach
        attention, count = self.layer.time, state.count + length
        new_keys, new_values = [], []

        def attend(k: int, x: Tensor) -> Tensor:
            past = attention.recalled(state.keys[k], state.values[k], state.count)
            now = attention.key(x), attention.value(x)
            keys, values = (torch.cat(pair, 1) for pair in zip(past, now, strict=True))
            ring = attention.ringed(keys[:, -band:], values[:, -band:], count)
            new_keys.append(ring[0])
            new_values.append(ring[1])
            return attention.banded(x, keys, values, state.count, band)

        past = unrolled(state.history, state.count)

        def earlier(part: slice, now: Tensor, lag: int) -> Tensor:
            if band == 1:
                return torch.zeros_like(now)
            return torch.cat([past[:, -lag:, part], now], 1)[:, :length]

        hidden = self._refine(lambda k: video.tokens[:, :, k], query, attend, None)
        outputs, history = self._judge(
            hidden, video.embedding, query.pooled[:, None], query.embedding[:, None], earlier
        )
        history = rolled(torch.cat([past, history], 1)[:, -reach:], count)
        return outputs, TemporalState(new_keys[::-1], new_values[::-1], history, count)

    def _judge(
        self, hidden: Tensor, embedding: Tensor, pooled: Tensor, asked: Tensor, earlier: Earlier
    ) -> tuple[CausalOutputs, Tensor]:
        """Of the video hidden (.., C), embedding (.., D); of the query pooled (.., C), asked (.., D + 1); all fit."""
        logits, distances, history = self.heads.causal(hidden, earlier)
        saliency = logits.amax(-1).sigmoid() * F.cosine_similarity(hidden, pooled, dim=-1)
        if self.config.embedding:
            # Without this a query unlike those of the training could fare worse than with the bare backbone.
            saliency = saliency + self.zero_shot * ((embedding * asked[..., :-1]).sum(-1) + asked[..., -1])
        return CausalOutputs(hidden, logits, distances, saliency), history

    # -- the published mode

    def _whole(self, layers: Tensor, query: QueryMaps, mask: Tensor | None) -> ClipOutputs:
        tokens, hidden = self._whole_hidden(layers, query, mask)
        length = layers.shape[1]
        logits, distances = self.heads.whole(hidden)
        if not logits:
            raise ModelError(f"a recording of {length} windows is shorter than each stride of {self.config.strides}")
        saliency = surest(logits, length) * F.cosine_similarity(hidden, query.pooled[:, None], dim=-1)
        return ClipOutputs(hidden, tokens[:, :, :, 0].transpose(1, 2), logits, distances, saliency)

    def _whole_hidden(self, layers: Tensor, query: QueryMaps, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> mapped tokens (B, T, K, 1+P, C), hidden (B, T, C)."""
        length = layers.shape[1]
        # Rounded as published: the first of the two in double precision, their distance in single.
        begin = (torch.arange(length, dtype=torch.float64, device=layers.device) / length).to(layers.dtype)
        ends = torch.stack([begin, begin + 1 / length], -1)[:, None, None].expand(*layers.shape[:-1], 2)
        tokens = torch.stack([self.map_video(layer) for layer in torch.cat([layers, ends], -1).unbind(2)], 2)
        place, attention = sinusoids(length, self.config.width, layers.device), self.layer.time
        bias = None if mask is None else masking(mask, layers.dtype)

        def attend(_k: int, x: Tensor) -> Tensor:
            placed = x + place
            keys, values = attention.split(attention.key(placed)), attention.split(attention.value(x))
            return attention.whole(placed, keys, values, bias)

        return tokens, self._refine(lambda k: tokens[:, :, k], query, attend, place)

    # -- what both modes share

    def encode(self, layers: Tensor, query: QueryMaps, visible: Tensor) -> Tensor:
        """The hidden states of all windows, (B, T, C), without the heads: what the refinement of features trains.

        layers (B, T, K, 1+P, width). Windows that are not `visible`, (B, T) bool, are read by no other window.
        """
        if self.config.mode == "clip":
            return self._whole_hidden(layers, query, visible)[1]
        tokens, band = self.map_video(layers), self.config.window
        attention, before = self.layer.time, layers.new_zeros(len(layers), dtype=torch.int64)

        def attend(_k: int, x: Tensor) -> Tensor:
            keys, values = (F.pad(each(x), (0, 0, band, 0)) for each in (attention.key, attention.value))
            return attention.banded(x, keys, values, before, band, visible)

        return self._refine(lambda k: tokens[:, :, k], query, attend, None)

    def _refine(
        self,
        tokens: Callable[[int], Tensor],
        query: QueryMaps,
        attend: Callable[[int, Tensor], Tensor],
        place: Tensor | None,
    ) -> Tensor:
        """The recurrence over depth (sections 3.2 and 3.3 of the paper) -> hidden, (B, T, C) or (R, C).

        `tokens(k)` are the windows' of layer k, (B, T, 1+P, C), or the window's, (R, 1+P, C) or, one for all rows,
        (1+P, C); `attend(k, x)` mixes x over time.
        """
        hidden: Tensor | None = None
        scales, shares = self.pooling.tanh(), self.gate.sigmoid()
        for k in reversed(range(self.config.depth)):
            words, video = query.words[k], tokens(k)
            asking, names = words.pooling, words.tokens
            if video.ndim == 4:
                asking, names = asking[:, None], names[:, None]
            best = ((asking @ video.mT).softmax(-1) @ video + names).amax(-2)  # over the words
            pooled = video[..., 0, :] + scales[k] * best
            hidden = pooled if hidden is None else shares[k] * pooled + (1 - shares[k]) * hidden
            hidden = self.layer(hidden, words, query.bias, lambda x, k=k: attend(k, x), place)
        assert hidden is not None
        return hidden.relu()  # the pyramid's first level does it in place, so every reader sees it


def _map(inputs: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(inputs),
        nn.Dropout(dropout),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.LayerNorm(width),
        nn.Dropout(dropout),
        nn.Linear(width, width),
    )
