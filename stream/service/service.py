"""Many live streams and one engine: whoever asks for what, in one thread. What comes in and goes out has others.

A turn takes what the sources have, looks at all of it in one call of the image engine, judges every query, and then
spends a little time on the past of new queries. No stream waits for another: a source that is slow, dead or not there
has its own thread (`Feed`), and a turn takes what is there.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from kernels.engine import Engine
from kernels.errors import InputError, LimitError
from stream.clips.recorder import Recorder, Track, ready
from stream.config.schema import Changes, Config, changes
from stream.curves import Curve, curves_of
from stream.deliver.interest import ANY, Interest
from stream.deliver.log import EventLog
from stream.deliver.publish import Sockets
from stream.events import Sequencer
from stream.history import History
from stream.operate.health import Pulse
from stream.pipeline import require_plugins
from stream.service.backstage import Backstage, page_of
from stream.service.feed import Feed
from stream.service.stream import Stream
from stream.service.why import why
from stream.service.wishes import hold, queries_of, webhooks_of
from stream.session import Session, push_all
from stream.sources import STREAM_NAME, SourceKind, SourceStatus, parse_source
from stream.types import NS, Event, Frame, Query

log = logging.getLogger(__name__)

POLL_S = 0.2
SLICE_NS = 10_000_000
"""How long a turn spends on the past of new queries: what it may add to the latency of an event."""
RAW = (SourceKind.TEST, SourceKind.LAUNCH)
"""Sources whose pictures come as a description makes them: there is nothing encoded that clips could be cut from."""
FEEDS_S = 2.0
"""How long the end waits for sources to close, all together: one that hangs in a network is left behind."""


class Service:
    """Use it as a context manager. Any thread may call.

    Raises:
        InputError: an address, a file or a query of the config cannot be used; SourceError: GStreamer is missing.
    """

    def __init__(self, engine: Engine, config: Config, events: EventLog) -> None:
        require_plugins()  # which starts GStreamer: threads that did so at once would get in each other's way
        self.config = config
        self.interest = Interest(engine, config.limits.queries)
        self.engine, self.log, self.pulse = engine, events, Pulse()
        self._hop_ns = config.engine.hop_ns
        self._capacity = int(config.limits.history_s * NS) // self._hop_ns
        self._sequencer = Sequencer()
        self._streams: dict[str, Stream] = {}  # replaced, never changed: it is read without a lock
        self._leaving: deque[Stream] = deque()
        self._changing = threading.RLock()  # streams and config
        self._work, self._stopping = threading.Event(), False
        queries = queries_of(config, self.interest)
        self._held = hold(self.interest, queries)
        self.recorder: Recorder | None = None  # of clips, and of the pictures that the page shows
        self._page = page_of(config.server, Backstage(self))
        self.sockets = Sockets(
            self,
            events,
            config.server,
            doors=[self._page] if self._page else [],
            limits=config.limits,
            history_s=config.limits.history_s if self._capacity else 0.0,
            webhooks=webhooks_of(config, self.interest, queries, self.log),
        )
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        try:
            if config.clips.folder or config.server.page_port is not None:
                history_s, wake = config.limits.history_s, self._work.set
                self.recorder = Recorder(config.clips, history_s=history_s, hop_ns=self._hop_ns, wake=wake)
            for name, stream in config.streams.items():
                self.add_stream(name, stream.source)
        except BaseException:
            self._let_go()
            raise

    @property
    def ws_url(self) -> str:
        return self.sockets.ws_url

    @property
    def zmq_address(self) -> str | None:
        return self.sockets.zmq_address

    @property
    def watched(self) -> Mapping[str, Stream]:
        """The streams as they are now."""
        return self._streams

    @property
    def page_url(self) -> str | None:
        return self._page.url if self._page else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Open moments close and are stored."""
        self._stopping = True
        self._work.set()
        self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        if self.recorder:
            self.recorder.close()
        feeds = [stream.feed for stream in self._streams.values()]
        until = time.monotonic() + FEEDS_S
        for feed in feeds:
            feed.close(0)
        for feed in feeds:
            feed.close(max(0.0, until - time.monotonic()))
        self.sockets.__exit__()

    # -- what clients and operators ask

    def add_stream(self, name: str, source: str) -> None:
        """Watch one more stream. Its source is opened by and by, and again whenever it fails.

        Raises:
            InputError: there is one of that name; LimitError: as many as there may be; SourceError: `source` is none.
        """
        parsed = parse_source(source)
        if not STREAM_NAME.fullmatch(name):
            raise InputError(f'"{name[:80]}" is no name for a stream: 1 to 64 of A-Z, a-z, 0-9, "." "_" and "-"')
        with self._changing:
            if self._stopping:
                raise InputError("the service is about to end")
            if name in self._streams:
                raise InputError(f'there is a stream "{name}" already: remove it first')
            if len(self._streams) >= self.config.limits.streams:
                raise LimitError(f"{self.config.limits.streams} streams are the most: remove one first")
            history = History(self._capacity) if self._capacity else None
            track = self.recorder.track(name, raw=parsed.kind in RAW) if self.recorder else None
            session = Session(
                *(self.engine, name, self._hop_ns, self.config.moments),
                recorded=parsed.kind is SourceKind.FILE,
                tell=partial(self._tell, track),
                history=history,
                sequencer=self._sequencer,
            )
            feed = Feed(parsed, name, self._hop_ns, self._work.set, track.ring if track else None)
            self._streams = {**self._streams, name: Stream(feed, session, track)}
        self._work.set()

    def remove_stream(self, name: str) -> None:
        """Watch it no longer; open moments close.

        Raises:
            InputError: there is none of that name.
        """
        with self._changing:
            self._check_stream(name)
            leaving = self._streams[name]
            # In this order: what has left must not be looked at once more.
            self._streams = {each: stream for each, stream in self._streams.items() if each != name}
            self._leaving.append(leaving)
        self._work.set()

    def streams(self) -> list[dict[str, Any]]:
        """How each stream is."""
        return [
            {
                "stream": name,
                "source": stream.feed.source.shown,
                "state": stream.feed.state.state,
                **({"reason": stream.feed.state.reason} if stream.feed.state.reason else {}),
                "queries": len(queries := stream.session.queries),
                "watching": [
                    {"query_id": query.id, "query": query.text, "threshold": stream.session.threshold(query)}
                    for query in queries
                ],
                "hop_s": self._hop_ns / NS,
                "decoded": stream.feed.decoded,
                "looked_at": stream.feed.taken - stream.feed.dropped,
                "dropped": stream.feed.dropped,
                "reconnects": stream.feed.reconnects,
                **({"clips": stream.track.describe()} if stream.track and stream.track.has_clips else {}),
            }
            for name, stream in self._streams.items()
        ]

    def curves(self) -> Iterator[Curve]:
        """The scores of every query on every stream."""
        return (curve for stream in self._streams.values() for curve in curves_of(stream.session))

    def why(self, stream: str, query: Query) -> list[dict[str, Any]]:
        """What a query scores on a stream, or on each, and why nothing is told.

        Raises:
            InputError: there is no such stream.
        """
        if stream != ANY:
            self._check_stream(stream)
        found = [each for name, each in self._streams.items() if stream in (name, ANY)]
        return [why(each.session, query, each.feed.state) for each in found]

    def configure(self, config: Config) -> list[str]:
        """Follow another config; what of it waits for a restart.

        Raises:
            InputError, SourceError: it cannot be followed, and nothing has changed.
        """
        # What may fail comes first, and what takes long without the lock, which clients wait for.
        queries = queries_of(config, self.interest)
        webhooks = webhooks_of(config, self.interest, queries, self.log)
        with self._changing:
            found, old = changes(self.config, config), self.config
            gone = self._gone(config, found)
            if (count := len({*self._streams, *config.streams} - set(found.removed))) > config.limits.streams:
                raise InputError(
                    f"with those that clients have added there would be {count} streams, and {config.limits.streams} "
                    "are the most: remove some, or raise limits.streams"
                )
            self.config = config
            for name in gone:
                self.remove_stream(name)
            self.interest.most = sys.maxsize  # those of the config always run; clients get what is left
            held, self._held = self._held, hold(self.interest, queries)
            for pattern, query_id in held:
                self.interest.release(pattern, query_id)
            self.interest.most = config.limits.queries
            for name, wanted in config.streams.items():
                if name not in self._streams:
                    self.add_stream(name, wanted.source)
            if "moments" in found.sections:
                for stream in self._streams.values():
                    stream.anew = True
            if "limits" in found.sections:
                self.sockets.limit(config.limits)
        self._work.set()
        failed = []
        if "webhooks" in found.sections or any(each.queries for each in config.webhooks):  # those may be others now
            failed = self.sockets.follow(webhooks)
        fixed = ("history_s", "message_bytes")
        waiting = [name for name in fixed if getattr(old.limits, name) != getattr(config.limits, name)]
        return [*found.restart, *(f"limits.{name}" for name in waiting), *failed]

    def _gone(self, config: Config, found: Changes) -> list[str]:
        """The streams that another config has no more, or has with another source: new ones take their names."""
        gone = [name for name in found.removed if name in self._streams]
        for name, wanted in config.streams.items():
            before = self.config.streams.get(name)
            source = parse_source(wanted.source)
            if before and before.source == wanted.source:
                continue
            if name in self._streams and self._streams[name].feed.source != source:
                gone.append(name)
        return gone

    # -- the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            if not any(stream.backfill or stream.pending for stream in self._streams.values()):
                self._work.wait(POLL_S)
            self._work.clear()
            try:
                self._turn()
                self.pulse.turned()
            except Exception:  # whatever it was, the streams must go on
                self.pulse.failed += 1
                log.exception("a turn failed")
                time.sleep(POLL_S)
        with self._changing:
            self._leave()
            for stream in self._streams.values():
                stream.session.drain()
        if self.recorder:
            self.recorder.close()
            self._tell_clips(self.recorder)

    def _leave(self) -> None:
        while self._leaving:
            stream = self._leaving.popleft()
            stream.feed.close(0)  # its thread may hang in a network: it ends by itself
            stream.session.drain()
            stream.session.status("removed")
            if stream.track and self.recorder:
                self.recorder.forget(stream.session.stream, stream.track)

    def _tell(self, track: Track | None, event: Event) -> None:
        self.sockets.tell(event)
        if track:
            track.tell(event)

    def _tell_clips(self, recorder: Recorder) -> None:
        """Those that became whole; their streams may have gone meanwhile."""
        for closed, clip in recorder.finished():
            self.sockets.tell(ready(closed, clip, self._sequencer))

    def _turn(self) -> None:
        self._leave()
        asked = self.interest.asked()
        frames: list[tuple[Session, Frame]] = []
        looks: list[tuple[Track, Frame]] = []
        for stream in self._streams.values():
            self._settle(stream, asked)
            while (item := stream.feed.take()) is not None:
                if isinstance(item, Frame):
                    frames.append((stream.session, item))
                    if stream.track:
                        looks.append((stream.track, item))
                    break
                self._news(stream.session, item)
        if push_all(frames):
            self.sockets.scored()
        for track, frame in looks:
            track.look(frame)
        if self.recorder:
            self._tell_clips(self.recorder)
        until_ns = time.monotonic_ns() + SLICE_NS
        waiting = [each for each in self._streams.values() if each.pending or each.backfill]
        for stream in sorted(waiting, key=lambda each: each.looked_back_ns):
            self._look_back(stream, until_ns)
            if time.monotonic_ns() >= until_ns:
                break

    def _news(self, session: Session, item: SourceStatus) -> None:
        details = {"reason": item.reason, "retry_s": item.retry_s}
        session.status(item.state, **{key: value for key, value in details.items() if value is not None})
        if item.state == "ended":
            session.drain()
        elif item.state != "connected":
            session.interrupt()

    def _settle(self, stream: Stream, asked: Sequence[tuple[str, str]]) -> None:
        """Bring the rows of a stream up to what is wanted of it."""
        session = stream.session
        if stream.anew:
            stream.anew, stream.version, stream.backfill = False, -1, None
            session.options = self.config.moments
            for query in session.queries:
                session.remove(query.id)
        if stream.version != self.interest.version:
            stream.version = self.interest.version
            wanted = self.interest.wanted(session.stream)
            running = {query.id for query in session.queries}
            for query_id in running - wanted.keys():
                session.remove(query_id)
            for query_id in stream.pending.keys() - wanted.keys():
                del stream.pending[query_id]
            coming = {query.id for query in stream.backfill.queries} if stream.backfill else set()
            for query_id in coming - wanted.keys():
                assert stream.backfill is not None
                stream.backfill.drop(query_id)
            for query_id, query in wanted.items():
                if query_id not in running | coming | stream.pending.keys():
                    stream.pending[query_id] = query
        running = {query.id for query in session.queries} if asked else set()
        for name, query_id in asked:
            if name in (session.stream, ANY) and query_id in running:
                self.sockets.running(session.stream, query_id)

    def _look_back(self, stream: Stream, until_ns: int) -> None:
        """Go on with the past of new queries, by one window at least."""
        stream.looked_back_ns = until_ns
        session, pending = stream.session, stream.pending
        if pending and stream.backfill is None:
            if session.history is not None and session.history.stop:
                stream.backfill = session.backfill(list(pending.values()))
            else:
                for query in pending.values():
                    session.add(query)
                    self.sockets.running(session.stream, query.id)
            stream.pending = {}
        if stream.backfill and stream.backfill.advance(until_ns):
            session.adopt(stream.backfill)
            for query in stream.backfill.queries:
                self.sockets.running(session.stream, query.id)
            stream.backfill = None
            self.sockets.scored()

    def _check_stream(self, name: str) -> None:
        if name not in self._streams:
            raise InputError(f'there is no stream "{name}": {", ".join(self._streams) or "there are none"}')
