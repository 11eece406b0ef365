"""The file that an event log lives in: a SQLite database that one program holds. What else it may be is refused here.

Beside `events.db` stands `events.db.lock` while the log is open. Its lock is the kernel's: it is gone with the process,
however that ends, so a stale one cannot be. SQLite's own exclusive mode would do as well, but allows one connection.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from kernels.errors import InputError

APPLICATION_ID = 0x6C6D6576  # "lmev"
FORMAT = 1
BUSY_S = 5.0  # how long somebody else, like the sqlite3 shell, may hold the database
WAL_PAGES = 1000  # of 4 KiB: what is moved into the database at once, and about the size of the -wal file
_ROWS = 50  # of one statement: SQLite may be built for no more than 999 values
_ANOTHER_KIND = "that is a file of another kind, not a log of events"

_SCHEMA = """
CREATE TABLE runs (key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE moments (
    key INTEGER PRIMARY KEY,  -- number of the first event that told it; the same recording, played again, tells it anew
    stream TEXT NOT NULL, query_id TEXT NOT NULL, name TEXT NOT NULL,
    over_ns INTEGER  -- UTC; NULL while open
);
CREATE INDEX moment_over ON moments (query_id, over_ns);
CREATE INDEX moment_open ON moments (key) WHERE over_ns IS NULL;
CREATE TABLE events (
    number INTEGER PRIMARY KEY, run INTEGER NOT NULL, stream TEXT NOT NULL,
    query_id TEXT NOT NULL,  -- '' for a status: NULLs would all be different to the index below
    seq INTEGER NOT NULL, kind TEXT NOT NULL, moment INTEGER, over_ns INTEGER, backfill INTEGER NOT NULL,
    payload BLOB NOT NULL
);
CREATE UNIQUE INDEX event_id ON events (run, stream, query_id, seq);  -- (source, id) of the CloudEvent
CREATE INDEX event_moment ON events (moment) WHERE moment IS NOT NULL;
CREATE TABLE positions (reader TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
"""


def connect(path: Path | None) -> sqlite3.Connection:
    """A connection that commits when told to, for any thread. None: a database in memory, seen by nobody else."""
    database = sqlite3.connect(path or ":memory:", BUSY_S, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA synchronous = FULL")  # a commit is on the disk, not on its way there
    return database


def open_log(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection, int]:
    """Two connections to the database at `path`, made if there is none, and the lock that keeps others out: `unlock`
    comes last.

    InputError, one line, for a path that cannot hold a log: what is there already is left as it was.
    """
    try:
        if not path.parent.is_dir():
            raise InputError(f"the log cannot be {path}: the folder {path.parent} does not exist, make it first")
        if path.exists() and not path.is_file():
            raise InputError(f"the log cannot be {path}: that is not a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"the log {path} cannot be written: permission denied")
        if path.exists() and 0 < path.stat().st_size < 512:  # SQLite would take it for an empty one, and overwrite it
            raise InputError(f"the log cannot be {path}: {_ANOTHER_KIND}")
    except OSError as error:
        raise InputError(f"the log cannot be {path}: {error.strerror}") from None
    lock = _lock(path)
    with contextlib.ExitStack() as undo:
        undo.callback(unlock, path, lock)
        try:
            writer = connect(path)
            undo.callback(writer.close)
            _prepare(writer, path)
            reader = connect(path)
        except sqlite3.Error as error:
            raise InputError(_refusal(path, error)) from None
        undo.pop_all()
    return writer, reader, lock


@contextlib.contextmanager
def reading(path: Path, in_use: str) -> Iterator[sqlite3.Connection]:
    """A connection to the log at `path` as it lies there. Nothing in it changes: moments that a killed process left
    open stay open. Nobody else may have it meanwhile, if the folder can be written.

    InputError, one line, for what is no log of events. in_use: what to do where another process holds it.
    """
    if not path.is_file():
        raise InputError(f"there is no log {path}")
    if not os.access(path, os.R_OK):
        raise InputError(f"the log {path} cannot be read: permission denied")
    with contextlib.ExitStack() as stack:
        if os.access(path.parent, os.W_OK):
            stack.callback(unlock, path, _lock(path, in_use))
        # With nothing beside it that belongs to it, it is read as a file that nobody writes: else SQLite would leave
        # files there. What a killed process left in -wal is read too, and stays where it is.
        has_more = path.with_name(f"{path.name}-wal").exists()
        uri = f"{path.resolve().as_uri()}?mode=ro{'' if has_more else '&immutable=1'}"
        try:
            database = sqlite3.connect(uri, BUSY_S, isolation_level=None, uri=True)
            stack.callback(database.close)
            if _is_empty(database, path):
                raise InputError(f"the log {path} is empty")
        except sqlite3.Error as error:
            raise InputError(_refusal(path, error, "read")) from None
        yield database


def create(database: sqlite3.Connection) -> None:
    """The empty tables, all or none: a process killed in the middle leaves an empty database, which is no harm."""
    database.executescript(
        f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; {_SCHEMA} COMMIT"
    )


def insert(database: sqlite3.Connection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Rows of all columns, many in one statement."""
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        places = ", ".join([f"({', '.join('?' * len(some[0]))})"] * len(some))
        database.execute(f"INSERT INTO {table} VALUES {places}", [value for row in some for value in row])


def used_bytes(database: sqlite3.Connection) -> int:
    """What the database holds. Its file never shrinks, but uses again what is free."""
    names = "page_count", "freelist_count", "page_size"
    pages, free, size = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


def unlock(path: Path, lock: int) -> None:
    """Let others have the log. Its file goes first: `_lock` sees to it that nobody takes one that is gone."""
    with contextlib.suppress(OSError):
        lock_path(path).unlink()
    os.close(lock)


def lock_path(path: Path) -> Path:
    """Of the file beside the log. Two names of one log have one lock."""
    real = path.resolve()
    return real.with_name(f"{real.name}.lock")


def _lock(path: Path, in_use: str = "stop that, or name another") -> int:
    beside = lock_path(path)
    while True:
        try:
            lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"the log {path} cannot be written: {beside.name}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), beside.stat()):
                    return lock
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"the log {path} is in use by another livemoments: {in_use}") from None
        except OSError as error:
            os.close(lock)
            raise InputError(f"the log {path} cannot be locked: {error.strerror}") from None
        os.close(lock)  # its holder took the file away before we had the lock: that lock keeps nobody out


def _is_empty(database: sqlite3.Connection, path: Path) -> bool:
    """Whether nothing was ever stored in it. InputError for what is not ours to read."""
    application, version = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    empty = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and not (empty and application == 0):
        raise InputError(f"the log cannot be {path}: that is the database of another program")
    if version > FORMAT:
        raise InputError(f"the log {path} was written by a newer livemoments: update, or name another")
    return empty


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    empty = _is_empty(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    database.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * 4096}")  # a longer -wal file shrinks again
    if empty:
        create(database)


def _refusal(path: Path, error: sqlite3.Error, done: str = "written") -> str:
    """One line for what SQLite says of a file that it cannot work with."""
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_NOTADB:
        return f"the log cannot be {path}: {_ANOTHER_KIND}"
    if code == sqlite3.SQLITE_CORRUPT:
        return f"the log {path} is damaged ({error}): move it away, or name another"
    return f"the log {path} cannot be {done}: {error}"
