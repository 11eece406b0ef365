"""`livemoments subscribe`, as a process of its own against real servers, and its table without a terminal."""

import argparse
import json
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

from kernels.errors import InputError
from stream.client import subscribe
from stream.client.board import EARLIER, MAX_ROWS, Board, line
from stream.client.resume import Resume
from stream.deliver.log import Entry, EventLog
from stream.deliver.zeromq import Publisher, new_keys
from stream.events import GapCounter, encode, lost_notice, to_cloudevent, topic
from stream.types import NS, Clip, Kind
from tests.sockets import Program, wait_for
from tests.test_events import DOG, event, query, status

WAIT_S = 15.0
"""How long a test waits for what must come: a process starts slowly on a busy machine."""
PROGRAM = "import sys; from livemoments import main; sys.exit(main(['subscribe', *sys.argv[1:]]))"


class Detector(Program):
    """A server to subscribe to. What is told of a query comes once the program under test has asked for it."""

    def await_query(self, *texts: str) -> None:
        wait_for(lambda: self.wanted("door") | self.wanted("yard") >= set(texts), WAIT_S)

    def await_clients(self, count: int = 1) -> None:
        wait_for(lambda: sum(bool(peer.wants) for peer in self.server.board.peers) == count, WAIT_S)


@pytest.fixture
def detector() -> Iterator[Detector]:
    with Detector() as detector:
        yield detector


class Process:
    """The program. Lines of its output arrive in queues, so that no wait is without end."""

    def __init__(self, *arguments: str, stdout: int = subprocess.PIPE) -> None:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
        # A user's stdout is buffered, whatever the environment of the tests says.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: queue.Queue[str] = queue.Queue()
        self.notices: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines))
            for pipe, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.notices))
            if pipe is not None
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: IO[str], lines: "queue.Queue[str]") -> None:
        with pipe:
            for line in pipe:
                lines.put(line)

    def line(self) -> str:
        return self.lines.get(timeout=WAIT_S)

    def await_lines(self, count: int) -> None:
        """That so many have come that were not read."""
        wait_for(lambda: self.lines.qsize() >= count, WAIT_S)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Waits for it. The exit code, and what is left of stderr."""
        code = self.process.wait(WAIT_S)
        for reader in self._readers:
            reader.join()
        return code, "".join(self.notices.queue)

    def kill(self) -> None:
        self.process.kill()
        self.end()


Launch = Callable[..., Process]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts the program; whatever becomes of the test, it does not outlive it."""
    processes: list[Process] = []

    def start(*arguments: str, stdout: int = subprocess.PIPE) -> Process:
        processes.append(Process(*arguments, stdout=stdout))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subscribe.add_arguments(parser)
    return parser.parse_args(words)


def test_json_prints_one_event_a_line_until_interrupted(detector: Detector, launch: Launch) -> None:
    process = launch(detector.url, "-q", DOG.text, "--json")
    detector.await_query(DOG.text)
    closed = event(2, kind=Kind.CLOSED, end_ns=20_000_000_000)
    entries = [
        entry for sent in (event(1), event(1, asked=query("a cat")), status(1), closed) for entry in detector.tell(sent)
    ]
    for i in (0, 2, 3):  # each line comes at once: nothing waits for a full buffer
        assert process.line() == entries[i].payload.decode() + "\n"
    process.interrupt()
    assert process.end() == (130, "")
    assert process.lines.empty()


def test_for_ends_it_and_a_stream_can_be_chosen(detector: Detector, launch: Launch) -> None:
    process = launch(detector.url, "-q", f" {DOG.text}", "--stream", "yard", "--json", "--for", "1.5")
    detector.await_query(DOG.text)
    detector.tell(event(1), event(1, stream="yard"))
    assert json.loads(process.line())["data"]["stream"] == "yard"
    assert process.end() == (0, "")


def test_a_reader_that_goes_away_ends_it_quietly(detector: Detector, launch: Launch) -> None:
    reading, writing = os.pipe()
    process = launch(detector.url, "-q", DOG.text, "--json", stdout=writing)
    os.close(writing)
    detector.await_query(DOG.text)
    os.close(reading)
    detector.tell(event(1))
    assert process.end() == (0, "")


def test_it_connects_again_and_nothing_is_missed_or_told_twice(tmp_path: Path, launch: Launch) -> None:
    port, cat, told = 0, query("a cat"), list[Entry]()
    process: Process | None = None
    for turn in range(4):
        log = EventLog(tmp_path / "events.db")
        told += log.recovered  # the moments that the turn before left open
        with Detector(log, port=port) as detector:
            port = detector.server.port
            told += detector.tell(event(1, asked=cat), status(1))[: 1 + bool(process)]  # nobody is there
            process = process or launch(detector.url, "-q", DOG.text, "-q", cat.text, "--json")
            detector.await_query(DOG.text, cat.text)
            told += detector.tell(event(1), event(2, asked=cat), event(1, asked=query("a bus")), status(2))
            if turn % 2:  # the server ends in the midst of it
                told += detector.tell(*(event(seq) for seq in range(2, 300)))
            else:
                due = sum(entry.query_id in (DOG.id, cat.id, None) for entry in told)
                process.await_lines(due)
        while "has gone" not in process.notices.get(timeout=WAIT_S):
            pass
    assert process is not None
    with Detector(EventLog(tmp_path / "events.db"), port=port) as detector:
        told += [*detector.log.recovered, *detector.tell(status(1))]
        wanted = [entry for entry in told if entry.query_id in (DOG.id, cat.id, None)]
        lines = [process.line() for _ in wanted]
        detector.await_query(DOG.text, cat.text)
        (last,) = detector.tell(status(2))
        assert json.loads(process.line())["lognumber"] == last.number
    process.interrupt()
    assert process.end()[0] == 130 and process.lines.empty()
    for query_id in (DOG.id, cat.id, None):  # in order within a query; after a break one comes after the other
        numbers = [m["lognumber"] for m in map(json.loads, lines) if m.get("subject") == query_id]
        assert numbers == [entry.number for entry in wanted if entry.query_id == query_id]


def test_a_server_whose_log_begins_anew(detector: Detector, launch: Launch) -> None:
    process = launch(detector.url, "-q", DOG.text)
    detector.await_query(DOG.text)
    detector.tell(*(event(seq) for seq in range(1, 6)))
    assert f'opened     door  "{DOG.text}"' in process.line()
    assert [process.line() for _ in range(4)]
    detector.server.close()
    assert "has gone" in process.notices.get(timeout=WAIT_S)
    with Detector(port=detector.server.port) as again:
        again.await_query(DOG.text)
        again.tell(event(1))
        again.tell(event(4))
        assert "missed" not in process.line()  # another run counts from 1
        assert "(2 missed before it)" in process.line()
        notices = [process.notices.get(timeout=WAIT_S)]
        while "again" not in notices[-1] or "trying" in notices[-1]:
            notices.append(process.notices.get(timeout=WAIT_S))
        assert notices[-1] == f"connected to {detector.url} again\n"
        process.interrupt()
        assert process.end() == (130, "")


def test_a_break_in_the_midst_of_the_past() -> None:
    """Two queries follow the log one after the other: each goes on from where it was, and a status comes once."""

    def came(number: int, subject: str | None) -> dict[str, object]:
        return {"type": "x", "lognumber": number} | ({"subject": subject} if subject else {})

    resume = Resume(["a dog", "a cat", "A  dog"], {"stream": "*", "backfill": 9.0}, None)

    def answered(last: int) -> list[object]:
        requests = resume.requests()
        for query_id in ("dog", "cat"):
            assert not resume.is_news({"op": "subscribed", "query_id": query_id, "lognumber": last})
        return [request.get("since", request.get("backfill")) for request in requests]

    assert answered(10) == [9.0, 9.0]
    assert [resume.is_news(came(n, "dog")) for n in (3, 4)] == [True, True]
    assert answered(10) == [9.0, 9.0]  # its past had not come to an end
    assert [resume.is_news(came(n, "dog")) for n in (3, 4, 5)] == [False, False, True]
    for query_id in ("dog", "cat"):
        assert not resume.is_news({"op": "caught_up", "query_id": query_id, "stream": "door", "lognumber": 10})
    assert [resume.is_news(came(11, "dog")), resume.is_news(came(12, None))] == [True, True]
    assert answered(30) == [12, 12]
    assert [resume.is_news(came(n, "dog")) for n in (13, 20)] == [True, True]
    assert resume.is_news(came(21, None))
    assert answered(30) == [20, 12]  # the cat has been told nothing
    assert not resume.is_news(came(21, None))
    assert [resume.is_news(came(n, "cat")) for n in (14, 30)] == [True, True]
    assert resume.is_news({"type": "lost"})


def test_what_was_over_before_it_was_asked_for_is_shown_as_such(detector: Detector, launch: Launch) -> None:
    low = detector.interest.encode(DOG.text, 0.25)
    old = [event(1, asked=low), event(2, asked=low, kind=Kind.CLOSED, end_ns=20_000_000_000), event(3)]
    detector.tell(*(replace(each, backfill=True, latency_ns=None) for each in old), status(1))
    words = ("-q", DOG.text, "--threshold", "0.25", "--cooldown", "9", "--since", "0")
    process = launch(detector.url, *words)
    assert [process.line().rstrip().endswith(f"score 0.75  {EARLIER}") for _ in range(2)] == [True, True]
    assert "reconnecting" in process.line()
    process.interrupt()
    assert process.end() == (130, "")


def test_a_token_and_keys_in_files(tmp_path: Path, launch: Launch) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    with Detector(token="0123456789abcdef") as detector:
        process = launch(detector.url, "-q", DOG.text, "--token-file", str(tmp_path / "token"))
        detector.await_query(DOG.text)
        with pytest.raises(InputError, match="token is wrong or missing"):
            subscribe.run(arguments(detector.url, "--token", "nonsense"))
        process.interrupt()
        assert process.end() == (130, "")
    server, client = new_keys(), new_keys()
    publisher = Publisher(0, curve=(server[1], [client[0]]))
    (tmp_path / "key").write_text(client[1])
    words = ("--server-key", server[0], "--secret-key-file", str(tmp_path / "key"))
    process = launch(publisher.address, *words, "--json")
    deadline, seq = time.monotonic() + WAIT_S, 0
    while process.lines.empty() and time.monotonic() < deadline:
        publisher.publish(topic(event(seq := seq + 1)), encode(event(seq), "run1"))
        time.sleep(0.05)
    assert json.loads(process.line())["data"]["query"] == DOG.text
    with pytest.raises(InputError, match="keys were refused"):
        subscribe.run(arguments(publisher.address))
    process.interrupt()
    assert process.end()[0] == 130
    publisher.close()


def test_zeromq_shows_the_queries_asked_for(launch: Launch) -> None:
    publisher = Publisher(0)
    process = launch(publisher.address, "-q", DOG.text, "--json", "--stream", "door")
    deadline, seq, seen = time.monotonic() + WAIT_S, 0, ""
    while not seen and time.monotonic() < deadline:  # a PUB socket cannot tell when somebody listens
        seq += 1
        for sent in (event(seq, asked=query("a cat")), event(seq, stream="yard"), event(seq)):
            publisher.publish(topic(sent), encode(sent, "run1"))
        try:
            seen = process.lines.get(timeout=0.1)
        except queue.Empty:
            continue
    publisher.close()
    assert json.loads(seen)["data"]["query"] == DOG.text
    assert "has gone" in process.notices.get(timeout=WAIT_S)
    process.interrupt()
    code, _ = process.end()
    assert code == 130
    assert all(json.loads(line)["source"] == "/livemoments/door" for line in process.lines.queue)


def test_on_a_terminal_it_draws_a_table(detector: Detector, launch: Launch) -> None:
    screen, terminal = pty.openpty()
    process = launch(detector.url, "-q", DOG.text, stdout=terminal)
    os.close(terminal)
    detector.await_query(DOG.text)
    detector.tell(event(1))
    drawn = b""
    deadline = time.monotonic() + WAIT_S
    while "● open".encode() not in drawn and time.monotonic() < deadline:
        drawn += os.read(screen, 65536)
    process.interrupt()
    code, errors = process.end()
    os.close(screen)
    assert "● open".encode() in drawn
    assert (code, errors) == (130, "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["ws://127.0.0.1:1"], "nothing answers at ws://127.0.0.1:1"),
        (["ws://127.0.0.1:99999"], "is not an address"),
        (["http://127.0.0.1:8765"], "neither ws://"),
        (["door"], "neither ws://"),
        (["--for", "0"], "--for must be"),
        (["--for", "nan"], "--for must be"),
        (["-q", "x", "--threshold", "1.5"], "--threshold must be a number above 0 and at most 1, got 1.5"),
        (["-q", "x", "--threshold", "nan"], "--threshold must be"),
        (["--threshold", "0.5"], "--threshold is for a query"),
        (["--cooldown", "-1"], "--cooldown must be a number of seconds, 0 or more, got -1"),
        (["-q", "*", "--backfill", "5"], "--backfill is for a query"),
        (["-q", "x", "--backfill", "inf"], "--backfill must be"),
        (["--since", "-1"], "--since must be"),
        (["-q", "x", "--since", "3", "--backfill", "5"], "--since and --backfill"),
        (["--token", "a b"], "the token must be"),
        (["--token", "a", "--token-file", "b"], "keep one"),
        (["--token-file", "/nowhere"], "--token-file: /nowhere cannot be read .no such file"),
        (["--token-file", "/dev/null"], "--token-file: /dev/null is empty"),
        (["--certificate", "x.pem"], "--certificate is for wss://"),
        (["wss://127.0.0.1:1", "--certificate", "x.pem"], "x.pem cannot be used: No such file"),
        (["--server-key", "x"], "--server-key is for ZeroMQ"),
        (["tcp://127.0.0.1:1", "--since", "3"], "--since is for WebSocket"),
        (["tcp://127.0.0.1:1", "--token-file", "x"], "--token-file is for WebSocket"),
        (["tcp://127.0.0.1:1", "--cooldown", "0"], "--cooldown is for WebSocket"),
        (["tcp://127.0.0.1:1", "--server-key", "x"], "needed together"),
        (["tcp://127.0.0.1:1", "--server-key", "x", "--secret-key-file", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        subscribe.run(arguments(*words))
    assert "\n" not in str(caught.value)


def test_a_refused_query_is_said_in_one_line(detector: Detector) -> None:
    with pytest.raises(InputError, match="refuses: cannot look for !!"):
        subscribe.run(arguments(detector.url, "-q", "!!"))


def test_the_table_shows_moments_streams_and_what_is_missing() -> None:
    board = Board(GapCounter())
    evil = query("\x1b[2Ja cat")
    for sent in (
        event(1),
        status(1, "yard", reason="timeout", retry_s=4.0),
        replace(event(4, asked=evil, kind=Kind.CLOSED, end_ns=20_000_000_000), backfill=True),
        event(7, asked=evil, kind=Kind.CLOSED, end_ns=20_300_000_000),
    ):
        board.apply(to_cloudevent(sent, "run1"))
    clip = Clip("door_a-cat", 0, NS, 1, thumbnail=False, missing="the service ended")
    ready = replace(event(8, asked=evil, kind=Kind.CLIP, end_ns=20_300_000_000), clip=clip, latency_ns=None)
    board.apply(to_cloudevent(replace(ready, moment=replace(ready.moment, id="m7")), "run1"))  # type: ignore[type-var]
    assert line(to_cloudevent(ready, "run1")).endswith("20.3 s  /clips/door_a-cat.mp4  (the service ended)")
    board.apply(json.loads(lost_notice(3, "n1")))
    board.apply("ws://x has gone: trying again in 1 s")
    start = datetime.fromisoformat(to_cloudevent(event(1), "run1")["data"]["start"])
    out = StringIO()
    Console(file=out, width=120).print(board.render(start + timedelta(seconds=42), height=20))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["●", "open"], ["closed", "door"], ["closed,", "clip"]]
    assert "42" in rows[1] and "…" in rows[1] and "████████░░" in rows[1] and "457" in rows[1]
    assert "8" in rows[2] and "8" in rows[3]
    assert (rows[2][-1], rows[3][-1]) == (EARLIER, "0.75")
    text = out.getvalue()
    assert "yard: reconnecting (reason timeout, retry_s 4.0)" in text
    assert "missed 2 events by their numbers; the server keeps 3 no more" in text
    assert "ws://x has gone" in text
    assert "\x1b" not in text and "?[2Ja cat" in text


def test_the_table_forgets_the_oldest_and_shows_the_newest() -> None:
    board = Board(GapCounter())
    for seq in range(1, MAX_ROWS + 101):
        board.apply(to_cloudevent(event(seq, asked=query(f"thing{seq}")), "run1"))
    out = StringIO()
    Console(file=out, width=120).print(board.render(datetime.now().astimezone(), height=1000))
    shown = [word for word in out.getvalue().split() if word.startswith("thing")]
    assert shown == [f"thing{seq}" for seq in range(101, MAX_ROWS + 101)]
