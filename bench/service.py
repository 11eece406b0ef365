"""The service under measurement: `livemoments serve` on live cameras, with a client that notes how late events come."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kernels.bundle import EMBEDDED, load_manifest
from kernels.errors import InputError
from stream.deliver.websocket import Client
from stream.types import NS
from stream.window import hop_from_seconds

QUERIES = (
    "a cartoon rabbit on a meadow",
    "cars in a city street",
    "a bicycle leaning on a fence",
    "a person enters the room",
    "a goal is scored",
    "a dog runs along the beach",
    "a man in a suit and a bow tie",
    "a train arrives at the station",
)
SIZE, FPS = (1280, 720), 25  # of the cameras
WARM_UP_S = 10  # the camera's clock comes with its first RTCP report; caches fill; all of it is left out
EVERY_WINDOW = {"threshold": 1e-9, "hysteresis": 0.0, "update_s": 0.0}
"""`moments` of the config with which every query tells something at every window: the worst case for publishing."""
START_S = 60  # until every camera must have connected
COUNTED_S = 0.2  # a feed counts its frames so often


def add_arguments(parser: argparse.ArgumentParser, queries: int = len(QUERIES)) -> None:
    """What every measure of the service takes."""
    parser.add_argument(
        "--queries", type=int, default=queries, metavar="N", help=f"queries on every stream (default {queries})"
    )
    parser.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (default 1)")
    parser.add_argument("--engine", type=Path, default=EMBEDDED, metavar="DIR", help="engine bundle (default: lite)")
    parser.add_argument("--zero-shot", action="store_true", help="leave the engine's trained head out, at any --hop")


@dataclass(frozen=True)
class Setup:
    """What the config of the service says, apart from the streams."""

    queries: tuple[str, ...]  # on every stream
    hop_s: float
    engine: Path
    zero_shot: bool

    def describe(self) -> dict[str, Any]:
        return {
            "queries": len(self.queries),
            "hop_s": self.hop_s,
            "size": list(SIZE),
            "fps": FPS,
            "engine": str(self.engine.name),
            "zero_shot": self.zero_shot or load_manifest(self.engine).head is None,
        }


def setup_of(args: argparse.Namespace) -> Setup:
    """
    Raises:
        InputError: the service would refuse it.
    """
    hop_ns = hop_from_seconds(args.hop)
    if not 1 <= args.queries <= 1000:
        raise InputError(f"--queries must be from 1 to 1000, got {args.queries}")
    head = load_manifest(args.engine).head
    if head and not args.zero_shot and round(head.hop_s * NS) != hop_ns:
        raise InputError(
            f"this engine was trained at a hop of {head.hop_s:g} s: give --hop {head.hop_s:g}, or --zero-shot"
        )
    return Setup(texts(args.queries), args.hop, args.engine, args.zero_shot)


def texts(count: int) -> tuple[str, ...]:
    """So many queries, all different."""
    again = (f"{QUERIES[i % len(QUERIES)]}, take {i // len(QUERIES) + 1}" for i in range(len(QUERIES), count))
    return (*QUERIES[:count], *again)


@dataclass(frozen=True)
class Snapshot:
    """What has been spent and counted until a moment."""

    at_s: float  # monotonic
    cpu_s: Mapping[str, float]  # of the service by stage, see bench/probe.py
    durations: Mapping[str, NDArray[np.int64]]  # of stages, ns, since the snapshot before
    streams: Sequence[Mapping[str, Any]]
    service_s: float  # CPU of processes
    cameras_s: float
    bench_s: float
    machine_s: float  # of all that runs on this machine


class Served:
    """`livemoments serve` in a process of its own, on a config made for it, its log on disk. A context manager.

    Raises:
        InputError: it ends, or does not begin.
    """

    def __init__(
        self,
        setup: Setup,
        sources: Mapping[str, str],
        moments: Mapping[str, float],
        *,
        log_mb: int = 512,
        clips: Path | None = None,
    ) -> None:
        """clips: where to write those of every moment, None: none."""
        self._setup, self._sources, self._moments, self._log_mb = setup, sources, moments, log_mb
        self._clips = clips
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = folder / "service.toml"
            config.write_text(self._config(folder), encoding="utf-8")
            self._said = folder / "stderr"
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.probe", str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(self._said.open("w")),
                text=True,
            )
            stack.enter_context(self.process)  # closes its stdin, at which it ends, and waits for that
            while len(found := re.findall(r"(?:ws|http)://\S+(?=\s)", self._said.read_text())) < 2:
                self.check()
                time.sleep(0.05)
            self.ws_url, self.page_url = found[:2]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """
        Raises:
            InputError: the process has ended.
        """
        if (code := self.process.poll()) is not None:
            last = (self._said.read_text().splitlines() or ["it said nothing"])[-1]
            raise InputError(f"`livemoments serve` ended by itself with exit code {code}: {last}")

    def streams(self) -> list[dict[str, Any]]:
        """What the service says of its streams."""
        try:
            with Client(self.ws_url, START_S) as client:
                client.send({"op": "streams"})
                answer = json.loads(client.receive(START_S) or "{}")
        except ConnectionError as error:
            self.check()
            raise InputError(f"`livemoments serve` does not answer: {error}") from None
        found: list[dict[str, Any]] = answer.get("streams", [])
        return found

    def connected(self) -> bool:
        """Whether all streams connect, within START_S."""
        until_s = time.monotonic() + START_S
        while any(stream["state"] != "connected" for stream in self.streams()):
            if time.monotonic() > until_s:
                return False
            time.sleep(COUNTED_S)
        return True

    def snapshot(self) -> Snapshot:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            self.process.wait()
            self.check()
        answer = json.loads(line)
        children = _children()
        # The counts last: they tell the time to which the frames are held.
        streams, at_s = self.streams(), time.monotonic()
        return Snapshot(
            at_s,
            answer["cpu_s"],
            {name: np.asarray(values, np.int64) for name, values in answer["durations"].items()},
            streams,
            children.pop(self.process.pid, 0.0),
            sum(children.values()),
            sum(os.times()[:2]),
            _machine_s(),
        )

    def _config(self, folder: Path) -> str:
        def table(name: str, values: Mapping[str, Any]) -> str:
            # A JSON value is a TOML value here: texts, numbers, booleans and lists of texts.
            lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
            return "\n".join([f"[{name}]" if name else "", *lines, ""])

        setup = self._setup
        engine = {"path": str(setup.engine.absolute()), "zero_shot": setup.zero_shot, "hop": setup.hop_s}
        tables = [
            table("", {"queries": setup.queries}),
            table("engine", engine),
            table("server", {"ws_port": 0, "zmq_port": 0, "page_port": 0}),
            table("log", {"path": str(folder / "events.sqlite"), "max_mb": self._log_mb}),
            table("clips", {"folder": str(self._clips)}) if self._clips else "",
            table("moments", self._moments),
            table("limits", {"streams": max(1, len(self._sources))}),
            *(table(f"streams.{name}", {"source": url}) for name, url in self._sources.items()),
        ]
        return "\n".join(tables)


class Listener:
    """A WebSocket client that asks for everything and notes how late each event is. A context manager."""

    def __init__(self, url: str) -> None:
        self._client = Client(url, START_S)
        self._late: list[tuple[int, int]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    def __enter__(self) -> Self:
        self._client.__enter__()
        self._client.send({"op": "subscribe", "query": "*"})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._client.__exit__()

    def take(self) -> NDArray[np.int64]:
        """(n, 2) ns from capture to publish and from capture to here, of the events since the last call."""
        taken, self._late = self._late, []
        return np.array(taken, np.int64).reshape(-1, 2)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                payload = self._client.receive(0.2)
            except ConnectionError:
                return  # the service has ended: whoever measures will find out
            arrived_ns = time.time_ns()
            message = json.loads(payload or b"{}")
            if (late_ms := message.get("data", {}).get("capture_to_publish_ms")) is None:
                continue
            published_ns = int(datetime.fromisoformat(message["time"]).timestamp() * NS)
            late_ns = int(late_ms * 1e6)
            self._late.append((late_ns, arrived_ns - published_ns + late_ns))


@dataclass(frozen=True)
class Spent:
    """What lies between two snapshots."""

    seconds: float
    decoded: int
    dropped: int
    lost: float  # share of the frames that the cameras sent: not decoded in time, or dropped on the way to the engine
    reconnects: int
    cores: dict[str, float]  # processors at work: the service by stage
    engine_thread: float  # of one
    service: float  # of them: the process of the service, the cameras, this process, and others on the machine
    cameras: float
    bench: float
    others: float


def between(begin: Snapshot, end: Snapshot) -> Spent:
    seconds = end.at_s - begin.at_s
    counts = dict.fromkeys(("decoded", "looked_at", "dropped", "reconnects"), 0)
    before = {stream["stream"]: stream for stream in begin.streams}
    for stream in end.streams:
        for name in counts:
            counts[name] += stream[name] - before[stream["stream"]][name]
    sent = max(0.0, seconds - COUNTED_S) * FPS * len(end.streams)
    chosen = counts["looked_at"] + counts["dropped"]
    lost = max(0.0, 1 - counts["decoded"] / sent) + counts["dropped"] / max(1, chosen) if sent else 0.0
    cores = {name: max(0.0, value - begin.cpu_s[name]) / seconds for name, value in end.cpu_s.items()}
    service, cameras, bench, machine = (
        (getattr(end, name) - getattr(begin, name)) / seconds
        for name in ("service_s", "cameras_s", "bench_s", "machine_s")
    )
    return Spent(
        seconds=seconds,
        decoded=counts["decoded"],
        dropped=counts["dropped"],
        lost=min(1.0, lost),
        reconnects=counts["reconnects"],
        engine_thread=cores.pop("engine_thread"),
        cores=cores,
        service=service,
        cameras=cameras,
        bench=bench,
        others=max(0.0, machine - service - cameras - bench),
    )


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _children() -> dict[int, float]:
    """CPU seconds of each process that this one has started."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        if int(fields[1]) == os.getpid():
            found[int(process.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _machine_s() -> float:
    """CPU seconds of everything on this machine since it began."""
    user, nice, system, _idle, _wait, interrupts, soft = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
