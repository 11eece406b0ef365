"""`livemoments run`, from a real file to the terminal, the sockets and the jsonl, and what it says of bad input."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pytest

from bench.camera import clips_folder, free_port, start, wait_for_port
from bench.demo import BICYCLE, MAN
from kernels.bundle import EMBEDDED
from kernels.engine import Engine
from livemoments import main
from stream.deliver.websocket import Client
from stream.deliver.zeromq import Subscriber
from stream.detector import make_query
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.one_stream import OneStream
from stream.report import Terminal, print_event
from stream.run import play
from stream.session import Session
from stream.sources import parse_source
from stream.types import NS, Event, Moment, Query
from stream.types import Kind as EventKind
from tests.media import write_audio
from trainer.metrics import Prediction, read_jsonl
from trainer.render import FPS, Kind, Segment, render


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s of an empty room, 4 s of a man, 3 s of the room."""
    path = tmp_path_factory.mktemp("run") / "phone.mp4"
    man = Segment(Kind.CLIP, 4 * FPS, clips_folder() / "carphone_pristine.mp4")
    render([Segment(Kind.ROOM, 2 * FPS), man, Segment(Kind.ROOM, 3 * FPS)], path)
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(zero_shot=True)


def events_of(
    video: Path, engine: Engine, pace: Literal["real", "max"], served: OneStream | None = None
) -> list[Event]:
    told: list[Event] = []

    def tell(event: Event) -> None:
        told.append(event)
        if served:
            served.tell(event)

    source = open_source(parse_source(str(video)), hop_ns=NS // 2, pace=pace)
    try:
        session = Session(engine, source.name, NS // 2, MomentOptions(), recorded=True, tell=tell)
        for text in (MAN, BICYCLE):
            session.add(make_query(engine, text))
        for _ in play(source, session):
            pass
        session.drain()
    finally:
        source.close()
    return told


def test_both_paces_give_identical_events(video: Path, engine: Engine) -> None:
    def essence(event: Event) -> tuple[Any, ...]:
        return event.kind, event.seq, event.epoch_ns, event.moment, event.threshold, event.status

    fast, real = events_of(video, engine, "max"), events_of(video, engine, "real")
    assert [essence(event) for event in fast] == [essence(event) for event in real]
    assert [event.kind for event in fast if event.query and event.query.text == MAN].count(EventKind.OPENED) == 1


def test_a_run_finds_the_moment_and_writes_the_jsonl_of_the_field(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.jsonl"
    assert main(["run", str(video), "-q", MAN, "-q", BICYCLE, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("opened", "highlight", "closed", "frames decoded", "frames dropped", "real-time factor", "p95"):
        assert word in shown, word
    man, bicycle = read_jsonl(out, Prediction)
    (moment,) = man.windows
    assert moment[0] == pytest.approx(2, abs=1.01) and moment[1] == pytest.approx(6, abs=1.01)
    assert len(bicycle.windows) == 0
    assert len(man.saliency) == len(bicycle.saliency) == 4
    assert man.saliency.argmax() in (1, 2)
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["qid"], row["query"], row["vid"]) == (1, MAN, "phone")
    assert [path.name for path in tmp_path.iterdir()] == ["found.jsonl"]


def test_a_dash_keeps_stdout_for_the_results(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(video), "-q", MAN, "--out", "-"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["qid"] for line in captured.out.splitlines()] == [1]
    assert "opened" in captured.err


def test_the_sockets_carry_what_was_told_and_a_client_can_add_a_query(video: Path, engine: Engine) -> None:
    queries = [make_query(engine, text) for text in (MAN, BICYCLE)]
    with (
        OneStream(engine, queries, zmq_port=0, ws_port=0) as served,
        Subscriber(served.sockets.zmq_address or "", "livemoments/") as zmq,
        Client(served.sockets.ws_url) as client,
    ):
        client.send({"op": "subscribe", "query": "*"})
        assert json.loads(client.receive(5) or b"{}")["op"] == "subscribed"
        told = events_of(video, engine, "max", served)
        received = [json.loads(client.receive(5) or b"{}") for _ in told]
        assert [json.loads(zmq.receive(5) or b"{}") for _ in told] == received
        assert [message["data"]["seq"] for message in received] == [event.seq for event in told]
        assert [message["lognumber"] for message in received] == list(range(1, len(told) + 1))
        client.send({"op": "subscribe", "query": "a bus stops"})
        answer = json.loads(client.receive(5) or b"{}")
        assert answer["op"] == "subscribed"
        session = Session(engine, "cam", NS, MomentOptions(), recorded=False)
        served.apply(session)
        assert [query.id for query in session.queries] == [*(query.id for query in queries), answer["query_id"]]
        assert json.loads(client.receive(5) or b"{}")["op"] == "caught_up"
        client.send({"op": "subscribe", "query": "dog " * 500})
        assert "tokens long" in json.loads(client.receive(5) or b"{}")["message"]
        client.send({"op": "unsubscribe", "query": "a bus stops"})
        assert json.loads(client.receive(5) or b"{}")["op"] == "unsubscribed"
        served.apply(session)
        assert [query.id for query in session.queries] == [query.id for query in queries]


def test_ctrl_c_ends_a_live_run_with_its_results(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    words = [sys.executable, "-m", "livemoments", "run", "test:ball", "-q", "a ball", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "connected" in process.stdout.readline()
    timer = threading.Timer(3, process.send_signal, [signal.SIGINT])
    timer.start()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "frames decoded" in output and "Traceback" not in errors
    assert len(read_jsonl(out, Prediction)) == 1


def test_a_camera_that_dies_closes_its_moment_and_opens_another_when_it_is_back(tmp_path: Path) -> None:
    """Detector, camera and client in processes and connections of their own; the camera is killed by its id."""
    video = tmp_path / "man.mp4"
    render([Segment(Kind.CLIP, 30 * FPS, clips_folder() / "carphone_pristine.mp4")], video)
    camera_port, ws_port = free_port(), free_port()

    def camera(stack: ExitStack) -> subprocess.Popen[str]:
        options = ("--port", str(camera_port), "--file", str(video), "--loop")
        server = start(stack, "bench.rtsp_server", *options, stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline()
        return server

    with ExitStack() as stack:
        first = camera(stack)
        url, ports = f"rtsp://127.0.0.1:{camera_port}/cam", ("--ws-port", str(ws_port), "--zmq-port", "0")
        detector = start(stack, "livemoments", "run", url, "-q", MAN, "--publish", "--name", "cam", *ports)
        wait_for_port(ws_port, detector)
        client = stack.enter_context(Client(f"ws://127.0.0.1:{ws_port}"))
        client.send({"op": "subscribe", "query": "*"})

        def until(kind: str) -> dict[str, Any]:
            for _ in range(60):
                message = json.loads(client.receive(1) or b"{}")
                if kind in (message.get("type", "").split(".")[-2:][0], message.get("data", {}).get("state")):
                    data: dict[str, Any] = message["data"]
                    return data
            raise AssertionError(f"no {kind} came within a minute")

        opened = until("opened")
        first.kill()
        closed = until("closed")  # before the camera is back
        assert closed["moment_id"] == opened["moment_id"] and closed["end_s"] > closed["start_s"]
        camera(stack)
        until("connected")
        again = until("opened")
        assert again["moment_id"] != opened["moment_id"] and again["start_s"] >= closed["end_s"]
        assert again["seq"] > closed["seq"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_for_ends_a_live_run_even_if_the_camera_has_gone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        camera = start(stack, "bench.rtsp_server", "--port", "0", stdout=subprocess.PIPE)
        assert camera.stdout is not None
        url = camera.stdout.readline().strip()
        words = [sys.executable, "-m", "livemoments", "run", url, "-q", "a ball", "--for", "5"]
        watcher = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert watcher.stdout is not None and "connected" in watcher.stdout.readline()
        camera.kill()
        output, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and "reconnecting" in output and "frames decoded" in output


def test_a_reader_that_leaves_does_not_cost_the_results(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    words = [sys.executable, "-m", "livemoments", "run", str(video), "-q", MAN, "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()
    assert len(read_jsonl(out, Prediction)[0].windows) == 1


def test_a_moment_is_one_whole_line_and_leaves_nothing_in_memory() -> None:
    query = Query("q", "a man in a suit who is interviewed in front of a house with a door", np.zeros(4, np.float32))

    def tell(paper: TextIO, numbers: range) -> None:
        console = Terminal(file=paper, width=80, highlight=False)
        for number in numbers:
            moment = Moment("m", "cam", "q", number * NS, (number + 5) * NS, (number + 1) * NS, 0.75)
            print_event(console, Event(EventKind.CLOSED, "cam", number, 0, 0, query, moment, 0.5, number * 1_000_000))

    tell(paper := StringIO(), range(3))
    assert len(paper.getvalue().splitlines()) == 3
    with Path(os.devnull).open("w") as nowhere:
        tell(nowhere, range(10))
        tracemalloc.start()
        tell(nowhere, range(10, 1010))
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert kept < 50_000  # bytes; rich's cache of word widths would keep twenty times that


def test_results_go_into_a_device_or_a_new_file_and_never_over_the_video(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert main(["run", str(video), "-q", MAN, "--out", str(pipe)]) == 0
    reader.join(10)
    assert json.loads(received[0])["qid"] == 1 and pipe.is_fifo()
    plain = tmp_path / ("x" * 250)
    assert main(["run", str(video), "-q", MAN, "--out", str(plain)]) == 0
    umask = os.umask(0)
    os.umask(umask)
    assert plain.stat().st_mode & 0o777 == 0o666 & ~umask
    before = video.read_bytes()
    capsys.readouterr()
    assert "it is the video that is read" in refused(capsys, "run", str(video), "-q", MAN, "--out", str(video))
    assert video.read_bytes() == before


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command says before it gives up with exit code 2."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "Traceback" not in line and not captured.out
    return line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere.mp4", "-q", "x"], "no such file"),
        (["ftp://host/x.mp4", "-q", "x"], "ftp:// is none of"),
        (["rtsp://127.0.0.1:1/cam", "-q", "x"], "rtsp://127.0.0.1:1/cam"),
        (["test:", "-q", " "], "query is empty"),
        (["test:", "-q", "dog " * 200], "202 tokens long, this engine takes 128"),
        (["test:"], "nothing to wait for"),
        (["test:", "-q", "x", "--engine", "nowhere"], "no engine bundle at nowhere"),
        (["test:", "-q", "x", "--threshold", "1.2"], "threshold must lie above 0 and at most at 1, got 1.2"),
        (["test:", "-q", "x", "--hop", "0.7"], "does not divide the 2 s window"),
        (["test:", "-q", "x", "--out", "/nowhere/found.jsonl"], "cannot write /nowhere/found.jsonl"),
        (["test:", "-q", "x", "--for", "-1"], "--for must be"),
        (["test:", "-q", "\udcff"], "not text in UTF-8"),
        (["~nosuchuser/x.mp4", "-q", "x"], "no such file"),
        (["x" * 5000, "-q", "x"], "cannot read xxx"),
    ],
)
def test_bad_input_gets_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in refused(capsys, "run", *words)


def test_a_source_without_video_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, out = write_audio(tmp_path / "sound.m4a"), tmp_path / "found.jsonl"
    assert "no video" in refused(capsys, "run", str(sound), "-q", "x", "--out", str(out))
    assert not out.exists()


def test_a_corrupted_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = shutil.copytree(EMBEDDED, tmp_path / "bundle")
    (bundle / "text.onnx").write_bytes(b"")
    assert "does not match its hash" in refused(capsys, "run", "test:", "-q", "x", "--engine", str(bundle))


@pytest.mark.parametrize("option", ["--ws-port", "--zmq-port"])
def test_a_port_in_use_is_said(option: str, taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    other = "--zmq-port" if option == "--ws-port" else "--ws-port"
    words = ["run", "test:", "-q", "x", "--publish", option, str(taken_port), other, "0"]
    assert f"port {taken_port}" in refused(capsys, *words)


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    commands = ("run", "serve", "check-config", "control", "subscribe", "metrics", "bench", "build-engine")
    assert all(name in shown for name in commands)
    for words in (*([name] for name in commands), ["bench", "accuracy"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0
        assert len(capsys.readouterr().out) > 100
