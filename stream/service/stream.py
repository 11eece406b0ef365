"""One stream of the service, as the engine's thread keeps it."""

from stream.backfill import Backfill
from stream.clips.recorder import Track
from stream.service.feed import Feed
from stream.session import Session
from stream.types import Query


class Stream:
    """Its source, its session, and the queries on their way into it."""

    def __init__(self, feed: Feed, session: Session, track: Track | None) -> None:
        self.feed, self.session, self.track = feed, session, track
        self.backfill: Backfill | None = None
        self.pending: dict[str, Query] = {}  # they wait for the backfill before theirs
        self.version = -1  # of the interest that its rows follow
        self.looked_back_ns = 0  # when it last had a slice for that
        self.anew = False  # the options of its moments have changed: all rows begin again
