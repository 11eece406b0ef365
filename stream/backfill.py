"""New queries of a stream on their way through what is kept of it, until they have seen what the others have. Pure.

The past goes through the step of the live stream, window by window: so the moments are those that the query would have
had if it had been there, and rings, counts and trackers go on live without a seam. All queries that came together share
each step. It is done in slices, so that the live stream never waits for it.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from stream.detector import Detector
from stream.history import History, Scores
from stream.moments import Change, Tracker
from stream.types import Query, Window


class Backfill:
    """Queries with a detector and trackers of their own, which the stream's session adopts in the end."""

    def __init__(
        self,
        history: History,
        detector: Detector,
        queries: Sequence[Query],
        new_tracker: Callable[[Query], Tracker],
        told: Mapping[str, int],
    ) -> None:
        """
        Args:
            detector: without queries.
            told: query id -> stream time up to which the moments of that query were told already.
        """
        self.queries, self.detector = list(queries), detector
        self.trackers = {query.id: new_tracker(query) for query in queries}
        self.found: list[tuple[Window, str, Change]] = []  # by time
        self.scores = {query.id: Scores(history.capacity) for query in queries}
        self._history, self._next, self._told = history, history.start, told
        for query in queries:
            detector.add(query)

    @property
    def done(self) -> bool:
        """Whether all that is kept has been looked at."""
        return self._next == self._history.stop

    def advance(self, until_ns: int) -> bool:
        """Go on until it is done or time.monotonic_ns() has reached `until_ns`, by one window at least; `done`."""
        while not self.done:
            features = self._history.at(max(self._next, self._history.start))
            self._next = max(self._next, self._history.start) + 1
            window = features.window
            saliencies = self.detector.saliency(features)
            for each in saliencies:
                self.scores[each.query].append(each)
                if window.start_ns >= self._told.get(each.query, 0):
                    changes = self.trackers[each.query].push(each, window)
                    self.found += [(window, each.query, change) for change in changes]
            if time.monotonic_ns() >= until_ns:
                break
        return self.done

    def drop(self, query_id: str) -> None:
        """Nobody asks for this query any more."""
        self.detector.remove(query_id)
        del self.trackers[query_id], self.scores[query_id]
        self.queries = [query for query in self.queries if query.id != query_id]
        self.found = [found for found in self.found if found[1] != query_id]
