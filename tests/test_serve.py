"""`livemoments serve` as a process: how it begins, what changes while it runs, and how it ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.camera import clips_folder, free_port
from bench.demo import MAN
from stream.deliver.websocket import Client
from tests.serve import ROOT, Service, camera, check, config, follower, messages, of, running, until
from trainer.render import FPS, Kind, Segment, render


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 s of a man, 2 s of an empty room."""
    path = tmp_path_factory.mktemp("serve") / "man.mp4"
    man = Segment(Kind.CLIP, 3 * FPS, clips_folder() / "carphone_pristine.mp4")
    render([man, Segment(Kind.ROOM, 2 * FPS)], path)
    return path


def refused(folder: Path, text: str) -> str:
    """The one line that it says before it gives up with exit code 2."""
    path = folder / "refused.toml"
    path.write_text(text)
    words = [sys.executable, "-m", "livemoments", "serve", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and not done.stdout, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_begin_says_why_in_one_line(tmp_path: Path) -> None:
    assert "token" in refused(tmp_path, config({}, server='bind = "0.0.0.0"'))
    assert "no such file" in refused(tmp_path, config({"a": "nowhere.mp4"}))
    with Service(tmp_path, config({})) as service:
        assert "in use by another livemoments" in refused(tmp_path, config({}))
        port = int(service.url.rpartition(":")[2])
        assert f"port {port}" in refused(tmp_path, config({}, log="other.db", port=port))
        assert service.streams() == {}
    assert check(tmp_path / "events.db") == []


def test_the_end_closes_and_stores_whatever_the_sources_do(tmp_path: Path) -> None:
    """Cameras that accept and say nothing do not delay the end."""
    port, seen = free_port(), tmp_path / "seen"
    with camera(port) as server:
        server.send_signal(signal.SIGSTOP)
        silent = {f"silent{n}": f"rtsp://127.0.0.1:{port}/cam" for n in range(4)}
        sources = silent | {"a": "test:ball", "b": "test:snow", "gone": "test:black"}
        with Service(tmp_path, config(sources)) as service, follower(service, seen):
            for name in ("a", "b", "gone"):
                until(lambda name=name: service.is_open(name))  # type: ignore[misc]
            assert service.streams()["silent0"]["state"] == "reconnecting"
            assert service.ask("remove_stream", stream="gone")["op"] == "stream_removed"
            before = time.monotonic()
            service.stop()
            assert time.monotonic() - before < 6
        events = check(tmp_path / "events.db", seen)
    assert len(of(events, "closed")) == 3
    assert not any(data.get("interrupted") for data in of(events, "closed"))
    for name, states in (("a", ["connected"]), ("b", ["connected"]), ("gone", ["connected", "removed"])):
        assert [data["state"] for data in of(events, "status", name)] == states  # opened at once, side by side


def test_it_ends_in_order_even_while_it_begins(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(config({"a": "test:ball"}))
    words = [sys.executable, "-m", "livemoments", "serve", str(tmp_path / "c.toml")]
    for wait_s, ending in ((0.8, signal.SIGINT), (1.2, signal.SIGTERM)):
        with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(wait_s)
            process.send_signal(ending)
            _, errors = process.communicate(timeout=10)
        assert "Traceback" not in errors
        # Before it is up, the signal ends it as it ends any other command.
        assert process.returncode == 0 or "ws://" not in errors, errors
    with Service(tmp_path, config({"a": "test:ball"})) as service:
        until(lambda: service.is_open("a"))
    check(tmp_path / "events.db")


def test_a_changed_config_is_followed_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    port, hooked, seen = free_port(), tmp_path / "hooked", tmp_path / "seen"
    sources = {"a": "test:ball", "b": "test:snow"}
    with (
        running("tests.serve", "hook", port, hooked, 0),
        Service(tmp_path, config(sources)) as service,
        follower(service, seen),
    ):

        def reload(text: str, said: str) -> None:
            before = len(service.errors)
            service.write(text)
            until(lambda: said in service.errors[before:])

        until(lambda: service.is_open("a") and service.is_open("b"))
        first = service.why("a")["moment_id"]
        # A stream more, one less, another query, a webhook.
        queries = ("a ball", "a colourful test card")
        hook = f'[[webhook]]\nurl = "http://127.0.0.1:{port}/"\nkinds = ["moment.opened"]\nqueries = ["A BALL"]'
        reload(config({"a": "test:ball", "c": "test:smpte"}, queries, more=hook), "was read again: 2 streams")
        until(lambda: service.streams().keys() == {"a", "c"})
        until(lambda: service.is_open("c") and service.is_open("c", queries[1]))
        assert service.why("a")["moment_id"] == first  # what has not changed goes on
        until(lambda: [each["stream"] for each in of(messages(hooked), "opened")] == ["c"])
        # Mistakes: in the file, and in what only the engine knows. All is left as it was, though the file has more.
        for wrong, said in (
            (config({"d": "test:"}, more="[streams.[/e]]"), "left as it was"),
            (config({"d": "test:"}, moments="threshold = 3"), "left as it was"),
            (config({"d": "test:"}, ["a cat", "dog " * 200]), "left as it was: the query is 202 tokens long"),
        ):
            lines = len(service.errors.splitlines())
            reload(wrong, said)
            assert len(service.errors.splitlines()) == lines + 1
            assert "Traceback" not in service.errors
        assert service.streams().keys() == {"a", "c"}
        assert {stream["queries"] for stream in service.streams().values()} == {2}
        assert service.why("a")["moment_id"] == first
        # Another source, another threshold: moments begin anew. `engine` waits for a restart.
        text = config({"a": "test:snow", "c": "test:smpte"}, moments="threshold = 0.01", engine="zero_shot = true")
        reload(text, "this waits for a restart: engine")
        until(lambda: service.streams()["a"]["source"] == "test:snow")
        until(lambda: service.is_open("a") and service.why("c")["threshold"] == 0.01)
        assert service.streams()["c"]["queries"] == 1
        # SIGHUP reads it again, changed or not. A file that an editor has moved away is waited for.
        service.path.rename(tmp_path / "away.toml")
        time.sleep(1.2)
        (tmp_path / "away.toml").rename(service.path)
        before = service.errors.count("was read again")
        service.process.send_signal(signal.SIGHUP)
        until(lambda: service.errors.count("was read again") > before)
        assert service.streams().keys() == {"a", "c"}
        service.stop()
    events = check(tmp_path / "events.db", seen)
    assert next(data["moment_id"] for data in of(events, "closed", "a")) == first
    assert {data["state"] for data in of(events, "status", "b")} == {"connected", "removed"}


def test_a_config_that_is_written_slowly_is_not_read_before_its_end(tmp_path: Path) -> None:
    """The first half of a config is a config, too, one of fewer streams."""
    text = config({"a": "test:ball", "b": "test:snow"})
    with Service(tmp_path, text) as service:
        until(lambda: service.is_open("b"))
        first = service.why("b")["moment_id"]
        half, rest = text[: text.index("[streams.b]")], text[text.index("[streams.b]") :]
        for _ in range(3):
            with service.path.open("w") as out:
                for piece in (half, *(rest[i : i + 12] for i in range(0, len(rest), 12))):
                    out.write(piece)
                    out.flush()
                    time.sleep(0.12)
            time.sleep(0.3)
        until(lambda: "was read again" in service.errors)
        assert "1 streams" not in service.errors and service.why("b")["moment_id"] == first


def test_streams_come_and_go_by_name_and_no_id_comes_twice(tmp_path: Path, video: Path) -> None:
    port, seen = free_port(), tmp_path / "seen"
    late = f"rtsp://127.0.0.1:{port}/cam"
    limits = "streams = 3\nqueries = 3\nqueries_per_client = 2"
    text = config({"late": late, "file": str(video)}, (MAN,), limits=limits)
    with Service(tmp_path, text) as service, follower(service, seen), Client(service.url) as client:

        def ask(op: str, **request: Any) -> dict[str, Any]:
            client.send({"op": op, **request})
            while "op" not in (answer := json.loads(client.receive(5) or b"{}")) or answer["op"] == "caught_up":
                pass
            found: dict[str, Any] = answer
            return found

        # A source that is not there yet, and one that ends.
        service.until_state("late", "reconnecting")
        assert "connection refused" in service.why("late", MAN)["reason"]
        # One name again and again, at once and after a while: each stream is a new one.
        for wait_s in (0.0, 0.0, 0.0, 1.5, 0.2, 1.5):
            assert ask("add_stream", stream="x", source="test:ball") == {"op": "stream_added", "stream": "x"}
            assert "already: remove it first" in ask("add_stream", stream="x", source="test:")["message"]
            time.sleep(wait_s)
            assert ask("remove_stream", stream="x")["op"] == "stream_removed"
            assert 'there is no stream "x"' in ask("remove_stream", stream="x")["message"]
        # As many as there may be.
        assert ask("add_stream", stream="x", source="test:ball")["op"] == "stream_added"
        assert "3 streams are the most" in ask("add_stream", stream="z", source="test:ball")["message"]
        assert "no name for a stream" in ask("add_stream", stream="a/b", source="test:")["message"]
        assert "no such file" in ask("add_stream", stream="z", source="nowhere.mp4")["message"]
        for query in ("a cat", "a dog"):
            assert ask("subscribe", query=query)["op"] == "subscribed"
        assert "2 subscriptions are the most for one client" in ask("subscribe", query="a cow")["message"]
        assert "3 queries run already" in service.ask("subscribe", query="a cow")["message"]
        assert ask("why", query="a cow", stream="x")["streams"][0]["reason"].startswith("this query does not run")
        metrics = service.metrics()
        assert metrics["refused_messages_total{reason=limit}"] == 3
        assert metrics["refused_messages_total{reason=request}"] == 6 + 6 + 2
        assert "stream_up{stream=x}" in metrics and metrics["stream_up{stream=late}"] == 0
        # What clients have added counts when the config changes; a query of the config may take the place of another.
        service.write(config({"late": late, "file": str(video), "p": "test:"}, (MAN,), limits=limits))
        until(lambda: "there would be 4 streams, and 3 are the most" in service.errors)
        service.write(config({"late": late, "file": str(video), "x": "test:snow"}, ("a man",), limits=limits))
        until(lambda: "was read again: 3 streams" in service.errors)
        until(lambda: service.streams()["x"]["source"] == "test:snow")
        until(lambda: service.streams()["x"]["queries"] == 3)
        service.write(config({"late": late, "file": str(video), "x": "test:snow"}, (MAN,), limits=limits))
        with camera(port):
            service.until_state("late", "connected")
            service.until_state("file", "ended")
            until(lambda: service.is_open("late", MAN))
            service.stop()
    events = check(tmp_path / "events.db", seen)
    (opened,), (closed,) = (
        [data for data in of(events, kind, "file") if data["query"] == MAN and data["score"] > 0.5]
        for kind in ("opened", "closed")
    )
    assert opened["start_s"] == 0 and 2 <= closed["end_s"] <= 4
    assert opened["capture_to_publish_ms"] < 1000
    assert [data["state"] for data in of(events, "status", "x")].count("removed") == 7
