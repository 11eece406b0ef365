"""Saliency over time: truth, score and moments, a row a query. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRUE, FOUND, CURVE = "#8fd19e", "#f28e2b", "#30507a"


@dataclass(frozen=True, eq=False)
class Curve:
    """One query on one stream."""

    title: str
    duration_s: float
    true: NDArray[np.float64]  # (n, 2) s
    told: Sequence[tuple[float, float]]  # moments, s
    times_s: NDArray[np.float64]  # (m,) when each score was known
    scores: NDArray[np.float64]  # (m,) in [0, 1]


def plot_curves(curves: Sequence[Curve], threshold: float, path: Path) -> None:
    """Write one PNG; streams below each other share the axis of time."""
    figure, axes = pyplot().subplots(
        len(curves), 1, figsize=(12, 0.9 * len(curves) + 1.2), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, curve in zip(axes[:, 0], curves, strict=True):
        for start, end in curve.true:
            axis.axvspan(start, end, color=TRUE, lw=0)
        for start, end in curve.told:
            axis.plot((start, end), (-0.1, -0.1), color=FOUND, lw=4, solid_capstyle="butt")
        axis.step(curve.times_s, curve.scores, where="pre", color=CURVE, lw=1)
        axis.axhline(threshold, color="grey", lw=0.6, ls=":")
        axis.set(ylim=(-0.2, 1.05), xlim=(0, curve.duration_s), yticks=(0, 1))
        axis.set_title(curve.title, fontsize=8, loc="left", pad=2)
    axes[-1, 0].set_xlabel("stream time in s   (green: true, curve: score, orange: moments told)")
    save(figure, path)


def pyplot() -> Any:
    """matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """As PNG, and let go of it."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
