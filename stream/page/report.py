"""One page that says what a run found: curves, moments with pictures, tables, histograms. It needs no network, and the
program is not needed to read it. Pure: what was found in, HTML out.
"""

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray

from stream.page.collector import Lane, Recording, Spans, Told
from stream.page.histogram import histogram
from stream.report import clock, percentiles
from stream.timings import Timings
from stream.types import NS

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Table:
    """Columns whose name ends in a space are text; the others hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """Durations in ms, each (n,), by name."""

    title: str
    series: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Report:
    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    recordings: Sequence[Recording] = ()
    summary: Sequence[Table] = ()  # stands above the recordings
    latencies: Sequence[Latency] = ()
    tables: Sequence[Table] = ()


def render(report: Report) -> str:
    """The page. Valid UTF-8, whatever the texts hold."""
    data = {"streams": [_data(recording) for recording in report.recordings]}
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in report.facts.items())
    alone = [recording.name for recording in report.recordings] == [report.title]  # which says it already
    body = [_table(table) for table in report.summary]
    body += [_stream(number, recording, alone) for number, recording in enumerate(report.recordings)]
    body += [f"<section>{histogram(each.title, each.series)}</section>" for each in report.latencies if _any(each)]
    body += [_table(table) for table in report.tables]
    page = Template((STATIC / "report.html").read_text("utf-8")).substitute(
        title=escape(report.title),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        facts=facts,
        body="\n".join(body),
        css=(STATIC / "report.css").read_text("utf-8"),
        # A text that ends the script would end it: "<" is written in a way that only JSON reads.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        # One script: a page out of a file may not load another.
        script=re.sub(r"^export ", "", (STATIC / "curve.js").read_text("utf-8"), flags=re.MULTILINE)
        + (STATIC / "report.js").read_text("utf-8"),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


def stages(timings: Timings, *, live: bool) -> tuple[list[Latency], list[Table]]:
    """What a run's own timings say: how late decisions were, and what each stage took."""
    names = ("decode", "wait", "image", "head", "publish") if live else ("image", "head", "publish")
    title = "capture to decision" if live else "frame to decision"
    held = {name: getattr(timings, name).values() for name in names}
    table = Table(
        "stages",
        ("stage ", "p50, ms", "p95, ms", "p99, ms"),
        [[name, *(f"{ms:.2f}" for ms in percentiles(values))] for name, values in held.items() if len(values)],
        f"Of the newest {len(timings.total)} windows.",
    )
    return [Latency(title, {title: timings.total.values() / 1e6})], [table] if table.rows else []


def _any(latency: Latency) -> bool:
    return any(len(values) for values in latency.series.values())


def _data(recording: Recording) -> dict[str, object]:
    """What the lanes are drawn from: scores and times to 3 digits."""
    origin = None if recording.origin_ns is None else recording.origin_ns // 1_000_000
    return {
        "name": recording.name,
        "origin_ms": origin,
        "hop_s": recording.hop_s,
        "length_s": round(recording.length_s, 3),
        "times": [round(time, 3) for time in recording.times],
        "queries": [
            {
                "query": lane.text,
                "threshold": round(lane.threshold, 4),
                "scores": [None if math.isnan(score) else round(score, 3) for score in lane.scores],
                "moments": [_moment(told) for told in lane.moments],
                "truth": None if lane.truth is None else [[round(at, 3) for at in span] for span in lane.truth],
            }
            for lane in recording.lanes
        ],
    }


def _moment(told: Told) -> dict[str, object]:
    return {
        "id": told.id,
        "start": round(told.start_s, 3),
        "end": round(told.end_s, 3),
        "peak": round(told.peak_s, 3),
        "score": round(told.score, 4),
        "highlights": [{"time": round(at, 3), "score": round(score, 3)} for at, score in told.highlights],
    }


def _stream(number: int, recording: Recording, alone: bool) -> str:
    """A place for each lane, filled by the script, and the moments, which are there without it."""
    plot = (
        '<div class="plot"><canvas></canvas><div class="scrub"><i class="at" hidden></i></div>'
        '<div class="strip" aria-hidden="true"></div></div>'
    )
    lanes = "".join(
        f'<article class="lane" data-lane="{at}"><header><h3>{escape(lane.text)}</h3>'
        f"<p>{_summary(lane)}</p></header>{plot}</article>"
        for at, lane in enumerate(recording.lanes)
    )
    notes = []
    if not recording.lanes:
        notes.append("No query was watched.")
    if recording.lost_lanes:
        notes.append(f"{recording.lost_lanes} queries or more were too many to be kept, and are left out.")
    if recording.times and recording.times[0] > 60:
        notes.append(f"Scores before {_time(recording, recording.times[0])} were not kept.")
    moments = [(at, lane, told) for at, lane in enumerate(recording.lanes) for told in lane.moments]
    moments.sort(key=lambda each: each[2].start_s)
    knows = any(lane.truth is not None for lane in recording.lanes)
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<section class="stream" data-stream="{number}">'
        f'<h2{" class=hidden" if alone else ""}>{escape(recording.name)}</h2>{said}<div class="lanes">{lanes}</div>'
        '<div class="foot"><button type="button" class="whole" hidden>whole stream</button>'
        '<canvas class="axis" aria-hidden="true"></canvas></div>'
        f"{_moments(recording, moments, knows)}</section>"
    )


def _summary(lane: Lane) -> str:
    known = [score for score in lane.scores if not math.isnan(score)]
    told = f"{len(lane.moments)} moment{'' if len(lane.moments) == 1 else 's'}"
    truth = "" if lane.truth is None else f" of {len(lane.truth)} true"
    return f"{told}{truth}, highest {max(known):.2f}" if known else "never looked for"


def _moments(recording: Recording, moments: Sequence[tuple[int, Lane, Told]], knows: bool) -> str:
    if not moments:
        return '<p class="note">No moments.</p>'
    columns = ["picture ", "query ", "start", "end", "lasts", "peak", "score"]
    columns += ["IoU with the truth"] if knows else []
    columns += ["told after"]
    rows = []
    for at, lane, told in moments:
        picture = ""
        if told.picture:
            uri = f"data:image/jpeg;base64,{base64.b64encode(told.picture).decode()}"
            alt = f"{lane.text}, at {_time(recording, told.peak_s)}"
            picture = f'<img src="{uri}" alt="{escape(alt)}">'
        cells = [
            *(_time(recording, each) for each in (told.start_s, told.end_s)),
            f"{told.end_s - told.start_s:.1f} s",
            _time(recording, told.peak_s),
            f"{told.score:.2f}",
        ]
        if knows:
            cells.append("" if lane.truth is None else f"{_iou(told, lane.truth):.2f}")
        cells.append("" if told.late_ms is None else f"{told.late_ms:.0f} ms")
        rows.append(
            f'<tr data-moment="{escape(told.id)}" data-lane="{at}"><td>{picture}</td><th scope="row">'
            f'<span class="swatch"></span>{escape(lane.text)}</th>{"".join(f"<td>{each}</td>" for each in cells)}</tr>'
        )
    return (
        f'<details class="moments" open><summary>{len(moments)} moment{"" if len(moments) == 1 else "s"}</summary>'
        f'<div class="wide"><table>{_head(columns)}<tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _table(table: Table) -> str:
    text = [column.endswith(" ") for column in table.columns]
    rows = "".join(
        f"<tr>{''.join(_cell(cell, is_text) for cell, is_text in zip(row, text, strict=True))}</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="wide"><table>{_head(table.columns)}'
        f"<tbody>{rows}</tbody></table></div>{note}</section>"
    )


def _head(columns: Iterable[str]) -> str:
    cells = (f'<th scope="col"{" class=text" if name.endswith(" ") else ""}>{escape(name.strip())}' for name in columns)
    return f"<thead><tr>{'</th>'.join(cells)}</th></tr></thead>"


def _cell(text: str, is_text: bool) -> str:
    return f'<td class="text">{escape(text)}</td>' if is_text else f"<td>{escape(text)}</td>"


def _time(recording: Recording, at_s: float) -> str:
    """Stream time of a recording; UTC of a live stream."""
    if recording.origin_ns is None:
        return clock(round(at_s * NS))
    at = datetime.fromtimestamp((recording.origin_ns + round(at_s * NS)) // (NS // 10) / 10, UTC)
    return f"{at:%H:%M:%S}.{at.microsecond // 100_000}"


def _iou(told: Told, truth: Spans) -> float:
    """Of the true window that it meets best."""
    best = 0.0
    for start, end in truth:
        both = min(end, told.end_s) - max(start, told.start_s)
        whole = max(end, told.end_s) - min(start, told.start_s)
        best = max(best, both / whole if whole > 0 else 0.0)
    return best
