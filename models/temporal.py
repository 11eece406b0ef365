"""Attention over time in three forms with one set of weights, and the state that makes the causal one stream.

    whole    every window sees every other (mode `clip`)
    banded   window t sees t-W+1 .. t, all windows at once: training, prefill
    ring     one new window per row against the W-1 before it, read from a ring buffer: serving

The causal forms know positions as ages only: scores are those of rotary embeddings (Su et al. 2021, arXiv:2104.09864,
equation 16), with angles that never exceed 2 W whatever the time, because absolute ones lose 1e-4 in fp32 after some
10,000 windows. Keys are therefore kept unrotated.

Letters: R rows (one stream and query each), B batch, T windows, N keys, C width, H heads, K depth steps, W band.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_ROTARY_BASE = 10_000.0


class Columns(NamedTuple):
    """What one new window adds to the state."""

    keys: Tensor  # (R, K, C), unrotated
    values: Tensor  # (R, K, C)
    history: Tensor  # (R, E): what the causal convolutions read again later


@dataclass
class TemporalState:
    """All that is remembered of the past, apart from the weights. A row is a slot for one (stream, query).

    Rings are written in place at `count % length`; a row with count 0 has no past, whatever its rings still hold.
    """

    keys: Tensor  # (R, K, W, C): a ring for each depth step, unrotated
    values: Tensor  # (R, K, W, C)
    history: Tensor  # (R, reach, E)
    count: Tensor  # (R,) int64: windows seen

    def append(self, columns: Columns, active: Tensor | None = None) -> None:
        """Take in one window. Rows that are not `active`, (R,) bool, stay as they were: idle streams, empty slots."""
        rows = torch.arange(len(self.count)) if active is None else active.nonzero().squeeze(1)
        rows = rows.to(self.count.device)
        slot, turn = self.count[rows] % self.keys.shape[2], self.count[rows] % self.history.shape[1]
        self.keys[rows, :, slot] = columns.keys[rows]
        self.values[rows, :, slot] = columns.values[rows]
        self.history[rows, turn] = columns.history[rows]
        self.count[rows] += 1

    def reset(self, rows: Tensor) -> None:
        """Forget the past of some rows, (n,) int64 or (R,) bool: what a slot needs when another query opens it."""
        self.count[rows] = 0

    def put(self, row: int, other: "TemporalState") -> None:
        """Copy the only row of `other`, as `R2.prefill` returns it, into a slot: a query that joins with its past."""
        for name in ("keys", "values", "history", "count"):
            getattr(self, name)[row] = getattr(other, name)[0]


def ring_ages(count: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Age of what stands in each slot of a ring for the window that comes now, and whether it is there at all.

    count (R,) -> ages (R, length) in 0 .. length-1, present (R, length). Age 0 is the slot that the new window will
    take: what it holds is too old by one.
    """
    age = (count[:, None] - torch.arange(length, device=count.device)) % length
    return age, (age > 0) & (age <= count[:, None])


def unrolled(ring: Tensor, count: Tensor) -> Tensor:
    """(R, length, X) -> the same from oldest to newest, zero where nothing was seen yet."""
    length = ring.shape[1]
    steps = torch.arange(length, device=count.device)
    slots = (count[:, None] + steps) % length
    there = steps >= length - count[:, None]
    return torch.where(there[..., None], ring[torch.arange(len(count), device=count.device)[:, None], slots], 0.0)


def rolled(columns: Tensor, count: Tensor) -> Tensor:
    """The inverse of `unrolled`: the newest columns (R, length, X) as the ring of rows that saw `count` windows."""
    length = columns.shape[1]
    steps = (torch.arange(length, device=count.device) - count[:, None]) % length
    return columns[torch.arange(len(count), device=count.device)[:, None], steps]


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Positions of mode `clip`, (T, C): 1 .. T scaled to 2 pi, sine on even and cosine on odd channels."""
    place = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * torch.pi)
    channel = torch.arange(width, device=device) // 2 * 2
    angle = place[:, None] / 10_000.0 ** (channel / width)
    return torch.where(torch.arange(width, device=device) % 2 == 0, angle.sin(), angle.cos())


class Attention(nn.Module):
    """Multi-head attention; (.., C) is seen as H heads of C / H."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        size = width // heads
        # A constant of the architecture, not of a checkpoint.
        rates = _ROTARY_BASE ** (-torch.arange(0, size, 2) / size)
        self.rates = nn.Buffer(torch.cat([rates, rates]), persistent=False)  # (C / H,)

    def split(self, x: Tensor) -> Tensor:
        """(.., N, C) -> (.., H, N, C / H)."""
        return self._parts(x).transpose(-3, -2)

    def whole(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Projected queries (B, T, C), keys and values (B, N, C), mask (B, N) bool, true where there is a key."""
        seen = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(self.split(queries), self.split(keys), self.split(values), seen)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def banded(self, queries: Tensor, keys: Tensor, values: Tensor, before: Tensor, band: int) -> Tensor:
        """Each window against itself and the band - 1 before it.

        queries (B, T, C); keys and values (B, band + T, C), whose first `band` are the past, oldest first; of these
        only the last `before`, (B,), exist. Blocks of `band` queries see two blocks of keys, so the cost grows with T,
        not with its square.
        """
        batch, length, width = queries.shape
        short = -length % band
        blocks = (length + short) // band
        q, k, v = (F.pad(x, (0, 0, 0, short)).view(batch, -1, band, width) for x in (queries, keys, values))
        k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2) for x in (k, v))  # (B, blocks, 2 band, C)
        place = torch.arange(2 * band, device=q.device)
        age = place[band:, None] - place  # (band, 2 band)
        start = torch.arange(blocks, device=q.device)[:, None] * band + place  # of a key, in keys' own counting
        there = start >= band - before.clamp(max=band)[:, None, None]  # (B, blocks, 2 band)
        seen = ((age >= 0) & (age < band)) & there[:, :, None]  # (B, blocks, band, 2 band)
        q, k = self._rotate(self.split(q), place[band:]), self._rotate(self.split(k), place)
        mixed = F.scaled_dot_product_attention(q, k, self.split(v), seen[:, :, None])
        out: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2).flatten(1, 2)[:, :length])
        return out

    def ring(
        self, queries: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, age: Tensor, present: Tensor
    ) -> Tensor:
        """One new window per row against its own key and value, all (R, C), and the ring (R, W, C) of those before."""
        q = self._parts(queries)  # (R, H, C / H)
        scale = q.shape[-1] ** -0.5
        angle = age[..., None].to(q.dtype) * self.rates  # (R, W, C / H)
        # Turning the one query forward by each key's age is turning each key back by it.
        turned = q[:, None] * angle.cos()[:, :, None] + _quarter(q)[:, None] * angle.sin()[:, :, None]
        past = (turned * self._parts(keys)).sum(-1) * scale  # (R, W, H)
        past = past.masked_fill(~present[..., None], float("-inf"))
        now = (q * self._parts(key)).sum(-1) * scale  # (R, H)
        weights = torch.cat([past, now[:, None]], 1).softmax(1)[..., None]  # (R, W + 1, H, 1)
        mixed = (weights[:, :-1] * self._parts(values)).sum(1).flatten(-2)
        mixed = mixed + (weights[:, -1] * self._parts(value)).flatten(-2)
        out: Tensor = self.out(mixed)
        return out

    def _parts(self, x: Tensor) -> Tensor:
        """(.., C) -> (.., H, C / H)."""
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def _rotate(self, x: Tensor, place: Tensor) -> Tensor:
        """x (.., N, C / H) turned by its places (N,)."""
        angle = place[:, None].to(x.dtype) * self.rates
        return x * angle.cos() + _quarter(x) * angle.sin()


def _quarter(x: Tensor) -> Tensor:
    """x turned by 90 degrees, in the planes that channels i and i + half span."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
