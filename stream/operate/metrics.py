"""What Prometheus asks for. The only file that imports prometheus_client.

Everything is read when it is asked for, from counters that are kept anyway: nothing is done on the way of a frame. The
series of a stream or a query end when it goes. What may be a label is bounded by the limits of the service.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from stream.deliver.webhook import WebhookState
from stream.types import NS, Kind

if TYPE_CHECKING:
    from stream.service.service import Service
    from stream.service.stream import Stream

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "livemoments_"
STAGES = ("wait", "image", "head", "publish")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MESSAGES = ("rate", "malformed", "limit", "request", "too_large")
CONNECTIONS = ("token", "clients", "origin", "host")


def render(service: "Service") -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, and its content type. Any thread may call."""
    registry = CollectorRegistry()
    registry.register(_Reading(service))
    ProcessCollector(registry=registry)
    return text_of(registry), CONTENT_TYPE


def text_of(registry: Collector) -> bytes:
    """What `prometheus_client.generate_latest` makes of it, in a quarter of the time: the engine waits for it."""
    lines = []
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines += [f"# HELP {name} {family.documentation}", f"# TYPE {name} {family.type}"]
        for sample in family.samples:
            labels = ",".join([f'{label}="{_escaped(value)}"' for label, value in sample.labels.items()])
            lines.append(f"{sample.name}{f'{{{labels}}}' if labels else ''} {float(sample.value)}")
    return "\n".join([*lines, ""]).encode()


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class _Reading(Collector):
    """What a service counts, as metric families."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # nothing else is in the registry that could have the same names

    def collect(self) -> Iterator[Metric]:
        # The threads go on meanwhile: what is looked at is copied first, each in one step.
        streams = dict(self._service.watched)
        yield from _streams(streams)
        yield from _queries(streams)
        yield from self._engine(streams)
        yield from self._clips(streams)
        yield from self._delivery()
        yield from _webhooks([webhook.state for webhook in list(self._service.sockets.webhooks)])
        yield from self._clients()

    def _engine(self, streams: "dict[str, Stream]") -> Iterator[Metric]:
        engine, pulse = self._service.engine, self._service.pulse
        build = _gauge("build_info", "Always 1: what runs.", ("version", "engine", "target"))
        labels = (metadata.version("livemoments"), engine.manifest.model, engine.manifest.target)
        yield _with(build, (labels, 1))
        yield _one(_counter("turns", "Rounds of the engine's thread that went well."), pulse.turns)
        yield _one(_counter("turn_failures", "Rounds of the engine's thread that failed."), pulse.failed)
        since_s = time.monotonic() - pulse.turned_s
        yield _one(_gauge("last_turn_seconds", "Since the newest round that went well."), since_s)
        calls = dict(engine.batches)
        counts = [sum(each for size, each in calls.items() if size <= most) for most in BATCHES]
        total = sum(calls.values())
        buckets = [(f"{most:.1f}", count) for most, count in zip(BATCHES, counts, strict=True)] + [("+Inf", total)]
        batches = HistogramMetricFamily(f"{PREFIX}image_batch", "Frames that one call of the image engine embedded.")
        batches.add_metric([], buckets, sum_value=sum(size * each for size, each in calls.items()))
        yield batches
        running = sum(stream.backfill is not None for stream in streams.values())
        yield _one(_gauge("backfills", "Streams on which new queries are being answered for the past."), running)

    def _clips(self, streams: "dict[str, Stream]") -> Iterator[Metric]:
        tracks = [(name, stream.track) for name, stream in streams.items() if stream.track and stream.track.ring]
        for family, values in (
            (_gauge("clips_open", "Clips that are being written.", STREAM), [each.being_written for _, each in tracks]),
            (_counter("clips_written", "Clips that became whole.", STREAM), [each.written for _, each in tracks]),
            (_counter("clips_failed", "Clips that could not be written.", STREAM), [each.failed for _, each in tracks]),
            (_counter("clips_bytes", "Of the clips that became whole.", STREAM), [each.nbytes for _, each in tracks]),
        ):
            yield _with(family, *(((name,), value) for (name, _), value in zip(tracks, values, strict=True)))
        if (recorder := self._service.recorder) and recorder.shelf:
            yield _one(_gauge("clips_disk_bytes", "Of all clips on the disk."), recorder.shelf.nbytes)

    def _delivery(self) -> Iterator[Metric]:
        sockets, log = self._service.sockets, self._service.log
        yield _one(_gauge("events_waiting", "Events that are still to be stored."), sockets.waiting)
        yield _one(_counter("events_lost", "Events that could not be stored."), sockets.lost)
        yield _one(_gauge("storing_problem", "1 while events cannot be stored."), sockets.problem is not None)
        help_ = "From an event's emission until it is stored and with the sockets."
        stored = SummaryMetricFamily(f"{PREFIX}store_seconds", help_)
        stored.add_metric([], sockets.stored.count, sockets.stored.total_ns / NS)
        yield stored
        yield _one(_gauge("log_first", "The oldest number that the event log holds."), log.first)
        yield _one(_gauge("log_last", "The newest number of the event log."), log.last)
        help_ = "Moments that were closed at the start, since a kill had left them open."
        yield _one(_gauge("recovered_moments", help_), len(log.recovered))

    def _clients(self) -> Iterator[Metric]:
        board = self._service.sockets.board
        peers = list(board.peers)
        yield _one(_gauge("clients", "Clients that are connected, over WebSocket."), len(peers))
        yield _one(_gauge("subscriptions", "Of all clients."), sum(len(peer.wants) for peer in peers))
        messages = _counter("refused_messages", "Messages of clients that were refused.", ("reason",))
        yield _with(messages, *(((reason,), board.tally.messages[reason]) for reason in MESSAGES))
        connections = _counter("refused_connections", "Who was not let in.", ("reason",))
        yield _with(connections, *(((reason,), board.tally.connections[reason]) for reason in CONNECTIONS))
        help_ = "Events that clients were told they had missed: they had left the log before."
        yield _one(_counter("client_events_lost", help_), board.tally.lost)


STREAM = ("stream",)
QUERY = ("stream", "query", "query_id")


def _streams(streams: "dict[str, Stream]") -> Iterator[Metric]:
    now_ns = time.time_ns()
    up = _gauge("stream_up", "1 while pictures come.", STREAM)
    decoded = _counter("stream_frames_decoded", "Frames that came out of the decoder.", STREAM)
    looked_at = _counter("stream_frames_looked_at", "Frames that the engine has seen.", STREAM)
    dropped = _counter("stream_frames_dropped", "Frames that were chosen and came too late for their turn.", STREAM)
    reconnects = _counter("stream_reconnects", "How often the source had to be opened again.", STREAM)
    windows = _counter("stream_windows", "Windows that were judged.", STREAM)
    lag = _gauge("stream_lag_seconds", "Since the capture of the newest frame that was judged; live only.", STREAM)
    stages = SummaryMetricFamily(f"{PREFIX}stage_seconds", "What a window takes.", labels=(*STREAM, "stage"))
    queries = _gauge("stream_queries", "Queries that run.", STREAM)
    events = _counter("stream_events", "Events that were told, but for clips.", (*STREAM, "kind"))
    for name, stream in streams.items():
        feed, session = stream.feed, stream.session
        up.add_metric((name,), feed.state.state == "connected")
        decoded.add_metric((name,), feed.decoded)
        looked_at.add_metric((name,), session.looked_at)
        dropped.add_metric((name,), feed.dropped)
        reconnects.add_metric((name,), feed.reconnects)
        windows.add_metric((name,), session.timings.image.count)
        if not session.recorded and (captured_ns := session.captured_ns) is not None:
            lag.add_metric((name,), (now_ns - captured_ns) / NS)
        for stage in STAGES:
            durations = getattr(session.timings, stage)
            stages.add_metric((name, stage), durations.count, durations.total_ns / NS)
        queries.add_metric((name,), len(session.queries))
        for kind in (Kind.OPENED, Kind.UPDATED, Kind.CLOSED, Kind.HIGHLIGHT, Kind.STATUS):
            events.add_metric((name, kind), session.events[kind])
    yield from (up, decoded, looked_at, dropped, reconnects, windows, lag, stages, queries, events)


def _queries(streams: "dict[str, Stream]") -> Iterator[Metric]:
    score = _gauge("query_score", "The newest, from 0 to 1.", QUERY)
    is_open = _gauge("query_moment_open", "1 while a moment lasts.", QUERY)
    events = _counter("query_events", "Events told of a query, since it runs.", (*QUERY, "kind"))
    for name, stream in streams.items():
        session = stream.session
        for query in session.queries:
            labels = name, query.text, query.id
            scores, told = session.scores(query.id), session.events_of.get(query.id)
            if scores is None or told is None:
                continue  # it has just gone
            if (newest := scores.newest) is not None:
                score.add_metric(labels, newest)
            is_open.add_metric(labels, session.open_moment(query.id) is not None)
            for kind in (Kind.OPENED, Kind.UPDATED, Kind.CLOSED):
                events.add_metric((*labels, kind), told[kind])
    yield from (score, is_open, events)


def _webhooks(states: list[WebhookState]) -> Iterator[Metric]:
    by_name = defaultdict(list)  # two may send to one receiver
    for state in states:
        by_name[state.name].append(state)
    for family, field in (
        (_gauge("webhook_waiting", "Entries of the log that are still to be looked at.", WEBHOOK), "lag"),
        (_counter("webhook_delivered", "Events that the receiver took.", WEBHOOK), "delivered"),
        (_counter("webhook_refused", "Events that the receiver refused for good.", WEBHOOK), "refused"),
        (_counter("webhook_failures", "Attempts that failed, each to be tried again.", WEBHOOK), "failed"),
        (_counter("webhook_dropped", "Events that left the log before their turn.", WEBHOOK), "lost"),
    ):
        yield _with(family, *(((name,), sum(getattr(e, field) for e in each)) for name, each in by_name.items()))


WEBHOOK = ("webhook",)


def _gauge(name: str, help_: str, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, help_, labels=labels)


def _counter(name: str, help_: str, labels: tuple[str, ...] = ()) -> CounterMetricFamily:
    """It is shown as NAME_total."""
    return CounterMetricFamily(PREFIX + name, help_, labels=labels)


def _one(family: Any, value: float) -> Metric:
    return _with(family, ((), value))


def _with(family: Any, *values: tuple[tuple[str, ...], float]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    result: Metric = family
    return result
