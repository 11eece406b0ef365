"""What one client has asked for, and its place in the event log. The rules, without sockets and without threads."""

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stream.deliver.interest import ANY
from stream.deliver.log import Entry
from stream.events import lost_notice
from stream.history import Scores
from stream.types import NS, Kind

_MUTED_KEPT = 1024  # of moments that ended inside a cooldown: their clips come later
_BURST_S = 5.0  # of messages that a client may send at once, in seconds of its rate


@dataclass(eq=False)
class Want:
    """One subscription of one client."""

    stream: str  # or ANY
    query_id: str  # or ANY
    text: str
    threshold: float | None
    cooldown_ns: int
    since_ns: int | None  # UTC: the past is answered for but for moments that were over by then; None: see `begin`
    begin: int  # number of the log after which it is told all there is, or what needs no past: status, "*"
    joined: dict[str, int] = field(default_factory=dict)  # stream -> up to this number all is its past
    told: int = 0  # up to this number it has been told already, if its client had to go back in the log for another
    over: bool = False  # unsubscribed
    _opened: dict[tuple[str, str | None], int] = field(default_factory=dict)  # (stream, query) -> when it was told last
    _muted: set[tuple[str, str]] = field(default_factory=set)  # (stream, moment) inside the cooldown
    _over: dict[tuple[str, str], None] = field(default_factory=dict)  # of these, those that ended, the newest last

    def accepts(self, entry: Entry) -> bool:
        """Whether an event is for this subscription; the log must be read in order."""
        after = self._after(entry)
        return after is not None and entry.number > max(after, self.told) and self.lets_through(entry)

    def had(self, entry: Entry) -> bool:
        """Whether it was told before its client went back. What a cooldown left out then may be told by another."""
        after = self._after(entry)
        return after is not None and after < entry.number <= self.told and not self.cooldown_ns

    def lets_through(self, entry: Entry) -> bool:
        """Keeps quiet about moments that begin within the cooldown after another."""
        if not self.cooldown_ns or entry.moment_id is None:
            return True
        moment = entry.stream, entry.moment_id
        if entry.kind is Kind.OPENED:
            start_ns = round(json.loads(entry.payload)["data"]["start_s"] * NS)
            last_ns = self._opened.get((entry.stream, entry.query_id))
            if last_ns is not None and 0 <= start_ns - last_ns < self.cooldown_ns:
                self._muted.add(moment)
            else:
                self._opened[entry.stream, entry.query_id] = start_ns
        muted = moment in self._muted
        if entry.kind is Kind.CLIP:
            return not muted and moment not in self._over
        if entry.kind is Kind.CLOSED and muted:
            self._muted.discard(moment)
            self._over[moment] = None
            if len(self._over) > _MUTED_KEPT:
                del self._over[next(iter(self._over))]
        return not muted

    def describe(self) -> dict[str, Any]:
        given: dict[str, Any] = {"query_id": self.query_id, "query": self.text, "stream": self.stream}
        if self.threshold is not None:
            given["threshold"] = self.threshold
        if self.cooldown_ns:
            given["cooldown"] = self.cooldown_ns / NS
        return given

    def _after(self, entry: Entry) -> int | None:
        """After which number of the log events like this one are told, None: they are not."""
        if self.stream not in (entry.stream, ANY):
            return None
        if entry.query_id is None:
            return self.begin
        if self.query_id == ANY:
            return None if entry.backfill else self.begin  # what was over before anybody asked is for who asked
        if entry.query_id != self.query_id:
            return None
        return self.begin if self.since_ns is None else self.joined.get(entry.stream)


@dataclass(frozen=True, eq=False)
class Join:
    """The past of a subscription on one stream is complete up to `number` of the log."""

    want: Want
    stream: str
    number: int


Key = tuple[str, str, float | None]  # stream, text, threshold


@dataclass(eq=False)
class Tally:
    """What was refused to clients, by reason, and what they missed, since the server began."""

    messages: Counter[str] = field(default_factory=Counter)
    connections: Counter[str] = field(default_factory=Counter)
    lost: int = 0  # events that had left the log when their turn came, and each client was told so


class Peer:
    """What the server keeps about one client."""

    def __init__(self, position: int, tally: Tally | None = None) -> None:
        self.position = position  # up to where it has been sent the log
        self.wants: dict[Key, Want] = {}
        self.joins: list[Join] = []  # in the order in which they are to be told
        # Of (stream, query): whose scores, and how many of them it has been sent; None: it does not follow the curves.
        self.curves: dict[tuple[str, str], tuple[Scores, int]] | None = None
        self.wake = asyncio.Event()  # set when there may be something to send
        self._tally = tally or Tally()
        self._name, self._notices = uuid.uuid4().hex, 0
        self._tokens, self._filled_s = float("inf"), time.monotonic()

    def may_ask(self, per_second: float) -> bool:
        """One message more: whether the client keeps to its rate, but for bursts."""
        now_s = time.monotonic()
        most = max(1.0, _BURST_S * per_second)
        self._tokens = min(most, self._tokens + (now_s - self._filled_s) * per_second)
        self._filled_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def go_back(self, number: int) -> None:
        """The log is sent again from here on, to the subscriptions that come now."""
        if number < self.position:
            for want in self.wants.values():
                want.told = max(want.told, self.position)
            self.position = number
        self.wake.set()

    def drop(self, key: Key) -> Want | None:
        """Nothing more is told of a subscription."""
        if want := self.wants.pop(key, None):
            want.over = True
            self.joins = [join for join in self.joins if join.want is not want]
        return want

    def due(self) -> Join | None:
        """The next to be told: by backfill at once, with `since` when the log has been sent up to there."""
        for join in self.joins:
            if join.want.since_ns is not None or self.position >= join.number:
                return join
        return None

    def passed(self, entries: list[Entry]) -> Iterator[bytes]:
        """What of the next entries of the log is for this client; its position follows, one by one.

        It ends early when the client must go back.
        """
        lost = entries[0].number - self.position - 1
        self.position += lost
        if lost > 0 and self.wants:
            self._notices += 1
            self._tally.lost += lost
            yield lost_notice(lost, f"{self._name}/{self._notices}")
        for entry in entries:
            if entry.number != self.position + 1:
                return
            self.position = entry.number
            # Lists: each must see the entry, for its cooldown.
            wants = self.wants.values()
            if any([want.accepts(entry) for want in wants]) and not any([want.had(entry) for want in wants]):
                yield entry.payload
