"""What `livemoments run` shows a person: moments as they come, a progress bar, a summary."""

import os
import sys

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stream.ingest import VideoSource
from stream.timings import Timings
from stream.types import NS, Event, Kind


class Terminal(Console):
    """A console whose reader may leave (`| head`): the work goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress_bar(console: Console, video: VideoSource) -> Progress:
    """A bar over the stream's seconds, with the time left; a live stream has no end and gets no bar."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=video.duration_ns is None or not console.is_terminal,
    )
    progress.add_task(video.name, total=(video.duration_ns or 0) / NS)
    return progress


def print_event(console: Console, event: Event) -> None:
    """One line an event. Updates are left out: on a terminal they would be noise."""
    if event.kind is Kind.STATUS:
        assert event.status is not None
        details = ", ".join(f"{value}" for key, value in event.status.items() if key != "state")
        console.print(Text(f"  {'stream':<9} {event.status['state']}{': ' if details else ''}{details}", style="dim"))
        return
    if event.kind is Kind.UPDATED:
        return
    assert event.moment is not None and event.query is not None and event.latency_ns is not None
    moment, late = event.moment, f"{event.latency_ns / 1e6:.0f} ms"
    at, line, style = {
        Kind.OPENED: (moment.start_ns, "● opened", "bold green"),
        Kind.HIGHLIGHT: (moment.peak_ns, "▲ highlight", "yellow"),
        Kind.CLOSED: (moment.start_ns, "■ closed", "cyan"),
    }[event.kind]
    until = f" to {clock(moment.end_ns)}" if moment.end_ns is not None else ""
    # Ready segments, not a Text, and wrapping left to the terminal: rich would measure every word and keep the widths
    # of the last 4096, so that memory grew for most of an hour. In a pipe the line stays whole.
    parts = [
        Segment(f"{clock(at)}{until:<12} "),
        Segment(f"{line:<12}", Style.parse(style)),
        Segment(f" {event.query.text}  "),
        Segment(f"{moment.score:.2f}  ", Style.parse("bold")),
        Segment(f"after {late}", Style.parse("dim")),
        Segment.line(),
    ]
    console.print(Segments(parts), soft_wrap=True)


def clock(ns: int) -> str:
    """Stream time as m:ss.s, or h:mm:ss.s from an hour on."""
    tenths = ns // (NS // 10)
    hours, minutes, seconds = tenths // 36000, tenths // 600 % 60, tenths / 10 % 60
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def percentiles(values_ns: ArrayLike) -> tuple[float, float, float]:
    """p50, p95 and p99 in ms; NaN where nothing was measured."""
    values = np.asarray(values_ns)
    if not values.size:
        return float("nan"), float("nan"), float("nan")
    p50, p95, p99 = np.percentile(values, (50, 95, 99)) / 1e6
    return float(p50), float(p95), float(p99)


def print_summary(
    console: Console, video: VideoSource, timings: Timings, *, stream_ns: int, wall_ns: int, moments: int
) -> None:
    """Frames, drops, speed and latency of a run."""
    console.print(f"\n{video.name}: {clock(stream_ns)} of video, {moments} moments")
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("frames decoded", str(video.decoded))
    table.add_row("frames looked at", str(video.taken - video.dropped))
    table.add_row("frames dropped", str(video.dropped))
    if video.live:
        table.add_row("reconnected", str(video.reconnects))
    table.add_row("real-time factor", f"{stream_ns / max(wall_ns, 1):.1f} x")
    since = "capture" if video.live else "frame"
    if len(timings.total):
        decision = "p50 {:.0f}, p95 {:.0f}, p99 {:.0f} ms".format(*percentiles(timings.total.values()))
        table.add_row(f"{since} to decision", decision)
    console.print(table)
