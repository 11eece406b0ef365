"""The service while everything around it fails: cameras, clocks, disks, receivers and its own process.

The longer ones carry the mark `soak`: `make soak`.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.camera import free_port
from stream.deliver.websocket import Client
from stream.types import NS
from tests.serve import (
    MOMENTS,
    Service,
    camera,
    check,
    config,
    follower,
    messages,
    of,
    resident_mb,
    running,
    stored,
    until,
)

HOP_S = 0.5
LONG = [pytest.mark.soak, pytest.mark.timeout(3600)]


def url(port: int) -> str:
    return f"rtsp://127.0.0.1:{port}/cam"


def in_time(events: list[dict[str, Any]], hop_s: float) -> None:
    """Within 2 hops, but for 1 of 20: other tests and programs take the processor, too."""
    late_ms = sorted(data["capture_to_publish_ms"] for data in events)
    assert len(late_ms) >= 4 and late_ms[int(0.95 * (len(late_ms) - 1))] < 1000 * 2 * hop_s, late_ms[-20:]


def goes_on(events: list[dict[str, Any]], stream: str) -> None:
    """The one moment of `stream` was told anew each second."""
    in_time(of(events, "updated", stream), HOP_S)
    assert len(of(events, "closed", stream)) == 1
    told = [event for event in events if event["data"]["stream"] == stream and "updated" in event["type"]]
    told_s = [datetime.fromisoformat(event["time"]).timestamp() for event in told]
    assert max(b - a for a, b in pairwise(told_s)) < 3


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=LONG)])
def test_a_camera_that_dies_again_and_again_disturbs_nobody(kills: int, tmp_path: Path) -> None:
    """It comes back with its old resolution or a new one; another stream does not miss a window."""
    port, seen = free_port(), tmp_path / "seen"
    with Service(tmp_path, config({"cam": url(port), "well": "test:ball"})) as service, follower(service, seen):
        service.until_state("well", "connected")
        service.until_looked_at("well", 1)
        before, begin_s = service.streams()["well"], time.monotonic()
        for kill in range(kills):
            with camera(port, "--size", ("320x240", "322x242", "640x360")[kill % 3]):
                service.until_state("cam", "connected", 60)
                until(lambda: service.is_open("cam"))
                if kills > 3:
                    time.sleep(11)  # healthy again: the next retry comes soon
            service.until_state("cam", "reconnecting")
            until(lambda: not service.is_open("cam"))
        metrics = service.metrics()
        assert (metrics["stream_up{stream=cam}"], metrics["stream_up{stream=well}"]) == (0, 1)
        assert metrics["stream_reconnects_total{stream=cam}"] == kills - 1
        assert metrics["stream_breaks_total{stream=cam}"] == kills - 1
        assert metrics["stream_lag_seconds{stream=well}"] < 3 * HOP_S < metrics["stream_lag_seconds{stream=cam}"] + 3
        status, said = service.get("/readyz")  # the others are served
        assert status == 200 and json.loads(said)["reasons"][0].startswith("stream cam: reconnecting")
        after, passed_s = service.streams()["well"], time.monotonic() - begin_s
        assert after["looked_at"] - before["looked_at"] == pytest.approx(passed_s / HOP_S, abs=2)
        assert (after["dropped"], after["reconnects"]) == (0, 0)
        assert service.why("cam")["reason"].startswith("there are no pictures: reconnecting")
        service.stop()
    events = check(tmp_path / "events.db", seen)
    goes_on(events, "well")
    assert len(of(events, "closed", "cam")) == kills
    states = [data["state"] for data in of(events, "status", "cam")]
    assert states.count("connected") == kills


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_camera_that_stalls_is_noticed_and_opened_again(tmp_path: Path) -> None:
    port, seen = free_port(), tmp_path / "seen"
    with (
        camera(port) as server,
        Service(tmp_path, config({"cam": url(port), "well": "test:ball"})) as service,
        follower(service, seen),
    ):
        for _ in range(3):
            service.until_state("cam", "connected", 90)
            until(lambda: service.is_open("cam"), 60)
            server.send_signal(signal.SIGSTOP)
            before, begin_s = service.streams()["well"], time.monotonic()
            service.until_state("cam", "reconnecting", 15)
            assert service.metrics()["stream_up{stream=cam}"] == 0
            assert "no picture for 10 s" in service.why("cam")["reason"]
            after, passed_s = service.streams()["well"], time.monotonic() - begin_s
            assert after["looked_at"] - before["looked_at"] == pytest.approx(passed_s / HOP_S, abs=2)
            server.send_signal(signal.SIGCONT)
        service.until_metric("stream_reconnects_total{stream=cam}", lambda found: found >= 3)
        service.stop()
    goes_on(check(tmp_path / "events.db", seen), "well")


PICTURES = "videotestsrc {} pattern=ball ! video/x-raw,width=320,height=240,framerate={}/1"


def jumping() -> str:
    """Pictures at 30 fps whose clock jumps every 2 s: back by an hour, ahead by two, and so on."""
    hours = [2, 1, 3, 2, 4, 0, 5, 3]
    pieces = [f"num-buffers=60 timestamp-offset={hour * 3600 * NS}" for hour in hours]
    pieces[0] += " is-live=true"
    joined = " ".join(f"{PICTURES.format(piece, 30)} ! clocks." for piece in pieces)
    return f"{joined} concat name=clocks adjust-base=false ! identity sleep-time=32500"


def test_clocks_that_jump_and_rates_of_all_kinds(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    sources = {"jumps": jumping()} | {
        name: PICTURES.format("is-live=true", fps) for name, fps in (("slow", 1), ("fast", 60))
    }
    with Service(tmp_path, config(sources)) as service, follower(service, seen):
        service.until_state("jumps", "connected")
        service.until_looked_at("jumps", 2)
        before, begin_s = service.streams(), time.monotonic()
        time.sleep(9)
        after, passed_s = service.streams(), time.monotonic() - begin_s
        assert {name: stream["state"] for name, stream in after.items()} == dict.fromkeys(sources, "connected")
        decoded, looked_at = (
            {name: after[name][key] - before[name][key] for name in sources} for key in ("decoded", "looked_at")
        )
        assert decoded["slow"] == pytest.approx(passed_s, abs=2)
        assert decoded["fast"] == pytest.approx(60 * passed_s, rel=0.1)
        assert decoded["jumps"] > 15 * passed_s
        assert looked_at["slow"] == pytest.approx(passed_s, abs=2)
        assert looked_at["fast"] == pytest.approx(passed_s / HOP_S, abs=2)
        assert looked_at["jumps"] == pytest.approx(decoded["jumps"] / 30 / HOP_S, abs=4)
        assert all(stream["dropped"] == 0 for stream in after.values())
        metrics = service.metrics()
        assert (
            metrics["stream_breaks_total{stream=jumps}"] >= 3 and metrics["stream_reconnects_total{stream=jumps}"] == 0
        )
        assert metrics["stream_breaks_total{stream=fast}"] == metrics["stream_breaks_total{stream=slow}"] == 0
        assert metrics["stream_frames_looked_at_total{stream=fast}"] == pytest.approx(after["fast"]["looked_at"], abs=2)
        service.stop()
    events = check(tmp_path / "events.db", seen)
    for name in ("slow", "fast"):
        assert len(of(events, "opened", name)) == 1
    assert 3 <= len(of(events, "opened", "jumps")) <= 8  # each jump ends a take
    spans = [(data["start_s"], data["end_s"]) for data in of(events, "closed", "jumps")]
    assert all(a[1] <= b[0] for a, b in pairwise(spans)) and spans[-1][1] < 60


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", path]).returncode:
        pytest.skip("only root may mount a small disk")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as out:
        for size in (65536, 4096, 1):
            try:
                while True:
                    out.write(bytes(size))
            except OSError:
                continue
    return filler


def test_a_full_disk_keeps_events_waiting(disk: Path, tmp_path: Path) -> None:
    """They are told once they are stored, in order; the service answers all the while."""
    seen, log = tmp_path / "seen", disk / "events.db"
    text = config({"a": "test:ball", "b": "test:snow"}, ("a ball", "noise", "snow", "a test"), log=log)
    with Service(tmp_path, text) as service, follower(service, seen):
        until(lambda: len(messages(seen)) > 10)
        filler = fill(disk)
        until(lambda: "events wait until they can be stored" in service.errors)
        stuck = service.ask("streams")["lognumber"]
        for _ in range(3):
            time.sleep(1)
            assert service.ask("streams")["lognumber"] == stuck
            assert service.why("a")["score"] > 0.03
        metrics = service.metrics()
        assert metrics["storing_problem"] == 1 and metrics["events_waiting"] > 0
        assert service.get("/readyz")[0] == 503 and service.get("/healthz")[0] == 200
        assert service.ask("subscribe", query="a ball")["op"] == "subscribed"
        filler.unlink()
        until(lambda: service.ask("streams")["lognumber"] > stuck + 10)
        service.until_metric("events_waiting", lambda found: found == 0)
        assert service.metrics()["storing_problem"] == service.metrics()["events_lost_total"] == 0
        assert service.get("/readyz")[0] == 200
        assert service.errors.count("events wait") == 1, service.errors
        service.stop()
    assert "events are stored again, 0 were lost" in service.errors
    check(log, seen)


def test_what_a_full_disk_cannot_take_in_the_end_is_counted(disk: Path, tmp_path: Path) -> None:
    log = disk / "events.db"
    text = config({"a": "test:ball"}, log=log)
    with Service(tmp_path, text) as service:
        until(lambda: service.is_open("a"))
        until(lambda: service.ask("streams")["lognumber"] >= 3)
        filler = fill(disk)
        until(lambda: "events wait" in service.errors)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        service.stop()  # a second signal cuts nothing short
    assert "events are lost" in service.errors
    filler.unlink()
    with Service(tmp_path, text) as service:
        assert "closed what was open" in service.errors
        service.stop()
    check(log)


@pytest.mark.soak
def test_a_disk_that_is_full_for_long_costs_the_oldest_events_and_nothing_else(disk: Path, tmp_path: Path) -> None:
    """10,000 events wait in memory. A query that is asked meanwhile is live afterwards."""
    log, queries = disk / "events.db", [f"a ball of colour {number}" for number in range(100)]
    often: dict[str, Any] = {"engine": "zero_shot = true\nhop = 0.2", "moments": "threshold = 0.001\nupdate_s = 0"}
    text = config({"a": "test:ball", "b": "test:snow"}, queries, log=log, **often)
    with Service(tmp_path, text) as service, Client(service.url) as client:
        until(lambda: service.is_open("a", queries[0]) and service.is_open("b", queries[0]))
        filler = fill(disk)
        until(lambda: "events wait" in service.errors)
        client.send({"op": "subscribe", "query": "a late ball"})
        memory_mb = []
        for _ in range(6):
            time.sleep(5)
            memory_mb.append(resident_mb(service.process.pid))
            assert service.streams()["a"]["state"] == "connected"
        filler.unlink()
        until(lambda: "events are stored again" in service.errors)
        told = [json.loads(client.receive(10) or b"{}") for _ in range(20)]
        assert {message["stream"] for message in told if message.get("op") == "caught_up"} == {"a", "b"}
        assert of([message for message in told if "op" not in message][-1:], "updated")
        (lost,) = re.findall(r"stored again, (\d+) were lost", service.errors)
        assert service.metrics()["events_lost_total"] == int(lost)
        service.stop()
    assert int(lost) > 1000
    assert memory_mb[-1] - memory_mb[-3] < 10
    ids = [(event["source"], event["id"]) for event in map(json.loads, stored(log))]
    assert len(ids) == len(set(ids)) > 10_000


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=LONG)])
def test_a_killed_service_goes_on_where_it_was(kills: int, tmp_path: Path) -> None:
    """What was open is closed once, and a client that follows by number sees everything once."""
    port, seen = free_port(), tmp_path / "seen"
    text = config({"a": "test:ball", "b": "test:snow"}, ("a ball", "noise"), port=port)
    service, ended = Service(tmp_path, text), set[str]()
    with follower(service, seen):
        for kill in range(kills):
            # What those before told may still be on its way.
            until(lambda: of([event for event in messages(seen) if run_of(event) not in ended], "opened"))
            time.sleep(0.37 * (kill % 4))
            service.kill()
            told = [json.loads(payload) for payload in stored(tmp_path / "events.db")]
            ended.update(map(run_of, told))
            open_now = still_open(told)
            assert open_now
            service = Service(tmp_path, text)
            for stream, moment in open_now:
                assert f"closed what was open when this was killed: {moment} of {stream}\n" in service.errors
            assert service.metrics()["recovered_moments"] == len(open_now)
        until(lambda: service.is_open("a"))
        until(lambda: len(messages(seen)) >= service.ask("streams")["lognumber"])
        service.stop()
        until(lambda: len(messages(seen)) == len(stored(tmp_path / "events.db")))
    events = check(tmp_path / "events.db", seen)
    assert sum(data.get("interrupted", False) for data in of(events, "closed")) >= kills
    assert len({run_of(event) for event in events}) == kills + 1


def run_of(event: dict[str, Any]) -> str:
    """Which start of the service it is of."""
    run: str = event["id"].partition("/")[0]
    return run


def still_open(told: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    """Streams and moments that events tell to be open. Two streams may have begun one at the same instant."""
    opened, closed = ({(data["stream"], data["moment_id"]) for data in of(told, kind)} for kind in ("opened", "closed"))
    return opened - closed


def webhook_of(metrics: dict[str, float], port: int) -> str:
    """The labels of the webhook that sends to a port."""
    (found,) = (name for name in metrics if name.startswith("webhook_waiting") and f":{port}" in name)
    return found.removeprefix("webhook_waiting")


def test_receivers_that_are_slow_or_silent_delay_nobody(tmp_path: Path) -> None:
    """And get what they missed once they are well, after a restart."""
    slow_port, silent_port, absent_port, seen = free_port(), free_port(), free_port(), tmp_path / "seen"
    slow, silent = tmp_path / "slow", tmp_path / "silent"
    hooks = [
        f'[[webhook]]\nurl = "http://127.0.0.1:{port}/"\nkinds = ["moment.opened", "moment.updated", "moment.closed"]'
        for port in (slow_port, silent_port, absent_port)
    ]
    text = config({"a": "test:ball", "b": "test:snow"}, ("a ball", "noise"), more="\n".join(hooks))
    with (
        running("tests.serve", "hook", slow_port, slow, 1.5),
        running("tests.serve", "hook", silent_port, silent, 3600),
        Service(tmp_path, text) as service,
        follower(service, seen),
    ):
        until(lambda: len(messages(seen)) > 25)
        metrics = service.metrics()
        of_port = {port: webhook_of(metrics, port) for port in (slow_port, silent_port, absent_port)}
        assert 0 < metrics[f"webhook_delivered_total{of_port[slow_port]}"] < 10
        assert metrics[f"webhook_delivered_total{of_port[silent_port]}"] == 0
        assert metrics[f"webhook_waiting{of_port[silent_port]}"] > 20
        assert metrics[f"webhook_failures_total{of_port[absent_port]}"] >= 1
        service.stop()
    events = check(tmp_path / "events.db", seen)
    assert len(messages(slow)) < 10 and not messages(silent)
    for name in ("a", "b"):
        in_time(of(events, "updated", name), HOP_S)
    wanted = [event for event in events if event["type"].split(".")[-2] in ("opened", "updated", "closed")]
    with (
        running("tests.serve", "hook", slow_port, slow, 0),
        running("tests.serve", "hook", silent_port, silent, 0),
        Service(tmp_path, text) as service,
    ):
        for path in (slow, silent):
            last = wanted[-1]["id"]
            until(lambda path=path, last=last: last in [event["id"] for event in messages(path)])  # type: ignore[misc]
        service.stop()
    check(tmp_path / "events.db")
    for path in (slow, silent):
        numbers = [event["lognumber"] for event in messages(path)]
        # What was under way when the service ended may come a second time.
        assert numbers == sorted(numbers) and len(numbers) - len(set(numbers)) <= (1 if path == slow else 0)
        assert [event["lognumber"] for event in wanted] == [n for n in sorted(set(numbers)) if n <= len(events)]


@pytest.mark.parametrize("seconds", [20, pytest.param(900, marks=LONG)])
def test_queries_that_come_and_go_cost_the_others_no_time_and_leave_nothing(seconds: int, tmp_path: Path) -> None:
    """1,000 subscriptions and cancellations a minute, each answered for the past, at the default hop of 1 s."""
    seen, clients = tmp_path / "seen", 3
    text = config({"a": "test:ball", "b": "test:snow"}, ("a ball",), engine="", moments=MOMENTS)
    with Service(tmp_path, text) as service, follower(service, seen), ExitStack() as stack:
        until(lambda: service.is_open("a"))
        rate = 1000 / 60 / clients
        # So low that they tell moments, too; but not 15 minutes of them each time.
        threshold = 0.03 if seconds < 60 else 0.9
        churning = [
            stack.enter_context(running("tests.serve", "churn", service.url, seconds, rate, seed, threshold))
            for seed in range(clients)
        ]
        time.sleep(seconds / 2)
        half_mb = resident_mb(service.process.pid)
        said = [process.communicate(timeout=seconds + 60)[0] for process in churning]
        end_mb = resident_mb(service.process.pid)
        until(lambda: {stream["queries"] for stream in service.streams().values()} == {1})
        assert service.is_open("a")
        service.stop()
    for counts in map(json.loads, said):
        assert counts["subscribed"] + counts["unsubscribed"] == round(seconds * 1000 / 60 / clients), counts
        assert "error" not in counts and "silence" not in counts
    assert end_mb - half_mb < 8, (half_mb, end_mb)
    events = check(tmp_path / "events.db", seen)
    standing = [data for data in of(events, "updated") if data["query"] == "a ball"]
    assert len(standing) > seconds / 2
    in_time(standing, 1.0)
