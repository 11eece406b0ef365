"""What the service says of itself to those who run it: metrics, health, systemd, and the log as JSON."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from bench.camera import free_port
from kernels.engine import Engine, Images
from kernels.errors import InputError
from kernels.preprocess import Pixels
from stream.config.schema import Config, ServerConfig, StreamConfig, WebhookConfig
from stream.deliver.log import EventLog
from stream.deliver.websocket import Client
from stream.operate.health import healthy, ready
from stream.operate.metrics import render, text_of
from stream.operate.notify import Supervisor
from stream.service.service import Service as Live
from tests.serve import ROOT, Service, config, running, until
from tests.test_events import event

TOKEN = "correct-horse-battery-staple"

FAULTS = {
    "a camera is killed": (
        "stream_up",
        "stream_reconnects_total",
        "test_a_camera_that_dies_again_and_again_disturbs_nobody",
    ),
    "a camera stalls": (
        "stream_up",
        "stream_reconnects_total",
        "test_a_camera_that_stalls_is_noticed_and_opened_again",
    ),
    "a clock jumps": ("stream_breaks_total", "test_clocks_that_jump_and_rates_of_all_kinds"),
    "the disk is full": ("storing_problem", "events_waiting", "test_a_full_disk_keeps_events_waiting"),
    "the disk is full for long": (
        "events_lost_total",
        "test_a_disk_that_is_full_for_long_costs_the_oldest_events_and_nothing_else",
    ),
    "the process is killed": ("recovered_moments", "test_a_killed_service_goes_on_where_it_was"),
    "a receiver is slow, silent or not there": (
        "webhook_delivered_total",
        "webhook_waiting",
        "webhook_failures_total",
        "test_receivers_that_are_slow_or_silent_delay_nobody",
    ),
    "a receiver is away for longer than the log is": (
        "webhook_dropped_total",
        "test_what_the_log_holds_no_more_is_counted",
    ),
    "a client never reads": ("client_events_lost_total", "test_what_the_log_holds_no_more_is_counted"),
    "a client asks for more than there may be": (
        "refused_messages_total{reason=limit}",
        "test_streams_come_and_go_by_name_and_no_id_comes_twice",
    ),
    "a client asks for what there is not": (
        "refused_messages_total{reason=request}",
        "test_streams_come_and_go_by_name_and_no_id_comes_twice",
    ),
    "a message is no JSON, or binary": ("refused_messages_total{reason=malformed}", "test_refusals_are_counted"),
    "messages come too often": ("refused_messages_total{reason=rate}", "test_refusals_are_counted"),
    "a message is too large": ("refused_messages_total{reason=too_large}", "test_refusals_are_counted"),
    "the token is wrong": ("refused_connections_total{reason=token}", "test_refusals_are_counted"),
    "there are too many clients": ("refused_connections_total{reason=clients}", "test_refusals_are_counted"),
    "a page from elsewhere wants in": ("refused_connections_total{reason=origin}", "test_refusals_are_counted"),
    "a foreign name leads here": ("refused_connections_total{reason=host}", "test_streams_and_queries_come_and_go"),
    "a turn fails": ("turn_failures_total", "test_an_engine_that_fails_or_hangs_is_told"),
    "a turn hangs": ("last_turn_seconds", "test_an_engine_that_fails_or_hangs_is_told"),
}
"""What goes wrong in the tests -> the metrics that move, and the test that says so."""


def test_each_fault_moves_its_metric() -> None:
    tests: dict[str, str] = {}
    for name in ("test_operate", "test_serve", "test_serve_faults"):
        text = (ROOT / "tests" / f"{name}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                tests[node.name] = ast.get_source_segment(text, node) or ""
    for fault, (*metrics, test) in FAULTS.items():
        for metric in metrics:
            assert f'"{metric}' in tests[test], (fault, metric, test)


def never_back(before: dict[str, float], after: dict[str, float]) -> None:
    """No counter has gone back that is still there."""
    for name, value in before.items():
        if name.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket")):
            assert after.get(name, value) >= value, name


def test_streams_and_queries_come_and_go(tmp_path: Path) -> None:
    """With their series; what is counted only grows; labels are what clients wrote."""
    text = 'a "quoted" \\ ball'
    with Service(tmp_path, config({"a": "test:ball", "b": "test:snow"})) as service, Client(service.url) as client:
        client.send({"op": "subscribe", "query": text, "stream": "a"})
        until(lambda: service.is_open("a") and service.is_open("b"))
        seen = [service.metrics()]
        until(lambda: any(f"query={text}" in name for name in service.metrics()))
        for _ in range(8):
            seen.append(service.metrics())
            never_back(*seen[-2:])
            time.sleep(0.1)
        first, last = seen[0], seen[-1]
        for name in ("turns_total", "stream_frames_decoded_total{stream=a}", "process_cpu_seconds_total"):
            assert last[name] > first[name], name
        until(lambda: service.metrics()["stream_windows_total{stream=a}"] > first["stream_windows_total{stream=a}"])
        last = service.metrics()
        (score,) = (
            value for name, value in last.items() if name.startswith("query_score{query=a ball,") and "=a}" in name
        )
        assert 0.03 < score <= 1
        (is_open,) = (v for k, v in last.items() if k.startswith("query_moment_open{query=a ball,") and "=a}" in k)
        assert is_open == 1
        assert last["stream_events_total{kind=moment.opened,stream=a}"] >= 1
        assert last["stream_queries{stream=a}"] == 2 and last["stream_queries{stream=b}"] == 1
        assert (last["clients"], last["subscriptions"]) == (1, 1)
        assert last["image_batch_bucket{le=+Inf}"] == last["image_batch_count"] <= last["image_batch_sum"]
        assert 0 < last["stage_seconds_sum{stage=image,stream=a}"] < 60
        assert last["store_seconds_count"] == last["log_last"] > 0
        assert any(name.startswith("build_info{engine=lite") for name in last)
        assert service.ask("remove_stream", stream="b")["op"] == "stream_removed"
        client.send({"op": "unsubscribe", "query": text, "stream": "a"})
        until(lambda: service.metrics()["stream_queries{stream=a}"] == 1)
        rest = service.metrics()
        never_back(last, rest)
        assert not any("stream=b" in name or text in name for name in rest)
        assert service.get("/healthz") == (200, '{"ok": true, "reasons": []}')
        # Somebody's page whose name leads here.
        with socket.create_connection(("127.0.0.1", int(service.page.rpartition(":")[2]))) as raw:
            raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
            assert b"403" in raw.recv(100)
        assert service.metrics()["refused_connections_total{reason=host}"] == 1


def test_refusals_are_counted(tmp_path: Path) -> None:
    limits = "clients = 2\nmessage_bytes = 4096\nmessages_per_second = 2"
    text = config({"late": f"rtsp://127.0.0.1:{free_port()}/cam"}, limits=limits, server=f'token = "{TOKEN}"')
    with Service(tmp_path, text) as service:

        def refused(kind: str) -> dict[str, float]:
            found, begin = service.metrics(TOKEN), f"refused_{kind}_total{{reason="
            return {
                name.removeprefix(begin)[:-1]: value
                for name, value in found.items()
                if name.startswith(begin) and value
            }

        def opened() -> ClientConnection:
            link: ClientConnection = connect(service.url, additional_headers={"Authorization": f"Bearer {TOKEN}"})
            return link

        assert refused("messages") == refused("connections") == {}
        with pytest.raises(InputError):
            Client(service.url, token="wrong")
        assert service.get("/metrics", "wrong")[0] == 401
        assert service.metrics(TOKEN)["refused_connections_total{reason=token}"] == 2
        with opened() as one, opened() as two:
            with opened() as three, pytest.raises(ConnectionClosed):
                three.recv(10)
            assert service.metrics(TOKEN)["refused_connections_total{reason=clients}"] == 1
            for message in ("{", b"\x00", "[]"):
                one.send(message)
                assert "error" in str(one.recv(10))
            assert service.metrics(TOKEN)["refused_messages_total{reason=malformed}"] == 3
            for _ in range(12):
                one.send('{"op": "list"}')
                one.recv(10)
            assert 4 <= service.metrics(TOKEN)["refused_messages_total{reason=rate}"] <= 5
            two.send("x" * 5000)
            with pytest.raises(ConnectionClosed):
                two.recv(10)
            until(lambda: service.metrics(TOKEN)["refused_messages_total{reason=too_large}"] == 1)
        request = (
            f"GET / HTTP/1.1\r\nHost: {service.page[7:]}\r\nOrigin: https://evil.example\r\nConnection: close\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", int(service.page.rpartition(":")[2]))) as raw:
            raw.sendall(request.encode())
            assert b"403" in raw.recv(100)
        assert service.metrics(TOKEN)["refused_connections_total{reason=origin}"] == 1
        # What is said of streams is for who has the token.
        until(lambda: service.get("/readyz", TOKEN)[1] != service.get("/readyz")[1])
        assert service.get("/readyz") == (200, '{"ok": true, "reasons": []}')
        assert "stream late: reconnecting" in service.get("/readyz", TOKEN)[1]


def test_what_the_log_holds_no_more_is_counted(tmp_path: Path) -> None:
    """A client that does not read for long, and a receiver that takes its time."""
    port, total = free_port(), 6000
    settings = Config(
        server=ServerConfig(ws_port=0, page_port=0, zmq_port=None),
        webhooks=(WebhookConfig(url=f"http://127.0.0.1:{port}/"),),
    )
    log = EventLog(None, max_bytes=300_000)
    with (
        running("tests.serve", "hook", port, tmp_path / "hooked", 2),
        Live(Engine(zero_shot=True), settings, log) as service,
        connect(service.ws_url, max_queue=1, compression=None) as client,
    ):
        client.send('{"op": "subscribe", "query": "*"}')
        assert "subscribed" in str(client.recv(10))
        service.sockets.tell(event(1))
        time.sleep(0.5)  # the receiver has the first in its hands while the others come and go
        for seq in range(2, total + 1):
            service.sockets.tell(event(seq))
            if seq % 500 == 0:
                until(lambda seq=seq: log.last == seq)  # type: ignore[misc]
        lost = 0
        for payload in client:  # now it reads
            message = json.loads(payload)
            lost += message["data"].get("lost", 0)
            if message.get("lognumber") == total:
                break
        assert lost > 0 and value(service, "client_events_lost_total") == lost
        assert value(service, "log_last") == total and value(service, "log_first") > 1000
        until(lambda: value(service, "webhook_dropped_total") > 0)
    log.close()


def value(service: Live, name: str) -> float:
    """The first of a metric's series."""
    lines = render(service)[0].decode().splitlines()
    return float(next(line for line in lines if re.match(rf"livemoments_{name}[{{ ]", line)).rpartition(" ")[2])


class Moody(Engine):
    """An engine that can be made to fail, or to hang."""

    def __init__(self) -> None:
        super().__init__(zero_shot=True)
        self.fails, self.goes_on = False, threading.Event()
        self.goes_on.set()

    def embed_frames(self, frames: list[Pixels]) -> Images:  # type: ignore[override]
        self.goes_on.wait(30)
        if self.fails:
            raise RuntimeError("out of memory")
        return super().embed_frames(frames)


def test_an_engine_that_fails_or_hangs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine, log = Moody(), EventLog(None)
    settings = Config(
        server=ServerConfig(ws_port=0, page_port=0, zmq_port=None),
        streams={"a": StreamConfig(source="test:ball")},
    )
    with Live(engine, settings, log) as service:
        until(lambda: service.watched["a"].session.looked_at > 2)
        until(lambda: ready(service) == (True, []))
        assert value(service, "turn_failures_total") == 0 and value(service, "last_turn_seconds") < 5
        engine.fails = True
        until(lambda: value(service, "turn_failures_total") >= 1)
        assert "a turn failed" in caplog.text
        engine.fails = False
        before = service.watched["a"].session.timings.image.count
        until(lambda: service.watched["a"].session.timings.image.count > before)  # it goes on
        assert healthy(service)[0]
        engine.goes_on.clear()
        until(lambda: not healthy(service, 1.0)[0])
        assert value(service, "last_turn_seconds") > 1 and not ready(service, 1.0)[0]
        assert "the engine has not finished a turn for 1 s" in healthy(service, 1.0)[1]
        engine.goes_on.set()
        until(lambda: healthy(service, 1.0)[0])
    ok, reasons = healthy(service)
    assert not ok and "the delivery of events has stopped" in reasons
    log.close()


def test_the_text_is_that_of_the_library() -> None:
    class Some(Collector):
        def collect(self) -> Iterator[Metric]:
            counter = CounterMetricFamily("things", "With labels.", labels=("name", "kind"))
            counter.add_metric(('a "b" \\ \n c', "é"), 3)
            counter.add_metric(("", "x"), 10**12 + 0.5)
            yield counter
            yield GaugeMetricFamily("level", "Without.", value=0.25)
            yield HistogramMetricFamily("sizes", "In buckets.", buckets=[("1.0", 2), ("+Inf", 3)], sum_value=9)

    def lines(text: bytes) -> list[tuple[str, list[str], float | str]]:
        found = []
        for line in text.decode().splitlines():
            begin, _, value = line.rpartition(" ")
            name, _, labels = begin.partition("{")
            found.append((name, sorted(labels.rstrip("}").split(",")), value if line[0] == "#" else float(value)))
        return found

    assert lines(text_of(Some())) == lines(generate_latest(Some()))


# ---- systemd, and the log --------------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """What systemd would hear."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        heard.settimeout(30)
        yield heard


def test_systemd_hears_how_it_is(tmp_path: Path) -> None:
    """And the log is one JSON object a line, whatever is said."""
    path, errors = tmp_path / "config.toml", tmp_path / "stderr"
    source = f"rtsp://admin:hunter2@127.0.0.1:{free_port()}/cam"
    path.write_text(config({"a": source}))
    words = [sys.executable, "-m", "livemoments", "serve", str(path), "--log-format", "json"]
    with ExitStack() as stack:
        heard = stack.enter_context(listening(tmp_path / "notify"))
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"}
        out = stack.enter_context(errors.open("w"))
        process = stack.enter_context(subprocess.Popen(words, cwd=ROOT, stderr=out, env={**os.environ, **told}))
        stack.callback(process.kill)
        assert heard.recv(100) == b"READY=1"
        assert heard.recv(100) == b"WATCHDOG=1"
        path.write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        while (said := heard.recv(100)) == b"WATCHDOG=1":
            pass
        assert said.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert heard.recv(100) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        while (said := heard.recv(100)) == b"WATCHDOG=1":
            pass
        assert said == b"STOPPING=1"
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in errors.read_text().splitlines()]
    assert all(line.keys() - {"exception"} == {"time", "level", "logger", "message"} for line in lines)
    assert all(line["time"].endswith("Z") and line["level"] == "info" for line in lines)
    begin, *_, end = (line["message"] for line in lines)
    assert begin.startswith("1 streams, ws://127.0.0.1:") and end.startswith("the config is left as it was:")
    path.write_text("[server]\nws_port = -1\npage_port = -1")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and json.loads(line)["level"] == "critical" and ":2:" in json.loads(line)["message"]


def test_only_who_is_asked_to_says_it_is_alive(tmp_path: Path) -> None:
    with listening(tmp_path / "notify") as heard:
        heard.settimeout(0)
        address = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        for unwatched in ({}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": str(os.getpid() + 1)}):
            Supervisor({**address, **unwatched}).alive()
        Supervisor({}).ready()
        with pytest.raises(BlockingIOError):
            heard.recv(100)
        Supervisor({**address, "WATCHDOG_USEC": "1", "WATCHDOG_PID": str(os.getpid())}).alive()
        assert heard.recv(100) == b"WATCHDOG=1"
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()  # which is no reason to end
