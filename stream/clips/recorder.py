"""Clips and pictures of all streams, made in one thread, so that the engine's never waits for a disk or an encoder."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stream.clips.cut import Cut
from stream.clips.mp4 import Mp4Error, refusal
from stream.clips.pictures import Pictures
from stream.clips.ring import INTERRUPTED, Ring
from stream.clips.shelf import Shelf
from stream.config.schema import ClipsConfig
from stream.events import Sequencer
from stream.types import NS, Clip, Event, Frame, Kind

log = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a clip takes what came, where no event and no picture wakes it earlier."""
GOP_S = 30.0
"""How much longer than a clip begins early the ring is: the way back to a key, and a disk that is slow."""
OPEN_LIMIT = 64
"""Clips written at a time: each has threads of its own."""
CLOSE_S = 5.0
"""How long the end waits for files to become whole."""
PICTURES_S = 60.0
"""Pictures are kept for so long at least: the peak of a moment must be among them."""
INDEX_BYTES = 128 << 10
"""What a file takes beside its video, thumbnail included; a long one has more, as part of its bytes."""
WAITING_LIMIT = 10_000
"""Events that wait for a disk that hangs; beyond, they are lost to the clips."""
RAW = "its pictures come raw, or as single images: there is no encoded video to cut clips from"
GONE = {"reconnecting": INTERRUPTED, "ended": "the stream ended", "removed": "the stream was removed"}
ENDED = "the service ended"


class Track:
    """One stream of the service, from when it is added until it is removed. The engine's thread tells it."""

    def __init__(self, recorder: "Recorder", ring: Ring | None, pictures: Pictures, *, raw: bool) -> None:
        self.ring, self.pictures, self.has_clips = ring, pictures, recorder.shelf is not None
        self.written = self.failed = self.nbytes = 0
        self.cuts: dict[str, Cut] = {}  # by moment
        self.gone: str | None = None  # why no pictures come at present
        self._recorder, self._raw = recorder, raw
        self._refusal: tuple[str, str | None] | None = None  # of a format

    def tell(self, event: Event) -> None:
        """An event of the stream. Never blocks."""
        self._recorder.put(self, event)

    def look(self, frame: Frame) -> None:
        """A frame that has been looked at, once all that it led to is told. Never blocks."""
        self._recorder.look(self, frame)

    @property
    def being_written(self) -> int:
        """Clips that are not whole yet."""
        return sum(cut.clip is None for cut in list(self.cuts.values()))

    def describe(self) -> dict[str, Any]:
        """How its clips are."""
        told: dict[str, Any] = {
            "open": self.being_written,
            "written": self.written,
            "failed": self.failed,
            "bytes": self.nbytes,
        }
        return told | ({"reason": reason} if (reason := self.refusal()) else {})

    def refusal(self) -> str | None:
        """Why there can be no clips of it, in words; None: there can, or it is not known yet."""
        caps = self.ring.caps if self.ring else None
        if caps is None:
            return RAW if self._raw or self.pictures.nearest(0) else None
        if self._refusal is None or self._refusal[0] != caps:
            self._refusal = caps, refusal(caps)
        return self._refusal[1]


def ready(closed: Event, clip: Clip, sequencer: Sequencer) -> Event:
    """The event of a clip, by that which closed its moment. For the thread of the sequencer."""
    assert closed.query is not None
    return replace(
        closed,
        kind=Kind.CLIP,
        seq=sequencer.next(closed.stream, closed.query.id),
        emitted_ns=time.time_ns(),
        latency_ns=None,
        clip=clip,
    )


class Recorder:
    """Any thread may call. Nothing in here stops events: what fails is counted, and logged once."""

    def __init__(self, config: ClipsConfig, *, history_s: float, hop_ns: int, wake: Callable[[], None]) -> None:
        """
        Args:
            history_s: how long pictures are kept.
            wake: called when `finished` has something; it must not block.

        Raises:
            InputError: the folder cannot be used.
        """
        self.shelf = Shelf(config.folder, config.max_mb << 20) if config.folder else None
        self._config, self._history_s, self._wake = config, max(history_s, PICTURES_S), wake
        self._slack_ns = hop_ns + hop_ns // 2  # the first window of a take may begin so long before its first picture
        self._tracks: dict[str, Track] = {}  # the newest of each name
        self._cutting: dict[Track, None] = {}  # those with clips open: a stream that has gone may be among them
        self._events: deque[tuple[Track, Event]] = deque()
        self._frames: dict[Track, Frame] = {}
        self._arrived, self._closing = threading.Condition(), False
        self._finished: deque[tuple[Event, Clip]] = deque()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="clips", daemon=True)
        self._thread.start()

    def track(self, stream: str, *, raw: bool) -> Track:
        """A stream more, which may have the name of one that goes. raw: its pictures never were encoded."""
        ring = None
        if self.shelf and not raw:
            ring = Ring(self._config.before_s + GOP_S, self._config.ring_mb << 20)
        track = Track(self, ring, Pictures(self._history_s), raw=raw)
        with self._arrived:
            self._tracks[stream] = track
        return track

    def forget(self, stream: str, track: Track) -> None:
        """A stream has gone; its clips become whole."""
        with self._arrived:
            if self._tracks.get(stream) is track:
                del self._tracks[stream]

    def pictures(self, stream: str) -> Pictures | None:
        track = self._tracks.get(stream)
        return track.pictures if track else None

    def finished(self) -> list[tuple[Event, Clip]]:
        """The clips that became whole since, each with the event that closed its moment."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def put(self, track: Track, event: Event) -> None:
        if track.ring is not None:
            with self._arrived:
                if len(self._events) < WAITING_LIMIT:
                    self._events.append((track, event))
                else:
                    track.failed += 1
                self._arrived.notify()

    def look(self, track: Track, frame: Frame) -> None:
        with self._arrived:
            self._frames[track] = frame  # one that waited is lost: the newest counts
            self._arrived.notify()

    def close(self) -> None:
        """Clips end here and become whole: `finished` has them. Once more does nothing."""
        with self._arrived:
            closed, self._closing = self._closing, True
            self._arrived.notify()
        self._thread.join()
        if self.shelf and not closed:
            self.shelf.close()

    # -- the thread of the clips

    def _run(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._events or self._frames or self._closing, POLL_S)
                events, self._events = self._events, deque()
                frames, self._frames = self._frames, {}
                closing = self._closing
            for track, frame in frames.items():
                self._guarded(track, lambda track=track, frame=frame: track.pictures.add(frame))  # type: ignore[misc]
            for track, event in events:
                self._guarded(track, lambda track=track, event=event: self._hear(track, event))  # type: ignore[misc]
            if closing:
                self._end()
                return
            self._step()

    def _end(self) -> None:
        for cut in self._cuts():
            cut.leave(ENDED)
        until_s = time.monotonic() + CLOSE_S
        self._step()  # also those that were cut off, and waited for the end of their moments
        while any(cut.clip is None for cut in self._cuts()) and time.monotonic() < until_s:
            time.sleep(0.01)
            self._step()
        for cut in self._cuts():
            cut.abort()

    def _cuts(self) -> list[Cut]:
        return [cut for track in self._cutting for cut in track.cuts.values()]

    def _hear(self, track: Track, event: Event) -> None:
        if event.kind is Kind.STATUS:
            assert event.status is not None
            track.gone = GONE.get(event.status["state"])
            for cut in track.cuts.values():
                if track.gone:
                    cut.leave(track.gone)
            return
        assert event.moment is not None
        name = event.moment.id
        # One that is over already comes as a whole: its first event does not say how long it lasted.
        if event.kind is (Kind.CLOSED if event.backfill else Kind.OPENED):
            self._begin(track, event)
        if name in track.cuts:
            track.cuts[name].hear(event, closed=event.kind is Kind.CLOSED)

    def _begin(self, track: Track, event: Event) -> None:
        ring, moment = track.ring, event.moment
        assert ring is not None and moment is not None and self.shelf is not None
        if track.refusal():
            return
        start = ring.find(moment.start_ns, int(self._config.before_s * NS), self._slack_ns)
        if event.backfill and (start is None or (moment.end_ns or 0) <= start.time_ns):
            return  # nothing of it is held any more
        if start is None:
            raise Mp4Error("nothing of the moment is held")
        if sum(cut.clip is None for cut in self._cuts()) >= OPEN_LIMIT:
            raise Mp4Error(f"{OPEN_LIMIT} are being written already")
        cut = Cut(event, ring, track.pictures, start, self.shelf, self._config)
        if track.gone:
            cut.leave(track.gone)
        track.cuts[moment.id] = cut
        self._cutting[track] = None

    def _step(self) -> None:
        now_ns = time.monotonic_ns()
        for track in list(self._cutting):
            for name in list(track.cuts):
                if not self._guarded(track, lambda track=track, name=name: self._go_on(track, name, now_ns)):  # type: ignore[misc]
                    track.cuts.pop(name).abort()
            if not track.cuts:
                del self._cutting[track]

    def _go_on(self, track: Track, name: str, now_ns: int) -> None:
        cut = track.cuts[name]
        was_whole = cut.clip is not None
        if not cut.step(now_ns, self._has_room):
            return
        assert cut.clip is not None
        if not was_whole:
            track.written += 1
            track.nbytes += cut.clip.nbytes
            if self._problem:
                log.warning("clips are written again")
                self._problem = None
        if cut.closed:  # one that was cut off waits for that
            del track.cuts[name]
            self._finished.append((cut.closed, cut.clip))
            self._wake()

    def _has_room(self, coming: int) -> bool:
        """For what all clips that are being written take, and `coming` bytes more. Each is on the disk twice before it
        is whole, and has an index."""
        assert self.shelf is not None
        open_now = [cut for cut in self._cuts() if cut.clip is None]
        taken = sum(cut.nbytes for cut in open_now) + coming
        return self.shelf.make_room(2 * taken + taken // 20 + len(open_now) * INDEX_BYTES)

    def _guarded(self, track: Track, work: Callable[[], None]) -> bool:
        """Whether it succeeded. What fails is counted, and said in one line as long as it goes on failing."""
        try:
            work()
        except (Mp4Error, OSError) as error:
            if self._problem is None:
                log.error("a clip cannot be written: %s", error)
            self._problem = str(error)
        except Exception:  # whatever it was, the other streams must go on
            log.exception("a clip failed")
        else:
            return True
        track.failed += 1
        return False
