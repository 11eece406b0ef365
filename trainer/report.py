"""What a run came to: a table beside zero-shot, and a picture of a few validation streams."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from models.r2 import R2
from stream.moments import MomentOptions
from stream.output import write
from trainer.dataset import WINDOW_S, Dataset, Sample
from trainer.picture import Curve, plot_curves
from trainer.scoring import Calibration, Measures, calibrate, measures, saliencies, tell, zero_shot

SHOWN = 6
"""Queries in the picture."""


def write_report(
    model: R2, dataset: Dataset, calibration: Calibration, clip_length: int, out: Path, console: Console
) -> dict[str, Measures]:
    """Score the val split, print the table, write `out`/report.json and report.png -> the measures by row of the table.

    Zero-shot is calibrated on the same split as the model, so that neither has the better threshold.
    """
    samples = dataset.samples["val"]
    scores = list(saliencies(model, dataset, samples, clip_length))
    rows = {"trained": measures(dataset, samples, scores, calibration)}
    if model.config.embedding:
        bare = zero_shot(dataset, samples)
        rows["zero-shot"] = measures(dataset, samples, bare, calibrate(samples, bare))
    print_measures(console, rows, "val")
    write(out / "report.json", json.dumps(rows, indent=2) + "\n")
    plot_samples(dataset.hop_s, samples, [calibration(saliency) for saliency in scores], out / "report.png")
    return rows


def print_measures(console: Console, rows: dict[str, Measures], split: str) -> None:
    """A column for each."""
    table = Table()
    table.add_column(split)
    for name in rows:
        table.add_column(name, justify="right")
    for measure in next(iter(rows.values())):
        values = [row[measure] for row in rows.values()]
        table.add_row(measure, *("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def plot_samples(hop_s: float, samples: Sequence[Sample], scores: Sequence[NDArray[np.float64]], path: Path) -> None:
    """Some of the samples that come true, evenly over all of them; scores (T,) are calibrated."""
    true = [place for place, sample in enumerate(samples) if len(sample.windows)]
    chosen = [true[i] for i in np.linspace(0, len(true) - 1, min(SHOWN, len(true))).astype(int)]
    options = MomentOptions()
    curves = []
    for place in chosen:
        sample, score = samples[place], scores[place]
        told = [(moment.start_s, moment.end_s) for moment in tell(sample, score, hop_s, options).closed]
        known_s = np.arange(len(score), dtype=np.float64) * hop_s + WINDOW_S
        curves.append(Curve(f"{sample.vid}: {sample.query}", sample.duration_s, sample.windows, told, known_s, score))
    plot_curves(curves, options.threshold, path)
