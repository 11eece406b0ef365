"""The event log: numbers, what is read back, what a kill, a full disk and a second program do to it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.errors import InputError, LogError
from stream.deliver import log, log_file
from stream.deliver.log import Entry, EventLog
from stream.events import encode
from stream.types import NS, Clip, Event, Kind, Moment
from tests.test_events import EPOCH_NS, event, query, status

ROOT = Path(__file__).parent.parent
CAT = query("a cat")


def told(
    kind: Kind, seq: int, name: str, *, stream: str = "door", start_s: float = 0, end_s: float = 1, score: float = 0.75
) -> Event:
    """An event of the moment `name`; `end_s` counts for CLOSED."""
    end_ns = round(end_s * NS) if kind is Kind.CLOSED else None
    start_ns = round(start_s * NS)
    moment = Moment(name, stream, CAT.id, start_ns, end_ns, start_ns + NS // 2, score)
    return Event(kind, stream, seq, EPOCH_NS, EPOCH_NS + start_ns + seq * NS, CAT, moment, 0.5, 456_789_000)


def numbers(entries: list[Entry]) -> list[int]:
    return [entry.number for entry in entries]


def all_of(events: EventLog) -> list[Entry]:
    found: list[Entry] = []
    while page := events.read(found[-1].number if found else 0, 100):
        found += page
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture(params=["file", "memory"])
def events(request: pytest.FixtureRequest, path: Path) -> Iterator[EventLog]:
    opened = EventLog(path if request.param == "file" else None)
    yield opened
    opened.close()


def test_entries_come_back_as_they_were_appended(events: EventLog) -> None:
    assert (events.first, events.last, events.read(0)) == (1, 0, [])
    sent = [
        status(1, state="connected"),
        told(Kind.OPENED, 1, "m"),
        told(Kind.CLOSED, 2, "m", end_s=2.5),
        replace(told(Kind.OPENED, 3, "n"), backfill=True),
    ]
    appended = events.append(sent[:1]) + events.append(sent[1:])
    assert events.append([]) == []
    assert numbers(appended) == [1, 2, 3, 4]
    assert (events.first, events.last) == (1, 4)
    assert [entry.payload for entry in appended] == [
        encode(each, events.run, number) for number, each in enumerate(sent, 1)
    ]
    assert [entry.query_id for entry in appended] == [None, CAT.id, CAT.id, CAT.id]
    assert [entry.moment_id for entry in appended] == [None, "m", "m", "n"]
    assert [entry.over_ns for entry in appended] == [None, None, EPOCH_NS + 2_500_000_000, None]
    assert [entry.backfill for entry in appended] == [False, False, False, True]
    assert [entry.kind for entry in appended] == [Kind.STATUS, Kind.OPENED, Kind.CLOSED, Kind.OPENED]
    assert events.read(0) == appended
    assert events.read(1, 2) == appended[1:3]
    assert events.read(4) == events.read(99) == []


def test_what_the_memory_holds_is_what_the_disk_holds(path: Path) -> None:
    events = EventLog(path)
    events.append([status(seq) for seq in range(1, log.KEPT + 301)])
    events.append([status(1, "yard"), told(Kind.OPENED, 1, "m"), told(Kind.CLOSED, 2, "m")])
    # One page from the disk, one that the memory takes over in the middle of, one from memory.
    for after in (0, 290, 303, 304, events.last - 3):
        assert numbers(events.read(after, 40)) == list(range(after + 1, min(after + 40, events.last) + 1))
    assert numbers(all_of(events)) == list(range(1, events.last + 1))
    assert [events.remembers(after) for after in (0, 302, 303, events.last)] == [False, False, True, True]
    before = events.read(events.last - 3)
    events.close()
    again = EventLog(path)
    assert again.read(again.last - 3) == before  # nothing is in memory yet
    again.close()


def test_numbers_go_on_after_a_restart(path: Path) -> None:
    runs = set()
    for turn in range(3):
        events = EventLog(path)
        assert events.recovered == []
        assert numbers(events.append([status(1), status(2)])) == [2 * turn + 1, 2 * turn + 2]
        runs.add(events.run)
        events.close()
    assert len(runs) == 3  # or the ids would repeat
    events = EventLog(path)
    ids = [json.loads(entry.payload)["id"] for entry in events.read(0)]
    assert len(set(ids)) == 6
    events.close()
    assert sorted(each.name for each in path.parent.iterdir()) == ["events.db"]


def test_an_event_is_appended_once_and_a_bad_batch_not_at_all(events: EventLog) -> None:
    events.append([told(Kind.OPENED, 1, "m"), status(1)])
    for bad in (told(Kind.UPDATED, 1, "m"), status(1), Event(Kind.STATUS, "door", 9, 0, 0), event(7, kind=Kind.CLOSED)):
        with pytest.raises(ValueError, match=r"already|status|without an end"):
            events.append([status(2), bad])
    assert events.last == 2
    assert numbers(events.append([status(2), status(1, "yard")])) == [3, 4]


def test_of_query(events: EventLog) -> None:
    other = event(1, asked=query("a dog"))
    events.append(
        [
            told(Kind.OPENED, 1, "old", start_s=10),
            told(Kind.CLOSED, 2, "old", start_s=10, end_s=20),
            status(1),
            told(Kind.OPENED, 3, "new", start_s=30),
            other,
            told(Kind.HIGHLIGHT, 4, "new", start_s=30),
            told(Kind.CLOSED, 5, "new", start_s=30, end_s=40),
            told(Kind.OPENED, 1, "old", stream="yard", start_s=5),  # the same name on another stream, and open
            told(Kind.OPENED, 6, "open", start_s=50),
            told(Kind.UPDATED, 7, "open", start_s=50),
        ]
    )

    def found(stream: str | None, since_s: int, before: int = 11, asked: str = CAT.id) -> list[int]:
        return numbers(events.of_query(stream, asked, EPOCH_NS + since_s * NS, before))

    assert found(None, 0) == [1, 2, 4, 6, 7, 8, 9, 10]
    assert found("door", 0) == [1, 2, 4, 6, 7, 9, 10]
    assert found("door", 19) == [1, 2, 4, 6, 7, 9, 10]
    assert found("door", 20) == [4, 6, 7, 9, 10]  # half-open: at its end a moment is over
    assert found("door", 40) == [9, 10]
    assert found("door", 1000) == [9, 10]
    assert found("yard", 1000) == [8]
    assert found(None, 1000) == [8, 9, 10]
    assert found("door", 1000, before=10) == [9]
    assert found("door", 1000, before=7) == [4, 6]  # what closes with 7 is open until then
    assert found("nowhere", 0) == found(None, 0, asked="q0") == []
    assert events.of_query("yard", CAT.id, 0, 11) == events.read(7, 1)


def test_a_recording_that_is_played_again_tells_its_moments_anew(path: Path) -> None:
    for number in (1, 3):
        events = EventLog(path)
        events.append([told(Kind.OPENED, 1, "m")])
        assert numbers(events.of_query(None, CAT.id, EPOCH_NS + 100 * NS, 99)) == [number]
        events.append([told(Kind.CLOSED, 2, "m", end_s=20)])
        assert events.of_query(None, CAT.id, EPOCH_NS + 20 * NS, 99) == []
        assert numbers(events.of_query(None, CAT.id, EPOCH_NS + 19 * NS, 99)) == list(range(1, number + 2))
        events.close()


def clip_of(seq: int, name: str, **times: float) -> Event:
    closed = told(Kind.CLOSED, seq, name, **times)  # type: ignore[arg-type]
    return replace(closed, kind=Kind.CLIP, clip=Clip("x", 0, NS, 1, thumbnail=False))


def test_a_clip_belongs_to_the_moment_it_shows_and_opens_none(events: EventLog) -> None:
    def found(since_s: int) -> list[int]:
        return numbers(events.of_query(None, CAT.id, EPOCH_NS + since_s * NS, 99))

    events.append([told(Kind.OPENED, 1, "a"), told(Kind.OPENED, 2, "b", start_s=30)])
    events.append([told(Kind.CLOSED, 3, "a", end_s=20)])
    events.append([told(Kind.CLOSED, 4, "b", start_s=30, end_s=40), clip_of(5, "b", start_s=30, end_s=40)])
    (entry,) = events.append([clip_of(6, "a", end_s=20)])
    assert (entry.kind, entry.moment_id, entry.over_ns) == (Kind.CLIP, "a", None)
    assert found(0) == [1, 2, 3, 4, 5, 6]
    assert found(25) == [2, 4, 5]
    assert found(45) == []
    # One of which nothing is known any more is told like any other event, and no moment begins with it.
    assert numbers(events.append([clip_of(7, "gone")])) == [7]
    assert found(1000) == []


def test_a_clip_finds_its_moment_after_many_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "OVER_KEPT", 2)
    events = EventLog(path)
    for n in range(5):
        events.append([told(Kind.OPENED, 2 * n + 1, f"m{n}"), told(Kind.CLOSED, 2 * n + 2, f"m{n}", end_s=10 + n)])
    events.append([clip_of(11, "m0", end_s=10), clip_of(12, "m4", end_s=14)])
    assert numbers(events.of_query(None, CAT.id, EPOCH_NS + 13 * NS, 99)) == [9, 10, 12]
    assert numbers(events.of_query(None, CAT.id, EPOCH_NS, 99)) == list(range(1, 13))
    events.close()
    # After a restart nothing is closed once more, and nothing is told twice.
    events = EventLog(path)
    assert events.recovered == [] and events.last == 12
    events.close()


def test_positions(events: EventLog) -> None:
    assert events.position("hook") is None
    events.keep_position("hook", 7)
    events.keep_position("other", 0)
    events.keep_position("hook", 8)
    assert (events.position("hook"), events.position("other")) == (8, 0)


def test_positions_survive_a_restart(path: Path) -> None:
    events = EventLog(path)
    events.keep_position("hook", 7)
    events.close()
    events = EventLog(path)
    assert events.position("hook") == 7
    events.close()


def test_closed_is_closed(events: EventLog) -> None:
    events.append([status(1)])
    events.close()
    events.close()
    for call in (
        lambda: events.append([status(2)]),
        lambda: events.read(0),
        lambda: events.position("hook"),
        lambda: events.of_query(None, "q", 0, 9),
        lambda: events.keep_position("hook", 1),
    ):
        with pytest.raises(ValueError, match="the log is closed"):
            call()


def test_threads_read_while_others_append(events: EventLog) -> None:
    total, seen, wrong = 1000, [0] * 4, []
    appended = threading.Event()

    def follow(reader: int) -> None:
        after = 0
        while after < total:
            page = events.read(after, (1, 7, 256, 1000)[reader])
            if numbers(page) != list(range(after + 1, after + 1 + len(page))) or any(
                json.loads(entry.payload)["lognumber"] != entry.number for entry in page
            ):
                wrong.append((reader, after, numbers(page)))
                return
            after += len(page)
            if not page:
                appended.wait(0.01)
            if reader == 3:  # this one asks the database, too
                events.keep_position("hook", after)
                events.of_query("door", CAT.id, 0, after)
        seen[reader] = after

    def write(stream: str) -> None:
        for seq in range(1, 501, 5):
            events.append([status(each, stream) for each in range(seq, seq + 5)])
            appended.set()
            appended.clear()

    threads = [threading.Thread(target=follow, args=[reader]) for reader in range(4)]
    threads += [threading.Thread(target=write, args=[stream]) for stream in ("door", "yard")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert seen == [total] * 4
    assert events.position("hook") == total
    assert len({json.loads(entry.payload)["id"] + entry.stream for entry in all_of(events)}) == total


def test_readers_see_whole_batches(events: EventLog) -> None:
    stop, counts = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            counts.add(len(events.of_query(None, CAT.id, 0, 1 << 40)))

    reader = threading.Thread(target=look)
    reader.start()
    for seq in range(1, 8001, 1000):  # a batch takes many statements
        events.append([told(Kind.UPDATED, each, "m") for each in range(seq, seq + 1000)])
    stop.set()
    reader.join(30)
    assert len(counts) > 2
    assert {count % 1000 for count in counts} == {0}


def test_the_oldest_go_when_the_log_outgrows_its_size(path: Path) -> None:
    limit = 2 << 20
    events = EventLog(path, max_bytes=limit)
    longest_s, most, wal = 0.0, 0, path.with_name("events.db-wal")
    for seq in range(1, 8_001, 20):
        batch = [told((Kind.OPENED, Kind.CLOSED)[each % 2], each, f"m{each // 2}") for each in range(seq + 1, seq + 21)]
        before_s = time.monotonic()
        events.append(batch)
        longest_s = max(longest_s, time.monotonic() - before_s)
        most = max(most, path.stat().st_size)
        assert wal.stat().st_size < 3 * log_file.WAL_PAGES * 4096
    assert limit * 0.8 < most < limit * 1.1
    assert longest_s < 2
    assert events.last == 8_000
    assert 1500 < events.last - events.first < 4500
    assert numbers(events.read(0, 3)) == [events.first, events.first + 1, events.first + 2]
    assert numbers(all_of(events)) == list(range(events.first, 8_001))
    assert numbers(events.of_query(None, CAT.id, 0, 99_999)) == list(range(events.first, 8_001))
    first = events.first
    events.close()
    with sqlite3.connect(path) as database:  # what a moment leaves behind goes with its last event
        (moments,) = database.execute("SELECT count(*) FROM moments").fetchone()
        assert moments <= (8_000 - first) // 2 + 2
    database.close()
    events = EventLog(path, max_bytes=limit)
    assert (events.first, events.last) == (first, 8_000)
    assert numbers(events.append([status(1)])) == [8_001]
    events.close()


def test_an_open_moment_outlives_its_first_events(path: Path) -> None:
    events = EventLog(path, max_bytes=1)
    events.append([told(Kind.OPENED, 1, "m")])
    events.append([status(seq) for seq in range(1, 11)])
    for seq in range(11, 101):
        events.append([status(seq)])
    assert events.first > 1
    assert events.of_query(None, CAT.id, 0, 999) == []
    appended = events.append([told(Kind.HIGHLIGHT, 2, "m"), told(Kind.CLOSED, 3, "m", end_s=5)])
    assert events.of_query(None, CAT.id, EPOCH_NS + 4 * NS, 999) == appended
    events.append([told(Kind.OPENED, 4, "n")])
    for seq in range(101, 201):
        events.append([status(seq)])
    events.close()
    events = EventLog(path, max_bytes=1)  # as after a kill: nothing is left of the moment that was open
    assert events.recovered == []
    assert events.of_query(None, CAT.id, 0, 999) == []
    events.close()


def test_numbers_are_not_given_again_when_all_but_the_newest_is_gone(path: Path) -> None:
    for last in (50, 100):
        events = EventLog(path, max_bytes=1)
        for seq in range(1, 51):
            events.append([status(seq)])
        assert events.last == last
        assert numbers(events.read(0)) == list(range(events.first, last + 1))
        assert last - 1 <= events.first <= last  # each append makes room before it stores
        events.close()


def test_what_a_killed_process_left_open_is_closed(path: Path) -> None:
    """The moment ends when it was last told of; a second opening finds nothing to close."""
    script = (
        "import os; from pathlib import Path; from tests.test_log import *\n"
        f"events = EventLog(Path({str(path)!r}))\n"
        "events.append([told(Kind.OPENED, 1, 'over'), told(Kind.CLOSED, 2, 'over'),"
        " told(Kind.OPENED, 3, 'm', start_s=5, score=0.6), status(1),"
        " told(Kind.UPDATED, 4, 'm', start_s=5, score=0.9), told(Kind.HIGHLIGHT, 5, 'm', start_s=5, score=0.8),"
        " told(Kind.OPENED, 1, 'm', stream='yard')])\n"
        "print(events.run, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = killed.stdout.strip()
    events = EventLog(path)
    assert events.run != run
    assert numbers(events.recovered) == [8, 9] == list(range(8, events.last + 1))
    assert events.read(7) == events.recovered
    closed = events.recovered[0]
    assert (closed.stream, closed.query_id, closed.kind, closed.moment_id) == ("door", CAT.id, Kind.CLOSED, "m")
    message = json.loads(closed.payload)
    assert message["id"] == f"{run}/{CAT.id}/6"
    assert (message["type"], message["lognumber"]) == ("io.livemoments.moment.closed.v1", 8)
    newest = json.loads(events.read(5, 1)[0].payload)  # the highlight
    assert message["source"] == newest["source"] and message["subject"] == newest["subject"]
    assert message["data"] == {
        **newest["data"],
        "seq": 6,
        "end": newest["time"],
        "end_s": 10.0,
        "score": 0.9,
        "capture_to_publish_ms": None,
        "interrupted": True,
    }
    assert closed.over_ns == (EPOCH_NS + 10 * NS) // 1000 * 1000
    assert json.loads(events.recovered[1].payload)["id"] == f"{run}/{CAT.id}/2"
    everything = all_of(events)
    events.close()
    events = EventLog(path)
    assert events.recovered == []
    assert all_of(events) == everything
    assert events.of_query(None, CAT.id, EPOCH_NS + 60 * NS, 99) == []
    events.close()


def test_a_recording_is_closed_on_its_own_clock(path: Path) -> None:
    """It was made an hour before it is told of: it does not last until now."""
    opened, updated = told(Kind.OPENED, 1, "m", start_s=8), told(Kind.UPDATED, 2, "m", start_s=8)
    now_ns = EPOCH_NS + 3600 * NS
    events = EventLog(path)
    events.append([told(Kind.OPENED, 3, "m"), told(Kind.CLOSED, 4, "m")])  # an earlier time it was played
    events.append([replace(opened, emitted_ns=now_ns), replace(updated, emitted_ns=now_ns + 3 * NS)])
    events.append([told(Kind.OPENED, 5, "early", start_s=8, score=1)])
    events.append([replace(told(Kind.OPENED, 6, "peak", start_s=8), emitted_ns=EPOCH_NS)])  # a clock that was set back
    events.close()
    events = EventLog(path)
    data = [json.loads(entry.payload)["data"] for entry in events.recovered]
    assert [(each["moment_id"], each["start_s"], each["end_s"]) for each in data] == [
        ("m", 8.0, 11.0),
        ("early", 8.0, 13.0),
        ("peak", 8.0, 8.5),
    ]
    assert [each["seq"] for each in data] == [7, 8, 9]
    events.close()


def test_what_was_appended_survives_a_kill(path: Path) -> None:
    """Killed in the middle of appending, again and again: all that it said was stored is there, once."""
    script = (
        "from pathlib import Path; from tests.test_log import *\n"
        f"events = EventLog(Path({str(path)!r}), max_bytes=64 << 20)\n"
        "seq = 0\n"
        "while True:\n"
        "    entries = events.append([status(seq + each) for each in range(1, 2 + seq % 7)])\n"
        "    seq += len(entries)\n"
        "    for each, entry in enumerate(entries, seq - len(entries) + 1):\n"
        "        os.write(1, f'{entry.number} {events.run}/status/{each}\\n'.encode())\n"
    )
    said: dict[int, str] = {}
    for turn in range(3):
        child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(300 + 400 * turn)]
        child.kill()
        lines += child.stdout.read().splitlines(keepends=True)
        child.wait(10)
        child.stdout.close()
        for line in lines:
            if line.endswith("\n"):
                number, name = line.split()
                assert int(number) not in said
                said[int(number)] = name
        events = EventLog(path)  # no stale lock
        stored = all_of(events)
        events.close()
        assert numbers(stored) == list(range(1, len(stored) + 1))
        ids = [json.loads(entry.payload)["id"] for entry in stored]
        assert len(set(ids)) == len(ids)
        assert all(ids[number - 1] == name for number, name in said.items())
        database = sqlite3.connect(path)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.close()
    assert len(said) >= 2100


def fill(events: EventLog) -> tuple[int, LogError]:
    """Append until the disk is full: the last seq that went in, and what was said."""
    for seq in range(1, 100_000, 10):
        try:
            events.append([status(each) for each in range(seq, seq + 10)])
        except LogError as error:
            return seq - 1, error
    raise AssertionError("the disk never filled up")


def test_a_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "livemoments", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(400_000))
        events = EventLog(tmp_path / "events.db")
        seq, error = fill(events)
        assert seq > 100
        assert "full" in str(error) and "\n" not in str(error)
        assert events.last == seq == len(all_of(events))  # nothing of the batch, and no hole
        with pytest.raises(LogError):
            events.append([status(seq + each) for each in range(1, 11)])
        assert events.last == seq
        ballast.unlink()
        assert numbers(events.append([status(seq + 1)])) == [seq + 1]
        assert len(all_of(events)) == seq + 1
        events.close()
        events = EventLog(tmp_path / "events.db")
        assert events.last == seq + 1
        events.close()
        ballast.write_bytes(b"")
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
            file.write(bytes(4096))
        with pytest.raises(InputError, match="full"):
            EventLog(tmp_path / "other.db")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_file_that_may_not_grow(path: Path) -> None:
    """The same without a disk of one's own: the system refuses to make any file longer."""
    script = (
        "import resource; from tests.test_log import *\n"
        f"events = EventLog(Path({str(path)!r}))\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))\n"
        "seq, error = fill(events)\n"
        "assert 'disk' in str(error), error\n"
        "assert seq == events.last == len(all_of(events)), (seq, events.last)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "assert numbers(events.append([status(seq + 1)])) == [seq + 1]\n"
        "events.close()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    events = EventLog(path)
    assert numbers(all_of(events)) == list(range(1, events.last + 1))
    events.close()


def refusal(path: Path) -> str:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError) as refused:
        EventLog(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not log_file.lock_path(path).exists()
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


def test_paths_that_hold_no_log_are_refused(tmp_path: Path, path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent" / "events.db")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")
    path.write_text("door,a dog runs\n" * 100)
    assert "another kind" in refusal(path)
    path.write_text("?")
    assert "another kind" in refusal(path)
    with pytest.raises(InputError, match="File name too long"):
        EventLog(tmp_path / ("x" * 300))
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    assert "another program" in refusal(tmp_path / "other.db")
    named = sqlite3.connect(tmp_path / "named.db")
    named.execute("PRAGMA application_id = 77")
    named.close()
    assert "another program" in refusal(tmp_path / "named.db")


def test_a_newer_or_a_damaged_log_is_refused_and_an_empty_file_is_not(path: Path) -> None:
    path.touch()
    events = EventLog(path)
    events.append([status(seq) for seq in range(1, 200)])
    events.close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 2")
    database.close()
    assert "newer" in refusal(path)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises((InputError, LogError)) as refused:
        EventLog(path)
    assert "\n" not in str(refused.value)


def test_a_log_that_cannot_be_written_is_refused() -> None:
    """Root may write anywhere, so as root somebody else tries."""
    script = (
        "from tests.test_log import *\n"
        "os.setuid(int(sys.argv[1]))\n"
        "for path in sys.argv[2:]:\n"
        "    with pytest.raises(InputError) as refused: EventLog(Path(path))\n"
        "    print(refused.value)"
    )
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which nobody else may look into
        folder, file, hidden = Path(name, "folder"), Path(name, "events.db"), Path(name, "hidden")
        Path(name).chmod(0o777)
        EventLog(file).close()
        file.chmod(0o444)
        folder.mkdir(0o555)
        hidden.mkdir(0o000)
        nobody = 65534 if os.getuid() == 0 else os.getuid()
        tried = [str(nobody), str(folder / "events.db"), str(file), str(hidden / "events.db")]
        done = subprocess.run([sys.executable, "-c", script, *tried], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "events.db.lock: Permission denied" in lines[0]
    assert "cannot be written: permission denied" in lines[1]
    assert "Permission denied" in lines[2]


def test_one_process_holds_the_log(path: Path) -> None:
    script = (
        "from tests.test_log import *\n"
        f"events = EventLog(Path({str(path)!r}))\n"
        "events.append([status(1)])\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdin
    link = path.with_name("link.db")
    link.symlink_to(path)
    try:
        assert child.stdout.readline() == "open\n"
        for name in (path, link):
            with pytest.raises(InputError, match="in use by another livemoments"):
                EventLog(name)
    finally:
        child.kill()
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
    events = EventLog(path)
    assert events.last == 1
    with pytest.raises(InputError, match="in use"):  # nor twice in one process
        EventLog(link)
    assert numbers(events.append([status(1)])) == [2]
    events.close()


def test_many_open_the_log_at_once_and_one_gets_it(path: Path) -> None:
    """The lock's file comes and goes: whoever holds the log holds the file that is there."""
    holders, most, failures = 0, 0, 0
    counting = threading.Lock()

    def contend() -> None:
        nonlocal holders, most, failures
        for _ in range(20):
            try:
                events = EventLog(path)
            except InputError:
                with counting:
                    failures += 1
                continue
            with counting:
                holders += 1
                most = max(most, holders)
            with counting:
                holders -= 1
            events.close()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert 0 < failures < 120


def test_somebody_who_looks_with_sqlite_disturbs_nothing(path: Path) -> None:
    events = EventLog(path)
    events.append([status(1)])
    visitor = sqlite3.connect(path, isolation_level=None)
    visitor.execute("BEGIN")
    assert visitor.execute("SELECT count(*) FROM events").fetchone() == (1,)
    assert numbers(events.append([status(2)])) == [2]
    visitor.execute("ROLLBACK")
    visitor.close()
    events.close()
