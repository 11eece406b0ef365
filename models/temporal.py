"""Attention over time in three forms with one set of weights, and the state that makes the causal one stream.

    whole    every window sees every other (mode `clip`); also how a window reads the words of a query
    banded   window t sees t-W+1 .. t, all windows at once: training, prefill
    ring     one new window per row against the W-1 before it, read from a ring buffer: serving

The causal forms know positions as ages only: scores are those of rotary embeddings (Su et al. 2021, arXiv:2104.09864,
equation 16). No angle ever exceeds that of 2 W windows, because absolute ones lose 1e-4 in fp32 after some 10,000: a
ring's keys are turned by their slot, and the query by its own slot or, for keys of the round before, one round more.

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

    keys: tuple[Tensor, ...]  # K of (R, H, C / H), turned by the slot they go to
    values: tuple[Tensor, ...]  # K of (R, H, C / H)
    history: Tensor  # (R, E): what the causal convolutions read again later


@dataclass
class TemporalState:
    """All that is remembered of the past, apart from the weights. A row is a slot for one (stream, query).

    Rings are written in place at `count % length`. Each depth step has rings of its own, as tensors of their own: an
    engine would copy them out of a common one.
    """

    keys: list[Tensor]  # K of (R, H, W, C / H), turned by their slot
    values: list[Tensor]  # K of (R, H, W, C / H)
    history: Tensor  # (R, reach, E)
    count: Tensor  # (R,) int64: windows seen

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, self.history, self.count]

    def append(self, columns: Columns, active: Tensor | None = None) -> None:
        """Take in one window. Rows that are not `active`, (R,) bool, stay as they were: idle streams, empty slots."""
        rows = torch.arange(self.count.shape[0], device=self.count.device)
        if active is not None:
            rows = rows[active]
        seen = self.count[rows]
        slot, turn = seen % self.keys[0].shape[2], seen % self.history.shape[1]
        for ring, new in zip((*self.keys, *self.values), (*columns.keys, *columns.values), strict=True):
            ring[rows, :, slot] = new[rows]
        self.history[rows, turn] = columns.history[rows]
        self.count[rows] += 1

    def reset(self, rows: Tensor) -> None:
        """Forget the past of some rows, (n,) int64 or (R,) bool: what a slot needs when another query opens it."""
        for tensor in self.tensors:  # all of it: what is not a number outlives any mask
            tensor[rows] = 0

    def put(self, row: int, other: "TemporalState") -> None:
        """Copy the only row of `other`, as `R2.prefill` returns it, into a slot: a query that joins with its past."""
        for own, new in zip(self.tensors, other.tensors, strict=True):
            own[row] = new[0]


def unrolled(ring: Tensor, count: Tensor) -> Tensor:
    """(R, length, X) -> the same from oldest to newest, zero where nothing was seen yet."""
    length = ring.shape[1]
    steps = torch.arange(length, device=count.device)
    there = steps >= length - count[:, None]
    return torch.where(there[..., None], ring.take_along_dim(((count[:, None] + steps) % length)[..., None], 1), 0.0)


def rolled(columns: Tensor, count: Tensor) -> Tensor:
    """The inverse of `unrolled`: the newest columns (R, length, X) as the ring of rows that saw `count` windows."""
    length = columns.shape[1]
    steps = torch.arange(length, device=count.device)
    return columns.take_along_dim(((steps - count[:, None]) % length)[..., None], 1)


def masking(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores before a softmax or a maximum: 0 where `mask` is true, -inf elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Positions of mode `clip`, (T, C): 1 .. T scaled to 2 pi, sine on even and cosine on odd channels."""
    place = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * torch.pi)
    channel = torch.arange(width, device=device) // 2 * 2
    angle = place[:, None] / 10_000.0 ** (channel / width)
    return torch.where(torch.arange(width, device=device) % 2 == 0, angle.sin(), angle.cos())


class Turn(NamedTuple):
    """What a ring knows of time, for the window that comes now; the same for all depth steps."""

    cos: Tensor  # (R, 1, 2, C / H): of the slot that the window takes, and of that slot one round later
    sin: Tensor
    bias: Tensor  # (R, 1, 2, W): 0 where that query and that slot belong together, -inf elsewhere


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

    def whole(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, T, C) or (B, C); keys and values (B, H, N, C / H), see `split`; bias (B, N), -inf on padding."""
        if x.ndim == 2:  # by hand: engines run this as three operators
            scores = self._single(self._scaled(x)) @ keys.mT  # (B, H, 1, N)
            scores = scores if bias is None else scores + bias[:, None, None]
            mixed = (scores.softmax(-1) @ values).flatten(1)
        else:
            mask = None if bias is None else bias[:, None, None]
            mixed = F.scaled_dot_product_attention(self.split(self.query(x)), keys, values, mask)
            mixed = mixed.transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed)
        return out

    def banded(
        self, x: Tensor, keys: Tensor, values: Tensor, before: Tensor, band: int, visible: Tensor | None = None
    ) -> Tensor:
        """Each window against itself and the band - 1 before it, or those of them that are `visible`, (B, T) bool.

        x (B, T, C); keys and values (B, band + T, C), whose first `band` are the past, oldest first; of these only the
        last `before`, (B,), exist. Blocks of `band` queries see two blocks of keys, so the cost grows with T, not with
        its square.
        """
        batch, length, width = x.shape
        short = -length % band
        q, k, v = (F.pad(each, (0, 0, 0, short)).view(batch, -1, band, width) for each in (self.query(x), keys, values))
        k, v = (torch.cat([each[:, :-1], each[:, 1:]], 2) for each in (k, v))  # (B, blocks, 2 band, C)
        place = torch.arange(2 * band, device=x.device)
        age = place[band:, None] - place  # (band, 2 band)
        start = torch.arange(k.shape[1], device=x.device)[:, None] * band + place  # of a key, in keys' own counting
        there = start >= band - before.clamp(max=band)[:, None, None]  # (B, blocks, 2 band)
        if visible is not None:
            shown = F.pad(visible, (band, short), value=True).view(batch, -1, band)
            there = there & torch.cat([shown[:, :-1], shown[:, 1:]], 2)
        # A window always sees itself: a softmax over nothing is not a number.
        seen = ((age >= 0) & (age < band)) & (there[:, :, None] | (age == 0))  # (B, blocks, band, 2 band)
        q, k = self._turned(self.split(q), place[band:]), self._turned(self.split(k), place)
        mixed = F.scaled_dot_product_attention(q, k, self.split(v), seen[:, :, None])
        out: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2).flatten(1, 2)[:, :length])
        return out

    def turn(self, count: Tensor, band: int) -> Turn:
        """For rows that have seen `count`, (R,), windows."""
        slot, slots = (count % band)[:, None], torch.arange(band, device=count.device)
        angle = torch.cat([slot, slot + band], 1)[:, None, :, None].to(self.rates.dtype) * self.rates
        there = slots < count[:, None]  # what stands at the window's own slot is too old by one
        seen = torch.stack([there & (slots < slot), there & (slots > slot)], 1)[:, None]  # (R, 1, 2, W)
        return Turn(angle.cos(), angle.sin(), masking(seen, angle.dtype))

    def ring(self, x: Tensor, keys: Tensor, values: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """One new window per row, x (R, C), against itself and the rings of those before -> mixed, its key and value.

        The key comes back as the ring wants it.
        """
        q, key, value = (self._single(each) for each in (self._scaled(x), self.key(x), self.value(x)))
        now = (q * key).sum(-1)  # (R, H, 1): age 0
        both = torch.cat([q, key], 1)
        q, key = (both * turn.cos + _quarter(both) * turn.sin).chunk(2, 1)  # (R, H, 2, C / H)
        past = (q @ keys.mT + turn.bias).flatten(2)  # (R, H, 2 W), half of it -inf
        weights = torch.cat([past, now], -1).softmax(-1)[:, :, None]
        band = keys.shape[2]
        old = (weights[..., :band] + weights[..., band:-1]) @ values  # (R, H, 1, C / H)
        out: Tensor = self.out((old + weights[..., -1:] * value).flatten(1))
        return out, key[:, :, 0], value[:, :, 0]

    def recalled(self, keys: Tensor, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Rings -> the keys and values they hold, (R, W, C), oldest first, the keys not turned."""
        back = self._turned(keys, -torch.arange(keys.shape[2], device=keys.device))
        key, value = (unrolled(each.transpose(1, 2).flatten(2), count) for each in (back, values))
        return key, value

    def ringed(self, keys: Tensor, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `recalled`, once `count` windows were seen."""
        key, value = (self.split(rolled(each, count)) for each in (keys, values))
        return self._turned(key, torch.arange(key.shape[2], device=key.device)), value.contiguous()

    def _scaled(self, x: Tensor) -> Tensor:
        queries: Tensor = self.query(x) * (x.shape[-1] // self.heads) ** -0.5
        return queries

    def _parts(self, x: Tensor) -> Tensor:
        """(.., C) -> (.., H, C / H)."""
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def _single(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, H, 1, C / H)."""
        return x.view(x.shape[0], self.heads, 1, x.shape[-1] // self.heads)

    def _turned(self, x: Tensor, place: Tensor) -> Tensor:
        """x (.., N, C / H) turned by its places (N,)."""
        angle = place[:, None].to(self.rates.dtype) * self.rates  # bfloat16 counts to 256
        return x * angle.cos() + _quarter(x) * angle.sin()


def _quarter(x: Tensor) -> Tensor:
    """x turned by 90 degrees, in the planes that channels i and i + half span."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
