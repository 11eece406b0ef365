"""The event log: every event is stored here before anybody hears of it, and gets its number. SQLite, one file.

Whoever tells events to the world follows the log by number: what was away, slow or killed asks for all after the last
number it has seen. The newest entries also stay in memory, so that those who keep up never wait for the disk.
"""

import contextlib
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import LogError
from stream.deliver import log_file
from stream.deliver.recovery import interrupted
from stream.events import encode
from stream.types import Event, Kind

KEPT = 4096
"""The newest entries that stay in memory, some megabytes."""
OVER_KEPT = 4096
"""The newest moments that ended whose keys stay in memory: their clips are told some time after."""
REMOVED_AT_ONCE = 64
"""Old entries that one append removes at most, or four for each it stores: milliseconds."""

_COLUMNS = (
    "SELECT number, events.stream, events.query_id, kind, name, events.over_ns, backfill, payload"
    " FROM events LEFT JOIN moments ON moments.key = moment"
)

_Name = tuple[str, str, str]  # of a moment: stream, query id and its own id
_Id = tuple[int | None, int]  # of an event, within its stream and query: key of the run, seq


@dataclass(frozen=True, slots=True)
class Entry:
    """One event as it is stored."""

    number: int  # in the log: 1, 2, 3 ... never given twice
    stream: str
    query_id: str | None  # None: a status of the stream
    kind: Kind
    moment_id: str | None
    over_ns: int | None  # UTC at which the moment ended, for CLOSED; None otherwise
    backfill: bool
    payload: bytes  # the CloudEvent as it travels


class EventLog:
    """All events in order, oldest first, without holes. Any thread may call anything.

    When the database outgrows `max_bytes` the oldest entries go: `first` tells, and a reader that asks for older ones
    gets what is left. A disk that is full or fails raises LogError: then nothing of that batch is stored, no number
    is used up, and the next append may work again. The file beside it, -wal, stays at some megabytes as long as no
    other program keeps a query open on the database. After close() everything raises ValueError.
    """

    def __init__(self, path: Path | None, *, max_bytes: int = 512 << 20) -> None:
        """Opens the log, or begins it. None: in memory only, which may then take `max_bytes`.

        Moments that a killed process left open are closed, first thing: `recovered` holds what was appended for that.
        InputError, one line, for a path that cannot hold a log or a log that another process holds.
        """
        self.run = uuid.uuid4().hex  # the first part of the ids of the events appended
        self.recovered: list[Entry] = []
        self._path, self._max_bytes = path, max_bytes
        self._closed = False
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._newest: deque[Entry] = deque(maxlen=KEPT)
        self._keeping = threading.Lock()  # of `_newest`, `_first` and `_last`
        self._open: dict[_Name, int] = {}  # the moments this run has open, and their keys
        self._over: dict[_Name, int] = {}  # those it has closed, the newest last
        self._doomed = 0  # entries up to this number are on their way out
        self._unweighed = max_bytes  # bytes stored since the database was last measured
        if path is None:
            self._writer = self._reader = log_file.connect(None)
            log_file.create(self._writer)
            self._reading = self._writing  # a reader on the writer's connection would see half a batch
        else:
            self._writer, self._reader, self._lock = log_file.open_log(path)
        try:
            with self._writing, self._transaction():
                # Two queries: min and max in one look at every row.
                first, last = self._writer.execute(
                    "SELECT (SELECT min(number) FROM events), (SELECT max(number) FROM events)"
                ).fetchone()
                self._first, self._last = first or 1, last or 0
                self._writer.execute("DELETE FROM runs WHERE NOT EXISTS (SELECT * FROM events WHERE run = runs.key)")
                self._run_key = self._writer.execute("INSERT INTO runs (name) VALUES (?)", [self.run]).lastrowid
                self.recovered = self._recover()
            self._keep(self.recovered, self._first)
        except BaseException:
            self.close()
            raise

    @property
    def first(self) -> int:
        """The oldest number held; `last` + 1 if there is none."""
        return self._first

    @property
    def last(self) -> int:
        """The newest number held, 0 if there never was one."""
        return self._last

    def append(self, events: Sequence[Event]) -> list[Entry]:
        """Stores a batch in one transaction, all or nothing; on return it is on the disk.

        ValueError for an event that is in the log already, or lacks what its kind needs. LogError if it cannot be
        stored.
        """
        if not events:
            return []
        with self._writing:
            entries = [_entry(event, self.run, number) for number, event in enumerate(events, self._last + 1)]
            still_open, over = dict(self._open), dict[_Name, int]()
            with self._transaction():
                first = self._make_room(entries)
                self._store(entries, [(self._run_key, event.seq) for event in events], still_open, over)
            self._open = still_open
            self._remember(over)
            # Still under the writer's lock: batches are seen in the order of their numbers.
            self._keep(entries, first)
        return entries

    def read(self, after: int, limit: int = 256) -> list[Entry]:
        """The entries that follow number `after`, oldest first, at most `limit` of them. LogError if the disk fails."""
        with self._keeping:
            self._check_open()
            if after >= self._last:
                return []
            if self._newest and after + 1 >= (oldest := self._newest[0].number):
                begin = after + 1 - oldest
                return [self._newest[i] for i in range(begin, min(begin + limit, len(self._newest)))]
        values = {"after": after, "limit": limit}
        return self._select(f"{_COLUMNS} WHERE number > :after ORDER BY number LIMIT :limit", values)

    def remembers(self, after: int) -> bool:
        """Whether `read(after)` is answered from memory, at once."""
        with self._keeping:
            return after >= self._last or bool(self._newest and after + 1 >= self._newest[0].number)

    def of_query(self, stream: str | None, query_id: str, since_ns: int, before: int) -> list[Entry]:
        """What a client that asks for a query now would have been told, oldest first: the events with a number below
        `before` of its moments that were still open at `since_ns` (UTC) or began later. `stream` None: on all streams.

        A moment comes with all its events that the log still holds. One whose end has number `before` or above counts
        as open: the client will hear of that end.
        """
        return self._select(
            f"""{_COLUMNS} WHERE +number < :before AND (:stream IS NULL OR events.stream = :stream) AND moment IN (
                SELECT key FROM moments WHERE query_id = :query AND over_ns IS NULL
                UNION SELECT key FROM moments WHERE query_id = :query AND over_ns > :since
                UNION SELECT moment FROM events WHERE number >= :before AND query_id = :query AND over_ns NOT NULL
            ) ORDER BY number""",
            {"before": before, "stream": stream, "query": query_id, "since": since_ns},
        )

    def position(self, reader: str) -> int | None:
        """The number that this reader has kept, None if it never did."""
        with self._reading, self._explained():
            row = self._reader.execute("SELECT number FROM positions WHERE reader = ?", [reader]).fetchone()
        return None if row is None else int(row[0])

    def keep_position(self, reader: str, number: int) -> None:
        """Remembers, on the disk, how far a reader got. LogError if it cannot."""
        with self._writing, self._transaction():
            self._writer.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", [reader, number])

    def close(self) -> None:
        """Lets go of the file. What was appended is on the disk already."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
            self._writer.close()
        if self._path is not None:
            with self._reading:
                self._reader.close()
            log_file.unlock(self._path, self._lock)

    def _recover(self) -> list[Entry]:
        """Closes the moments that an earlier run left open, in its name and where it went silent."""
        entries: list[Entry] = []
        for key, stream, query_id, name in self._writer.execute(
            "SELECT key, stream, query_id, name FROM moments WHERE over_ns IS NULL ORDER BY key"
        ).fetchall():
            told = self._writer.execute(
                "SELECT payload, run, backfill FROM events WHERE moment = ? ORDER BY number", [key]
            ).fetchall()
            if not told:  # removed since, all of it: nobody can ask for that moment
                self._writer.execute("DELETE FROM moments WHERE key = ?", [key])
                continue
            _, run, backfill = told[-1]
            (seq,) = self._writer.execute(
                "SELECT max(seq) + 1 FROM events WHERE run = ? AND stream = ? AND query_id = ?", [run, stream, query_id]
            ).fetchone()
            number = self._last + len(entries) + 1
            payload, over_ns = interrupted([row[0] for row in told], seq, number, time.time_ns())
            entries.append(Entry(number, stream, query_id, Kind.CLOSED, name, over_ns, bool(backfill), payload))
            self._store(entries[-1:], [(run, seq)], {(stream, query_id, name): key}, {})
        return entries

    def _store(
        self, entries: Sequence[Entry], ids: Sequence[_Id], still_open: dict[_Name, int], over: dict[_Name, int]
    ) -> None:
        """Writes entries, and what they do to their moments; `still_open` follows, and `over` gets those that end.

        In few statements: each gives up the interpreter, and a busy thread may keep it for 5 ms.
        """
        rows, opened, ends = [], [], []
        for entry, (run, seq) in zip(entries, ids, strict=True):
            key = None
            if entry.query_id is not None and entry.moment_id is not None:
                name = entry.stream, entry.query_id, entry.moment_id
                if entry.kind is Kind.CLIP:  # it belongs to a moment that has been told, and never begins one
                    key = over.get(name) or self._over.get(name) or self._key_of(name)
                else:
                    if name not in still_open:
                        still_open[name] = entry.number
                        opened.append((entry.number, *name, None))
                    key = still_open[name]
                if entry.kind is Kind.CLOSED:
                    over[name] = still_open.pop(name)
                    ends.append((entry.over_ns, over[name]))
            of = entry.stream, entry.query_id or "", seq, entry.kind, key
            rows.append((entry.number, run, *of, entry.over_ns, entry.backfill, entry.payload))
        log_file.insert(self._writer, "moments", opened)
        log_file.insert(self._writer, "events", rows)
        self._writer.executemany("UPDATE moments SET over_ns = ? WHERE key = ?", ends)

    def _remember(self, over: Mapping[_Name, int]) -> None:
        for name, key in over.items():
            self._over.pop(name, None)
            self._over[name] = key
        while len(self._over) > OVER_KEPT:
            del self._over[next(iter(self._over))]

    def _key_of(self, name: _Name) -> int | None:
        """Of a moment that ended long ago; None once nothing is left of it."""
        (key,) = self._writer.execute(
            "SELECT max(key) FROM moments WHERE query_id = ? AND stream = ? AND name = ?", [name[1], name[0], name[2]]
        ).fetchone()
        return None if key is None else int(key)

    def _make_room(self, coming: Sequence[Entry]) -> int:
        """Removes some of the oldest entries if the database is too large. Returns the oldest number that is left.

        Their pages are used again by what comes, so the file stays as large as it was. A tenth of all goes, but over
        many appends: at once it could take a second. The newest number is never lost: what is `coming` has a newer one.
        """
        self._unweighed += sum(len(entry.payload) for entry in coming)
        if self._doomed < self._first and self._unweighed * 256 > self._max_bytes:
            self._unweighed = 0
            if log_file.used_bytes(self._writer) > self._max_bytes:
                self._doomed = self._first + (self._last - self._first) // 10
        if self._doomed < self._first:
            return self._first
        until = min(self._doomed, self._first + max(REMOVED_AT_ONCE, 4 * len(coming)) - 1)
        self._writer.execute("DELETE FROM events WHERE number <= ?", [until])
        self._writer.execute(
            "DELETE FROM moments WHERE key <= ? AND over_ns IS NOT NULL"
            " AND NOT EXISTS (SELECT * FROM events WHERE moment = moments.key)",
            [until],
        )
        return until + 1

    def _keep(self, entries: Sequence[Entry], first: int) -> None:
        """Shows readers what has become true: `entries` are in, what lies before `first` is out."""
        with self._keeping:
            self._newest.extend(entries)
            while self._newest and self._newest[0].number < first:
                self._newest.popleft()
            self._first = first
            if entries:
                self._last = entries[-1].number

    def _select(self, sql: str, values: Mapping[str, str | int | None]) -> list[Entry]:
        with self._reading, self._explained():
            rows = self._reader.execute(sql, values).fetchall()
        return [
            Entry(number, stream, query_id or None, Kind(kind), moment, over_ns, bool(backfill), payload)
            for number, stream, query_id, kind, moment, over_ns, backfill, payload in rows
        ]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. For who holds `_writing`."""
        with self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    with contextlib.suppress(sqlite3.Error):  # SQLite does it by itself for some failures
                        self._writer.execute("ROLLBACK")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What SQLite raises, in our words."""
        self._check_open()
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise ValueError(f"an event is in the log already: {error}") from error
        except sqlite3.Error as error:
            raise LogError(f"the log {self._path or 'in memory'} cannot be used: {error}") from error

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the log is closed")


def _entry(event: Event, run: str, number: int) -> Entry:
    over_ns = None
    if event.kind is Kind.CLOSED and event.moment:
        if event.moment.end_ns is None:
            raise ValueError(f"the moment {event.moment.id} is closed without an end")
        over_ns = event.epoch_ns + event.moment.end_ns
    return Entry(
        number=number,
        stream=event.stream,
        query_id=event.query.id if event.query else None,
        kind=event.kind,
        moment_id=event.moment.id if event.moment else None,
        over_ns=over_ns,
        backfill=event.backfill,
        payload=encode(event, run, number),
    )
