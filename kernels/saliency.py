"""Calibrated zero-shot saliency: how strongly a window answers each query, on a scale that all queries share. Pure.

A raw similarity says little by itself: a query that resembles many things scores high on everything. Each query
therefore brings its own background, the level and spread of its similarity to all that the backbone knows, and its
similarity to the window is counted in spreads above that level. This needs no stream: a query is comparable from the
first window on, and a scene that stays for an hour is not taken for background. A window in turn may bring how strongly
it answers distractors, texts that nobody asked for: what resembles everything then raises no query.

For one stream on the CPU, and the reference of cuda/saliency.cu for the rows of many.

Letters: S streams, R rows (one stream and query each), Q queries, M distractors, D width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """The constants of a backbone, from its manifest."""

    floor: float  # length that a window's vector must exceed to count in full: it quiets grey and black pictures
    centre: float  # spreads above the level that make a score of 0.5
    slope: float  # of the logistic curve there, per spread
    temperature: float = 0.0  # of the distractors, in cosines; more than 0 where there are any


def saliency(
    window: Floats,
    queries: Floats,
    level: Floats,
    spread: Floats,
    calibration: Calibration,
    distractors: Floats | None = None,
) -> tuple[Floats, Floats]:
    """One window against Q queries.

    Args:
        window: (D,) mean of the window's frames, not normalised.
        queries: (Q, D) unit norm.
        level, spread: (Q,) background of each query.
        distractors: (M, D) unit norm.
    Returns:
        raw (Q,), a cosine that shrinks towards 0 where there is little to see, and score (Q,) in [0, 1].
    """
    unit = units(window[None], calibration.floor)
    raw = queries @ unit[0]
    return raw, _score(raw, level, spread, background(unit, distractors, calibration.temperature), calibration)


def row_saliency(
    windows: Floats,
    row_stream: NDArray[np.int32],
    queries: Floats,
    level: Floats,
    spread: Floats,
    calibration: Calibration,
    distractors: Floats | None = None,
) -> tuple[Floats, Floats]:
    """One window of each of S streams, (S, D), against the rows: `row_stream` (R,) says which of them a row reads.

    Else as `saliency`, R for Q. A stream without a new window may hold NaN: its rows then score NaN.
    """
    unit = units(windows, calibration.floor)
    raw = np.einsum("rd,rd->r", queries, unit[row_stream])
    common = background(unit, distractors, calibration.temperature)[row_stream]
    return raw, _score(raw, level, spread, common, calibration)


def crossings(score: Floats, threshold: Floats, state: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Rows, ascending, that now stand on the other side of their threshold (R,).

    `state` (R,) is 1 while a row is at or above it, and written in place. A score that is not a number changes nothing.
    """
    above = score >= threshold
    rows = np.flatnonzero((above != state) & ~np.isnan(score))
    state[rows] = above[rows]
    return rows


def units(windows: Floats, floor: float) -> Floats:
    """(S, D) at length 1, or less where they are not much longer than `floor`."""
    length = np.sqrt(np.einsum("sd,sd->s", windows, windows) + np.float32(floor**2))
    unit: Floats = windows / length[:, None]
    return unit


def background(unit: Floats, distractors: Floats | None, temperature: float) -> Floats:
    """How strongly windows (S, D) of `units` answer texts that nobody asked for, (M, D): log of their mean, (S,).

    Raises:
        ValueError: distractors without a temperature.
    """
    if distractors is None or not len(distractors):
        return np.zeros(len(unit), np.float32)
    if temperature <= 0:
        raise ValueError(f"distractors need a temperature above 0, not {temperature:g}")
    answers = unit @ distractors.T / np.float32(temperature)  # (S, M)
    highest = answers.max(1)
    level: Floats = highest + np.log(np.exp(answers - highest[:, None]).mean(1))
    return level


def _score(raw: Floats, level: Floats, spread: Floats, common: Floats, calibration: Calibration) -> Floats:
    return logistic((raw - level) / spread - common, calibration.centre, calibration.slope)


def logistic(x: Floats, centre: float, slope: float) -> Floats:
    """0.5 at `centre`, and `slope` steep there, in float32."""
    # Beyond +-30 it is 0 or 1 in float32 anyway, and its exponential would overflow in time.
    score: Floats = 1 / (1 + np.exp(-np.clip(slope * (x - centre), -30, 30)))
    return score
