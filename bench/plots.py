"""Pictures of what a benchmark found. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.picture import CURVE, FOUND, Curve, plot_curves, pyplot, save

if TYPE_CHECKING:
    from bench.accuracy import Watched


def plot_queries(watched: Sequence[Watched], hop_s: float, threshold: float, folder: Path) -> None:
    """One PNG a stream: a row a query with its score, the truth behind it and the moments told below it."""
    for vid, group in groupby(watched, key=lambda w: w.truth.vid):
        curves = [
            Curve(
                query.truth.query,
                query.truth.duration,
                query.truth.windows,
                [(moment.start_s, moment.end_s) for moment in query.closed],
                np.arange(1, len(query.scores) + 1, dtype=np.float64) * hop_s,
                query.scores,
            )
            for query in group
        ]
        plot_curves(curves, threshold, folder / f"{vid}.png")


def plot_latency(event_ms: NDArray[np.float64], client_ms: NDArray[np.float64], path: Path) -> None:
    """Histogram of glass to event and glass to client, one PNG."""
    figure, axis = pyplot().subplots(figsize=(8, 3), layout="constrained")
    edges = np.linspace(0, np.percentile(np.concatenate([event_ms, client_ms]), 99.5), 60).tolist()
    for values, label, colour in ((event_ms, "glass to event", CURVE), (client_ms, "glass to client", FOUND)):
        p50, p95 = np.percentile(values, (50, 95))
        axis.hist(
            values, edges, density=True, alpha=0.6, color=colour, label=f"{label}: p50 {p50:.0f}, p95 {p95:.0f} ms"
        )
    axis.set(xlabel="ms", yticks=[])
    axis.legend(frameon=False)
    save(figure, path)


def plot_cost(queries: Sequence[int], cost: dict[str, list[float]], again: dict[str, float], path: Path) -> None:
    """What a window costs over the number of queries, in image towers, beside running a whole buffer for each."""
    figure, axis = pyplot().subplots(figsize=(8, 3.5), layout="constrained")
    for (runtime, values), colour in zip(cost.items(), (FOUND, CURVE), strict=True):
        axis.plot(queries, values, "o-", color=colour, label=f"causal window, {runtime}")
        whole = [again[runtime] * number for number in queries]
        axis.plot(queries, whole, ":", color=colour, label=f"published model again for each, {runtime}")
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="queries on one stream", ylabel="image tower = 1")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_capacity(streams: Sequence[int], p95_ms: Sequence[float | None], limit_ms: float, path: Path) -> None:
    """Glass to client over the number of streams, one PNG. None: no event came."""
    figure, axis = pyplot().subplots(figsize=(8, 3), layout="constrained")
    known = [np.nan if value is None else value for value in p95_ms]
    axis.plot(streams, known, "o-", color=CURVE, label="glass to client, p95")
    axis.axhline(limit_ms, color=FOUND, lw=1, label="borne up to here")
    axis.set(xlabel="streams", ylabel="ms", xlim=(0, None), yscale="log")
    axis.legend(frameon=False)
    save(figure, path)


def plot_soak(
    minutes: NDArray[np.float64],
    rss_mb: NDArray[np.float64],
    late_minutes: NDArray[np.float64],
    p95_ms: NDArray[np.float64],
    path: Path,
) -> None:
    """Resident memory and glass to client over time, one PNG."""
    figure, (memory, late) = pyplot().subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    memory.plot(minutes, rss_mb, color=CURVE)
    memory.set(ylabel="resident, MB", ylim=(0, 1.1 * float(rss_mb.max())))
    late.plot(late_minutes, p95_ms, ".-", color=FOUND)
    late.set(xlabel="minutes", ylabel="glass to client, p95 ms")
    late.set_ylim(bottom=0)
    save(figure, path)
