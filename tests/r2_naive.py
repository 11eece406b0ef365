"""R2's causal mode, slow and plain: one recording, one query, a loop over windows, nothing remembered.

Written from the description of the model (DESIGN, section 3) and not from `models`, whose weights alone it borrows:
every fast form is held against this one. All of it is in double precision.

Letters: T windows, K layers, P patches, L words, C width, H heads, S levels of the pyramid, D width of the embedding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.r2 import R2


class NaiveOutputs(NamedTuple):
    hidden: Tensor  # (T, C)
    logits: Tensor  # (T, S)
    distances: Tensor  # (T, S, 2)
    saliency: Tensor  # (T,)


def naive(
    model: R2, layers: Tensor, embedding: Tensor, words: Tensor, asked: Tensor, mask: Tensor | None = None
) -> NaiveOutputs:
    """layers (T, K, 1+P, width), embedding (T, D); of the query words (K, L, width), asked (D + 1,), mask (L,) bool."""
    with torch.no_grad():
        if mask is not None:
            words = words[:, mask]  # padding says nothing
        return _Naive(model).judge(layers.double(), embedding.double(), words.double(), asked.double())


class _Naive:
    def __init__(self, model: R2) -> None:
        self.config = model.config
        self.weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}

    def judge(self, layers: Tensor, embedding: Tensor, words: Tensor, asked: Tensor) -> NaiveOutputs:
        query = [self.mapped("map_query", layer) for layer in words]  # K of (L, C)
        hidden = self.refined(self.mapped("map_video", layers), query)
        pooled = self.pooled(query[0])  # the query of the last step, which reads the first of the layers
        logits, distances = zip(*(self.level(hidden, i) for i in range(len(self.config.strides))), strict=True)
        saliency = []
        for t, h in enumerate(hidden):
            likeliest = max(1 / (1 + math.exp(-float(level[t]))) for level in logits)
            score = likeliest * _cosine(h, pooled)
            if self.config.embedding:
                length = torch.sqrt((embedding[t] ** 2).sum() + self.config.floor**2)
                fit = (embedding[t] / length * asked[:-1]).sum() + asked[-1]
                score = score + self.weights["zero_shot"] * fit
            saliency.append(score)
        return NaiveOutputs(hidden, torch.stack(logits, 1), torch.stack(distances, 1), torch.stack(saliency))

    # -- depth

    def refined(self, video: Tensor, query: list[Tensor]) -> Tensor:
        """video (T, K, 1+P, C), query K of (L, C) -> hidden (T, C)."""
        hidden: list[Tensor] = []
        for k in range(self.config.depth - 1, -1, -1):
            pooled = [self.spatial(window[k], query[k], k) for window in video]
            if hidden:
                f = 1 / (1 + torch.exp(-self.weights["gate"][k]))
                pooled = [f * new + (1 - f) * old for new, old in zip(pooled, hidden, strict=True)]
            crossed = [self.norm("layer.norm_cross", x + self.cross(x, query[k])) for x in pooled]
            seen = self.over_time(torch.stack(crossed))
            timed = [self.norm("layer.norm_time", x + y) for x, y in zip(crossed, seen, strict=True)]
            hidden = [self.norm("layer.norm_feed_forward", x + self.feed_forward(x)) for x in timed]
        return torch.stack(hidden).clamp(min=0)

    def spatial(self, video: Tensor, query: Tensor, k: int) -> Tensor:
        """video (1+P, C) and query (L, C) of one window and layer -> (C,)."""
        looked_at = self.linear("project_video", video)
        found = []
        for word in query:
            scores = looked_at @ self.linear("project_query", word) / math.sqrt(self.config.width)
            found.append(_softmax(scores) @ video + word)
        return video[0] + torch.tanh(self.weights["pooling"][k]) * torch.stack(found).amax(0)

    def cross(self, x: Tensor, query: Tensor) -> Tensor:
        """x (C,) asks the words (L, C)."""
        q, keys, values = (self.split(self.linear(f"layer.cross.{n}", y)) for n, y in _asking(x, query))
        mixed = [_softmax(keys[:, h] @ q[h] / math.sqrt(q.shape[-1])) @ values[:, h] for h in range(self.config.heads)]
        return self.linear("layer.cross.out", torch.cat(mixed))

    def over_time(self, x: Tensor) -> Tensor:
        """x (T, C): each window asks itself and the W - 1 before it."""
        q, keys, values = (self.split(self.linear(f"layer.time.{n}", y)) for n, y in _asking(x, x))
        length, heads, size = q.shape
        scores = q.new_full((heads, length, length), -math.inf)
        for t in range(length):
            for n in range(max(0, t - self.config.window + 1), t + 1):
                for h in range(heads):
                    scores[h, t, n] = _rotary(q[t, h], keys[n, h], t - n) / math.sqrt(size)
        mixed = [_softmax(scores[h]) @ values[:, h] for h in range(heads)]
        return self.linear("layer.time.out", torch.cat(mixed, -1))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear("layer.contract", self.linear("layer.expand", x).clamp(min=0))

    def pooled(self, query: Tensor) -> Tensor:
        """(L, C) -> (C,)."""
        share = _softmax(query @ self.weights["word_weight.weight"][0])
        return sum((s * word for s, word in zip(share, query, strict=True)), torch.zeros(()))

    # -- pyramid and heads

    def level(self, hidden: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """hidden (T, C) -> logits (T,), distances (T, 2) of level i."""
        stride, x, place = self.config.strides[i], hidden, 0
        while 2**place < stride:
            name = f"heads.levels.{i}"
            x = self.conv(f"{name}.convs.{place}", x, 2**place)
            x = self.norm(f"{name}.norms.{place}", x).clamp(min=0)
            place += 1
        logit, offset = (self.head(f"heads.{name}", x, stride) for name in ("classify", "locate"))
        return logit[:, 0], torch.exp(offset) * self.weights["heads.scales"][i] * stride

    def head(self, name: str, x: Tensor, stride: int) -> Tensor:
        return self.conv(f"{name}.out", self.conv(f"{name}.hidden", x, stride).clamp(min=0), stride)

    def conv(self, name: str, x: Tensor, apart: int) -> Tensor:
        """x (T, inputs) -> (T, outputs): the last tap reads t, the one before it t - apart, ..; zeros before 0.

        A model whose W is 1 has no memory at all: then all taps but the last read zeros.
        """
        weight, out = self.weights[f"{name}.weight"], []  # (outputs, taps, inputs)
        taps = weight.shape[1]
        for t in range(len(x)):
            y = self.weights[f"{name}.bias"]
            for tap in range(taps):
                at = t - apart * (taps - 1 - tap)
                if at == t or (at >= 0 and self.config.window > 1):
                    y = y + weight[:, tap] @ x[at]
            out.append(y)
        return torch.stack(out)

    # -- small parts

    def mapped(self, name: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.2", self.norm(f"{name}.0", x)).clamp(min=0)
        return self.linear(f"{name}.6", self.norm(f"{name}.4", x))

    def linear(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        y: Tensor = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return y

    def split(self, x: Tensor) -> Tensor:
        """(.., C) -> (.., H, C / H)."""
        return x.reshape(*x.shape[:-1], self.config.heads, -1)


def _asking(x: Tensor, asked: Tensor) -> list[tuple[str, Tensor]]:
    return [("query", x), ("key", asked), ("value", asked)]


def _rotary(query: Tensor, key: Tensor, age: int) -> Tensor:
    """The score of two heads' vectors, `age` windows apart, each pair (i, i + half) of channels a complex number."""
    half = len(query) // 2
    rates = 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / len(query))
    q, k = (torch.complex(x[:half], x[half:]) for x in (query, key))
    return (q * torch.polar(torch.ones_like(rates), age * rates) * k.conj()).real.sum()


def _softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())
