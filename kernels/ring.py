"""Attention of one new window per row over what it remembers, and how rows move: the reference of cuda/ring.cu.

It is models/temporal.py `Attention.turn` and `ring` between the projections, and `TemporalState.append`, in numpy.
Rings are written in place. Their keys stand turned by their slot; they may be stored as fp16, the arithmetic is fp32.

Letters: R rows (one stream and query each), H heads, W windows that a ring holds, D channels of a head.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ring = NDArray[np.float32] | NDArray[np.float16]
Counts = NDArray[np.int64]
Active = NDArray[np.uint8] | None

WIDEST = 128  # D at most, in the kernel
LONGEST = 128  # W at most, in the kernel


def ring_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    keys: Ring,
    values: Ring,
    count: Counts,
    rates: Floats,
    active: Active = None,
) -> Floats:
    """The new window against itself and the W - 1 before it; its key and value then stand in the rings.

    Args:
        query: (R, H, D) already divided by the root of D.
        key, value: (R, H, D) of the new window, not turned.
        keys, values: (R, H, W, D), written at slot count % W of the active rows.
        count: (R,) windows that each row saw before this one; it is left alone, see `advance`.
        rates: (D,) radians per window, the second half the same as the first.
        active: (R,) 0 where there is no new window: such a row gives 0 and keeps its rings. None: all are active.
    Returns:
        (R, H, D).
    """
    rows = _rows(count, active)
    q, k, v, seen = query[rows], key[rows], value[rows], count[rows]
    window = keys.shape[2]
    slot, slots = seen % window, np.arange(window)
    now = (q * k).sum(-1, keepdims=True)  # (R, H, 1): age 0
    # Keys behind the slot are of the round before: against them the query stands one round later.
    place = np.stack([slot, slot + window], 1)[:, None, :, None]  # (R, 1, 2, 1)
    past = _turned(q[:, :, None], place, rates) @ _floats(keys[rows]).swapaxes(-1, -2)  # (R, H, 2, W)
    past = np.where((slots < slot[:, None])[:, None], past[:, :, 0], past[:, :, 1])
    there = (slots < seen[:, None]) & (slots != slot[:, None])  # what stands in the slot is too old by one
    past = np.where(there[:, None], past, np.float32(-np.inf))
    highest = np.maximum(past.max(-1, keepdims=True), now)
    weights, own = np.exp(past - highest), np.exp(now - highest)  # (R, H, W), (R, H, 1)
    old = (weights[:, :, None] @ _floats(values[rows]))[:, :, 0]
    mixed = np.zeros_like(query)
    mixed[rows] = (old + own * v) / (weights.sum(-1, keepdims=True) + own)
    keys[rows, :, slot] = _turned(k, slot[:, None, None], rates)
    values[rows, :, slot] = v
    return mixed


def append(ring: Ring, columns: Floats, count: Counts, active: Active = None) -> None:
    """Columns (R, A, B) -> slot count % L of rings (R, A, L, B), in place, of the active rows alone."""
    rows = _rows(count, active)
    ring[rows, :, count[rows] % ring.shape[2]] = columns[rows]


def advance(count: Counts, active: Active = None) -> None:
    """The last of a window, once all rings took it in."""
    count[_rows(count, active)] += 1


def gather_rows(old: NDArray[Any], place: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[Any]:
    """Rows after queries came or went: row r is what lay at place[r], or 0 where that is negative."""
    new = np.zeros((len(place), *old.shape[1:]), old.dtype)
    kept = place >= 0
    new[kept] = old[place[kept]]
    return new


def _rows(count: Counts, active: Active) -> NDArray[np.intp]:
    return np.arange(len(count)) if active is None else np.flatnonzero(active)


def _floats(ring: Ring) -> Floats:
    return ring.astype(np.float32, copy=False)


def _turned(x: Floats, place: NDArray[np.int64], rates: Floats) -> Floats:
    """x (.., D) turned by its place: channels i and i + D / 2 span a plane."""
    angle = place.astype(np.float32) * rates
    first, second = np.split(x, 2, -1)
    turned: Floats = x * np.cos(angle) + np.concatenate([-second, first], -1) * np.sin(angle)
    return turned
