"""A histogram of durations as a picture of its own (SVG) for a page. Pure: numbers in, text out."""

from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

from stream.report import percentiles

_BINS = 48
_WIDE, _HIGH, _FOOT, _TOP = 760, 170, 22, 26  # of the picture, its axis, and above the bars
_NS = 1e6  # in a ms


def histogram(title: str, series: Mapping[str, NDArray[np.float64]]) -> str:
    """Bars of one or two series of durations in ms, each (n,), at least one not empty. The last 0.5% are cut off."""
    known = {name: values for name, values in series.items() if len(values)}
    most = _round_up(float(np.percentile(np.concatenate(list(known.values())), 99.5)))
    shares = {name: np.histogram(values, _BINS, (0.0, most))[0] / len(values) for name, values in known.items()}
    tallest = max(share.max() for share in shares.values()) or 1.0
    parts, said = [], []
    wide, base = _WIDE / _BINS, _HIGH - _FOOT
    for number, (name, share) in enumerate(shares.items()):
        bars = "".join(
            f"M{wide * at + 0.5:.1f} {base}v{-value / tallest * (base - _TOP):.1f}h{wide - 1:.1f}V{base}z"
            for at, value in enumerate(share)
            if value
        )
        p50, p95, p99 = percentiles(known[name] * _NS)
        said.append(f"{name}: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms, {len(known[name])} measured")
        parts.append(f'<path class="bars bars{number}" d="{bars}"/>')
        for label, value in (("p50", p50), ("p95", p95)):
            x = min(value / most, 1) * _WIDE
            line = f'<path class="line bars{number}" d="M{x:.1f} {_TOP}V{base}"/>'
            side = f'x="{x + 3:.1f}"' if x < _WIDE - 30 else f'x="{x - 3:.1f}" text-anchor="end"'
            parts.append(f'{line}<text class="bars{number}" {side} y="{11 + 12 * number}">{label}</text>')
    for tick in np.linspace(0, most, 5):
        x = tick / most * _WIDE
        anchor = "start" if tick == 0 else "end" if tick == most else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HIGH - 6}" text-anchor="{anchor}">{tick:g} ms</text>')
    legend = "".join(
        f'<li><span class="key bars{number}"></span>{escape(text)}</li>' for number, text in enumerate(said)
    )
    label = escape(". ".join([title, *said]))
    return (
        f'<figure class="histogram"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{label}">'
        f'<path class="floor" d="M0 {base}H{_WIDE}"/>{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _round_up(value: float) -> float:
    """To 1, 2, 4 or 8 times a power of ten, so that quarters of it are short."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-3)))
    return float(next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value))
