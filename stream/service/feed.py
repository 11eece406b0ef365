"""A source with a thread of its own, so that one that is slow, silent or not there yet delays no other."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from kernels.errors import SourceError
from stream.clips.ring import Ring
from stream.clock import slot_of
from stream.ingest import VideoSource, open_source
from stream.sources import Source, SourceStatus, one_line
from stream.types import Frame

log = logging.getLogger(__name__)

POLL_S = 0.2
BACKOFF_S = (1.0, 30.0)


class Feed:
    """The frames of a source and what happens to it, for one reader; it is opened again for ever.

    The newest frames wait in the source, one waits here: a reader that is late gets the newest, the source counts
    those that it dropped.
    """

    def __init__(
        self, source: Source, name: str, hop_ns: int, wake: Callable[[], None], ring: Ring | None = None
    ) -> None:
        """
        Args:
            wake: called when there is something to take; it must not block.
            ring: keeps the video as it comes, encoded.
        """
        self.source = source
        self.state = SourceStatus("reconnecting", "not opened yet")
        self.decoded = self.taken = self.dropped = self.reconnects = 0
        self._name, self._hop_ns, self._wake, self._ring = name, hop_ns, wake, ring
        self._items: queue.Queue[Frame | SourceStatus] = queue.Queue(1)
        self._closed = threading.Event()
        self._before: tuple[int, ...] = (0, 0, 0, 0)  # of sources that were closed
        self._end_ns, self._ended_ns = 0, 0  # stream time reached, and when (monotonic)
        self._thread = threading.Thread(target=self._run, name=f"feed {name}", daemon=True)
        self._thread.start()

    def take(self) -> Frame | SourceStatus | None:
        """The next frame or news, None if there is none. Never blocks."""
        try:
            return self._items.get_nowait()
        except queue.Empty:
            return None

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets go of the source; it is opened no more."""
        self._closed.set()
        self.take()  # room for the thread to see it
        self._thread.join(timeout_s)

    def _run(self) -> None:
        wait_s = BACKOFF_S[0]
        while not self._closed.is_set():
            try:
                if self._ring:
                    self._ring.source(None if self._end_ns else 0)
                source = open_source(self.source, hop_ns=self._hop_ns, name=self._name, ring=self._ring)
                with closing(source) as video:
                    wait_s = BACKOFF_S[0]
                    try:
                        self._follow(video)
                        return
                    finally:
                        self._count(video, closing=True)
            except SourceError as error:
                problem = str(error)
            except Exception as error:  # whatever it was, the next try may do better, and nobody else would make one
                log.exception("the source of %s failed", self._name)
                problem = one_line(f"{type(error).__name__}: {error}")
            self._put(SourceStatus("reconnecting", problem, wait_s))
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, BACKOFF_S[1])

    def _follow(self, video: VideoSource) -> None:
        """Until the source or the feed ends."""
        # A source that was opened anew begins at 0 again: its stream goes on, on the same grid of hops.
        begin_ns = 0
        if self._end_ns:
            passed_ns = time.monotonic_ns() - self._ended_ns if video.live else self._hop_ns
            slot = max((self._end_ns + passed_ns) // self._hop_ns, slot_of(self._end_ns, self._hop_ns) + 1)
            begin_ns = (slot + 1) * self._hop_ns  # what begins there stands for `slot`: see `slot_of`
        if self._ring:
            self._ring.based(begin_ns)
        first = begin_ns > 0
        while not self._closed.is_set():
            if (item := video.read(POLL_S)) is None:
                if video.ended:
                    return
            elif isinstance(item, SourceStatus):
                self._put(item)
                if item.state == "ended":
                    return
            else:
                item = replace(item, pts_ns=item.pts_ns + begin_ns, discontinuity=item.discontinuity or first)
                first, self._end_ns, self._ended_ns = False, item.pts_ns, time.monotonic_ns()
                self._put(item)
            self._count(video)

    def _put(self, item: Frame | SourceStatus) -> None:
        if isinstance(item, SourceStatus):
            self.state = item
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            self._wake()
            return

    def _count(self, video: VideoSource, *, closing: bool = False) -> None:
        now = video.decoded, video.taken, video.dropped, video.reconnects
        total = tuple(before + new for before, new in zip(self._before, now, strict=True))
        self.decoded, self.taken, self.dropped, self.reconnects = total
        if closing:
            self._before = total
