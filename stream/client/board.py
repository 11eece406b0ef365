"""Events for people to read: as lines, and as a live table. No clock, no terminal, no socket."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stream.events import LOST_TYPE, GapCounter

MAX_ROWS = 200
"""Moments the table remembers; it shows the newest that fit the screen."""

EARLIER = "earlier"
"""How late a moment is that was over before anybody asked for it."""

Message = Mapping[str, Any]
Item = Message | str | None
"""An event, a notice for the user, or nothing yet."""


def line(message: Message) -> str:
    """An event in one line."""
    data, kind = message["data"], message["type"].split(".")[-2]
    if message["type"] == LOST_TYPE:
        return f"{'':8}  lost       {data['lost']} events: the server keeps them no more"
    told = f"{_clock(message['time'])}  {kind:9}  {clean(data['stream'])}"
    if "query" not in data:
        return f"{told}  {_status(data)}"
    told += f'  "{clean(data["query"])}"  {data["start_s"]:.1f} s to '
    told += "..." if data["end_s"] is None else f"{data['end_s']:.1f} s"
    if "clip" in data:
        short = "" if data["clip"]["complete"] else f"  ({clean(data['clip']['missing'])})"
        return f"{told}  {clean(data['clip']['url'])}{short}"
    late = _late(data)
    return f"{told}  score {data['score']:.2f}" + (f"  {'late ' * (late != EARLIER)}{late}" if late else "")


@dataclass
class _Row:
    kind: str  # opened, updated, closed, highlight or ready: its clip is
    data: Message
    start: datetime


class Board:
    """The table: a row for each moment, then the streams' state and what was missed."""

    def __init__(self, gaps: GapCounter | None) -> None:
        """gaps: None where numbers may be missing for a reason."""
        self._rows: dict[tuple[str, str], _Row] = {}  # oldest first
        self._streams: dict[str, str] = {}
        self._gaps = gaps
        self._lost = 0
        self._notice = ""

    def apply(self, item: Item) -> None:
        if isinstance(item, str):
            self._notice = item
        elif item is not None and item["type"] == LOST_TYPE:
            self._lost += item["data"]["lost"]
        elif item is not None:
            if self._gaps:
                self._gaps.count(item)
            data = item["data"]
            if "query" not in data:
                self._streams[clean(data["stream"])] = _status(data)
                return
            row = _Row(item["type"].split(".")[-2], data, datetime.fromisoformat(data["start"]))
            self._rows[data["stream"], data["moment_id"]] = row
            if len(self._rows) > MAX_ROWS:
                del self._rows[next(iter(self._rows))]

    def render(self, now: datetime, height: int) -> RenderableType:
        """The `height` moments that began last; `now` (UTC) is what open ones last until."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("", "stream", "query", "start", "end", "lasts", "score", "late"):
            table.add_column(name, no_wrap=True, justify="right" if name in ("lasts", "late") else "left")
        for row in sorted(self._rows.values(), key=lambda row: row.start)[-max(1, height) :]:
            table.add_row(*_cells(row, now))
        streams = "  ".join(f"{name}: {state}" for name, state in self._streams.items())
        lines = [streams if streams or self._rows else "waiting for the first event", self._notice]
        missed = self._gaps.total if self._gaps else 0
        if missed or self._lost:
            lines.insert(1, f"missed {missed} events by their numbers; the server keeps {self._lost} no more")
        return Group(table, *(Text(line, style="dim") for line in lines if line))


def _cells(row: _Row, now: datetime) -> list[Text]:
    data = row.data
    is_open = data["end"] is None
    seconds = (now - row.start).total_seconds() if is_open else data["end_s"] - data["start_s"]
    filled = round(10 * data["score"])
    return [
        Text(_state(row.kind, is_open), "green" * is_open),
        Text(clean(data["stream"])),
        Text(clean(data["query"])),
        Text(_clock(data["start"])),
        Text("…" if is_open else _clock(data["end"])),
        Text(f"{seconds:.0f} s" if seconds >= 0 else "…"),  # a file may be read faster than it lasts
        Text("█" * filled + "░" * (10 - filled) + f" {data['score']:.2f}"),
        Text(_late(data)),
    ]


def _state(kind: str, is_open: bool) -> str:
    if kind == "highlight":
        return "★ highlight"
    if kind == "ready":
        return "closed, clip"
    return "● open" if is_open else "closed"


def _late(data: Message) -> str:
    late_ms = data["capture_to_publish_ms"]
    if data.get("backfill"):
        return EARLIER
    return "" if late_ms is None else f"{late_ms:.0f} ms"


def _status(data: Message) -> str:
    more = ", ".join(f"{key} {value}" for key, value in data.items() if key not in ("stream", "seq", "state"))
    return clean(data["state"]) + (f" ({clean(more)})" if more else "")


def _clock(rfc3339: str) -> str:
    return f"{datetime.fromisoformat(rfc3339).astimezone():%H:%M:%S}"


def clean(text: object) -> str:
    """Any client may name a query: what could steer the terminal is not passed on to it."""
    return "".join(char if char.isprintable() else "?" for char in str(text))
