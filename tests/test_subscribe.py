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
from datetime import datetime, timedelta
from io import StringIO
from typing import IO

import pytest
from rich.console import Console

from kernels.errors import InputError
from stream import subscribe
from stream.events import encode, lost_notice, to_cloudevent, topic
from stream.types import Event, Kind, Query
from stream.websocket import Server
from stream.zeromq import Publisher
from tests.test_events import DOG, event, query, status

WAIT_S = 15.0
"""How long a test waits for what must come: a process starts slowly on a busy machine."""
PROGRAM = "import sys; from livemoments import main; sys.exit(main(['subscribe', *sys.argv[1:]]))"


class Detector:
    """A server to subscribe to, which tells when a client has."""

    def __init__(self, port: int = 0) -> None:
        self.asked: queue.Queue[str] = queue.Queue()
        self.server = Server(port, self.on_subscribe, lambda query_id: None)
        self.server.start()
        self.url = f"ws://127.0.0.1:{self.server.port}"

    def on_subscribe(self, text: str) -> Query:
        if text.startswith("!"):
            raise InputError(f"cannot look for {text}")
        self.asked.put(text)
        return query(" ".join(text.split()))

    def publish(self, event: Event, run: str = "run1") -> None:
        self.server.publish(event.stream, event.query.id if event.query else None, encode(event, run))


@pytest.fixture
def detector() -> Iterator[Detector]:
    detector = Detector()
    yield detector
    detector.server.close()


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
    assert detector.asked.get(timeout=WAIT_S) == DOG.text
    closed = event(2, kind=Kind.CLOSED, end_ns=20_000_000_000)
    for sent in (event(1), event(1, asked=query("a cat")), status(1), closed):
        detector.publish(sent)
    for sent in (event(1), status(1), closed):  # each line comes at once: nothing waits for a full buffer
        assert json.loads(process.line()) == to_cloudevent(sent, "run1")
    process.interrupt()
    assert process.end() == (130, "")
    assert process.lines.empty()


def test_for_ends_it_and_a_stream_can_be_chosen(detector: Detector, launch: Launch) -> None:
    process = launch(detector.url, "-q", f" {DOG.text}", "--stream", "yard", "--json", "--for", "1.5")
    detector.asked.get(timeout=WAIT_S)
    detector.publish(event(1))
    detector.publish(event(1, stream="yard"))
    assert json.loads(process.line())["data"]["stream"] == "yard"
    assert process.end() == (0, "")


def test_a_reader_that_goes_away_ends_it_quietly(detector: Detector, launch: Launch) -> None:
    reading, writing = os.pipe()
    process = launch(detector.url, "-q", DOG.text, "--json", stdout=writing)
    os.close(writing)
    detector.asked.get(timeout=WAIT_S)
    os.close(reading)
    detector.publish(event(1))
    assert process.end() == (0, "")


def test_it_connects_again_when_the_server_comes_back(detector: Detector, launch: Launch) -> None:
    process = launch(detector.url, "-q", DOG.text)
    detector.asked.get(timeout=WAIT_S)
    detector.publish(event(5))
    assert f'opened     door  "{DOG.text}"' in process.line()
    detector.server.close()
    assert "has gone" in process.notices.get(timeout=WAIT_S)
    again = Detector(detector.server.port)
    try:
        assert again.asked.get(timeout=WAIT_S) == DOG.text
        again.publish(event(1), "run2")
        again.publish(event(4), "run2")
        assert "missed" not in process.line()  # another run counts from 1
        assert "(2 missed before it)" in process.line()
        notices = [process.notices.get(timeout=WAIT_S)]
        while "again" not in notices[-1] or "trying" in notices[-1]:
            notices.append(process.notices.get(timeout=WAIT_S))
        assert notices[-1] == f"connected to {detector.url} again\n"
        process.interrupt()
        assert process.end() == (130, "")
    finally:
        again.server.close()


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
    detector.asked.get(timeout=WAIT_S)
    detector.publish(event(1))
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
    board = subscribe.Board()
    evil = query("\x1b[2Ja cat")
    for sent in (
        event(1),
        status(1, "yard", reason="timeout", retry_s=4.0),
        event(4, asked=evil, kind=Kind.CLOSED, end_ns=20_000_000_000),
        event(7, asked=evil, kind=Kind.CLOSED, end_ns=20_300_000_000),
    ):
        board.apply(to_cloudevent(sent, "run1"))
    board.apply(json.loads(lost_notice(3, "n1")))
    board.apply("ws://x has gone: trying again in 1 s")
    start = datetime.fromisoformat(to_cloudevent(event(1), "run1")["data"]["start"])
    out = StringIO()
    Console(file=out, width=120).print(board.render(start + timedelta(seconds=42), height=20))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["●", "open"], ["closed", "door"], ["closed", "door"]]
    assert "42" in rows[1] and "…" in rows[1] and "████████░░" in rows[1] and "457" in rows[1]
    assert "8" in rows[2] and "8" in rows[3]
    text = out.getvalue()
    assert "yard: reconnecting (reason timeout, retry_s 4.0)" in text
    assert "missed 2 events by their numbers; the server dropped 3" in text
    assert "ws://x has gone" in text
    assert "\x1b" not in text and "?[2Ja cat" in text


def test_the_table_forgets_the_oldest_and_shows_the_newest() -> None:
    board = subscribe.Board()
    for seq in range(1, subscribe.MAX_ROWS + 101):
        board.apply(to_cloudevent(event(seq, asked=query(f"thing{seq}")), "run1"))
    out = StringIO()
    Console(file=out, width=120).print(board.render(datetime.now().astimezone(), height=1000))
    shown = [word for word in out.getvalue().split() if word.startswith("thing")]
    assert shown == [f"thing{seq}" for seq in range(101, subscribe.MAX_ROWS + 101)]
