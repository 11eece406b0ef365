"""`livemoments control` against real servers: what it prints, and the one line where it cannot."""

import argparse
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from livemoments import main
from stream.client import control
from stream.client.access import DEFAULT_URL
from tests.sockets import Program
from tests.test_events import DOG, status

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["control", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that it says before it gives up with exit code 2."""
    assert main(["control", *words]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert not captured.out
    return line


def test_streams_come_and_go(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, program.url, "add-stream", "hall", "rtsp://camera/1") == "hall is watched\n"
    header, *rows = shown(capsys, program.url, "streams").splitlines()
    assert header.split() == ["stream", "state"]  # all that this program tells
    assert [row.split() for row in rows] == [["door", "connected"], ["yard", "connected"], ["hall", "connected"]]
    assert "hall" in refused(capsys, program.url, "add-stream", "hall", "test:")
    for name in ("hall", "door", "yard"):
        assert shown(capsys, program.url, "remove-stream", name) == f"{name} is watched no longer\n"
    assert refused(capsys, program.url, "remove-stream", "hall").endswith('refuses: there is no stream "hall"')
    assert shown(capsys, program.url, "streams") == "there are no streams\n"


def test_why(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = shown(capsys, program.url, "why", DOG.text).splitlines()
    assert header.split() == ["stream", "state", "threshold", "reason"] and len(rows) == 2
    assert rows[0].split(maxsplit=3)[:3] == ["door", "connected", "0.50"] and "no window" in rows[0]
    (_, row) = shown(capsys, program.url, "why", DOG.text, "--stream", "yard", "--threshold", "0.3").splitlines()
    assert row.split()[:3] == ["yard", "connected", "0.30"]
    answer = json.loads(shown(capsys, program.url, "why", DOG.text, "--json"))
    assert answer["op"] == "why" and answer["query_id"] == DOG.id
    assert "cannot look for !!" in refused(capsys, program.url, "why", "!!")
    assert 'no stream "attic"' in refused(capsys, program.url, "why", "x", "--stream", "attic")
    assert "--threshold must be" in refused(capsys, program.url, "why", "x", "--threshold", "nan")


def test_json_is_the_answer_as_it_came(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    program.tell(status(1))
    answer = json.loads(shown(capsys, program.url, "streams", "--json"))
    assert answer["op"] == "streams" and answer["lognumber"] == 1
    assert json.loads(shown(capsys, program.url, "add-stream", "hall", "test:", "--json")) == {
        "op": "stream_added",
        "stream": "hall",
    }


def test_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with Program(token=TOKEN) as program:
        assert "door" in shown(capsys, program.url, "streams", "--token-file", str(tmp_path / "token"))
        assert "door" in shown(capsys, program.url, "streams", "--token", TOKEN)
        assert "token is wrong or missing" in refused(capsys, program.url, "streams")


def test_nobody_who_could_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing answers at ws://127.0.0.1:1 " in refused(capsys, "ws://127.0.0.1:1", "streams")
    assert "orders go over WebSocket" in refused(capsys, "tcp://127.0.0.1:5555", "streams")
    assert "--certificate is for wss://" in refused(capsys, "ws://127.0.0.1:1", "streams", "--certificate", "x")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        assert "nothing answers at" in refused(capsys, f"ws://127.0.0.1:{listener.getsockname()[1]}", "streams")
        thread.join()


def test_the_url_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["why", "--help"], ["ws://127.0.0.1:1", "add-stream", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(["control", *words])
        assert ended.value.code == 0
        help_text = capsys.readouterr().out
        assert "OPERATION" in help_text or "--token-file" in help_text
    with pytest.raises(SystemExit) as ended:
        main(["control"])
    assert ended.value.code == 2 and "OPERATION" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["why", "a dog"], ["ws://127.0.0.1:9", "why", "a dog"]])
def test_a_url_is_told_from_an_operation(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    control.add_arguments(parser, words)
    args = parser.parse_args(words)
    assert (args.operation, args.query) == ("why", "a dog")
    assert args.url == (words[0] if len(words) == 3 else DEFAULT_URL)
