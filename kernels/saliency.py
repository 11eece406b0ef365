"""Calibrated zero-shot saliency: how strongly a window answers each query, on a scale that all queries share. Pure.

A raw similarity says little by itself: a query that resembles many things scores high on everything. Each query
therefore brings its own background, the level and spread of its similarity to all that the backbone knows, and its
similarity to the window is counted in spreads above that level. This needs no stream: a query is comparable from the
first window on, and a scene that stays for an hour is not taken for background.
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


def saliency(
    window: Floats, queries: Floats, level: Floats, spread: Floats, calibration: Calibration
) -> tuple[Floats, Floats]:
    """One window against Q queries.

    Args:
        window: (D,) mean of the window's frames, not normalised.
        queries: (Q, D) unit norm.
        level, spread: (Q,) background of each query.
    Returns:
        raw (Q,), a cosine that shrinks towards 0 where there is little to see, and score (Q,) in [0, 1].
    """
    raw = queries @ (window / np.sqrt(window @ window + calibration.floor**2))  # (Q,)
    return raw, logistic((raw - level) / spread, calibration.centre, calibration.slope)


def logistic(x: Floats, centre: float, slope: float) -> Floats:
    """0.5 at `centre`, and `slope` steep there, in float32."""
    # Beyond +-30 it is 0 or 1 in float32 anyway, and its exponential would overflow in time.
    score: Floats = 1 / (1 + np.exp(-np.clip(slope * (x - centre), -30, 30)))
    return score
