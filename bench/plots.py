"""Pictures of what a benchmark found. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bench.accuracy import Watched

TRUE, FOUND, CURVE = "#8fd19e", "#f28e2b", "#30507a"


def plot_queries(watched: Sequence[Watched], hop_s: float, threshold: float, folder: Path) -> None:
    """One PNG a stream: a row a query with its score, the truth behind it and the moments told below it."""
    pyplot = _pyplot()
    for vid, group in groupby(watched, key=lambda w: w.truth.vid):
        queries = list(group)
        figure, axes = pyplot.subplots(
            len(queries), 1, figsize=(12, 0.9 * len(queries) + 1.2), sharex=True, squeeze=False, layout="constrained"
        )
        for axis, query in zip(axes[:, 0], queries, strict=True):
            for start, end in query.truth.windows:
                axis.axvspan(start, end, color=TRUE, lw=0)
            for moment in query.closed:
                axis.plot((moment.start_s, moment.end_s), (-0.1, -0.1), color=FOUND, lw=4, solid_capstyle="butt")
            axis.step((np.arange(len(query.scores)) + 1) * hop_s, query.scores, where="pre", color=CURVE, lw=1)
            axis.axhline(threshold, color="grey", lw=0.6, ls=":")
            axis.set(ylim=(-0.2, 1.05), xlim=(0, query.truth.duration), yticks=(0, 1))
            axis.set_title(query.truth.query, fontsize=8, loc="left", pad=2)
        axes[-1, 0].set_xlabel("stream time in s   (green: true, curve: score, orange: moments told)")
        figure.savefig(folder / f"{vid}.png", dpi=110)
        pyplot.close(figure)


def plot_latency(event_ms: NDArray[np.float64], client_ms: NDArray[np.float64], path: Path) -> None:
    """Histogram of glass to event and glass to client, one PNG."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 3), layout="constrained")
    edges = np.linspace(0, np.percentile(np.concatenate([event_ms, client_ms]), 99.5), 60).tolist()
    for values, label, colour in ((event_ms, "glass to event", CURVE), (client_ms, "glass to client", FOUND)):
        p50, p95 = np.percentile(values, (50, 95))
        axis.hist(
            values, edges, density=True, alpha=0.6, color=colour, label=f"{label}: p50 {p50:.0f}, p95 {p95:.0f} ms"
        )
    axis.set(xlabel="ms", yticks=[])
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_cost(queries: Sequence[int], cost: dict[str, list[float]], again: dict[str, float], path: Path) -> None:
    """What a window costs over the number of queries, in image towers, beside running a whole buffer for each."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for (runtime, values), colour in zip(cost.items(), (FOUND, CURVE), strict=True):
        axis.plot(queries, values, "o-", color=colour, label=f"causal window, {runtime}")
        whole = [again[runtime] * number for number in queries]
        axis.plot(queries, whole, ":", color=colour, label=f"published model again for each, {runtime}")
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="queries on one stream", ylabel="image tower = 1")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    """matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
