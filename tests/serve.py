"""`livemoments serve` and what it talks to, each a process of its own, and what its log must be like afterwards.

Run as a program, this is one of the clients and servers: see `main`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Self

from prometheus_client.parser import text_string_to_metric_families

from stream.deliver.websocket import Client

ROOT = Path(__file__).parent.parent
BALL = "a ball"
"""Open on a test pattern from its first window on, at the threshold of `config`."""
MOMENTS = "threshold = 0.03\nmin_gap_s = 0\nupdate_s = 1"
ANSWER_S = 10.0
"""How long an answer may take. Only a failing test waits so long."""


def until(condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
    """What `condition` gives as soon as that is true."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def config(
    streams: Mapping[str, str],
    queries: Sequence[str] = (BALL,),
    *,
    engine: str = "zero_shot = true\nhop = 0.5",
    moments: str = MOMENTS,
    limits: str = "",
    server: str = "",
    log: Path | str = "events.db",
    port: int = 0,
    more: str = "",
) -> str:
    """A config: sources by name, and the lines of its tables; `more` comes last."""
    sources = "\n".join(f"[streams.{name}]\nsource = {json.dumps(str(source))}" for name, source in streams.items())
    return (
        f"queries = {json.dumps(list(queries))}\n[engine]\n{engine}\n[moments]\n{moments}\n[limits]\n{limits}\n"
        f'[log]\npath = "{log}"\n'
        f"[server]\nws_port = {port}\npage_port = 0\nzmq_port = false\n{server}\n{sources}\n{more}\n"
    )


class Service:
    """The service on a config in `folder`, from where it listens on. Use it as a context manager: it ends in order."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path, self.log = folder / "config.toml", folder / "events.db"
        self._errors = folder / "stderr.txt"
        self.write(text)
        with self._errors.open("w") as errors:
            self.process = start("livemoments", "serve", self.path, stdout=subprocess.DEVNULL, stderr=errors)
        until(lambda: self.process.poll() is not None or "ws://" in self.errors)
        assert self.process.poll() is None, self.errors
        self.url = next(word for word in self.errors.split() if word.startswith("ws://"))
        until(lambda: "http://" in self.errors)
        self.page = next(word for word in self.errors.split() if word.startswith("http://"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None and self.process.poll() is None:
            self.stop()
        self.kill()

    @property
    def errors(self) -> str:
        """What it said so far."""
        return self._errors.read_text()

    def write(self, text: str) -> None:
        """The config anew, as an editor does it."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def stop(self, limit_s: float = 15.0) -> None:
        """SIGTERM: it must end by itself, with exit code 0 and without a traceback."""
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(limit_s) == 0, self.errors
        finally:
            self.kill()
        assert "Traceback" not in self.errors, self.errors

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to one request, of a client that comes for it."""
        with Client(self.url) as client:
            client.send({"op": op, **request})
            answer: dict[str, Any] = json.loads(client.receive(ANSWER_S) or b"{}")
            assert "op" in answer, f"no answer: {answer}"
            return answer

    def streams(self) -> dict[str, dict[str, Any]]:
        """How each stream is, by name."""
        return {stream["stream"]: stream for stream in self.ask("streams")["streams"]}

    def get(self, path: str, token: str = "") -> tuple[int, str]:
        """Status and text of a page."""
        request = urllib.request.Request(self.page + path, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self, token: str = "") -> dict[str, float]:
        """What Prometheus would read: `name{label=value,...}`, labels by name, without the prefix -> value."""
        status, text = self.get("/metrics", token)
        assert status == 200, text
        return {
            sample.name.removeprefix("livemoments_") + (f"{{{labels}}}" if labels else ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            for labels in [",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))]
        }

    def until_metric(self, name: str, true: Callable[[float], bool]) -> None:
        """Until a metric is as it should be."""
        until(lambda: true(self.metrics().get(name, float("nan"))))

    def why(self, stream: str, query: str = BALL) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("why", query=query, stream=stream)["streams"][0]
        return found

    def is_open(self, stream: str, query: str = BALL) -> bool:
        return "moment_id" in self.why(stream, query)

    def until_state(self, stream: str, state: str, limit_s: float = 60.0) -> None:
        until(lambda: self.streams()[stream]["state"] == state, limit_s)

    def until_looked_at(self, stream: str, more: int) -> None:
        """Until so many pictures more have been looked at."""
        before = self.streams()[stream]["looked_at"]
        until(lambda: self.streams()[stream]["looked_at"] >= before + more)


def start(
    module: str, *arguments: object, stdout: int = subprocess.PIPE, stderr: IO[str] | None = None
) -> subprocess.Popen[str]:
    """A Python module as a process of its own."""
    words = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    return subprocess.Popen(words, cwd=ROOT, stdout=stdout, stderr=stderr, text=True)


@contextmanager
def running(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python module as a process, from its first output line on; killed in the end."""
    process = start(module, *arguments)
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), "it did not start"
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        process.stdout.close()


def camera(port: int, *options: object) -> Any:
    """An RTSP server at rtsp://127.0.0.1:`port`/cam."""
    return running("bench.rtsp_server", "--port", port, *options)


def follower(service: Service, seen: Path, since: int = 0) -> Any:
    """A client that writes every event after `since` into `seen`, whatever happens to the service."""
    return running("tests.serve", "follow", service.url, seen, since)


def messages(path: Path) -> list[dict[str, Any]]:
    """The events that a follower or a receiver has written so far."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def stored(log: Path) -> list[bytes]:
    """All payloads of a log that nobody has open, by number, which must have no holes."""
    with TemporaryDirectory() as folder:  # SQLite would tidy up after a kill, which is the service's business
        for part in log.parent.glob(f"{log.name}*"):
            shutil.copy(part, folder)
        database = sqlite3.connect(Path(folder) / log.name)
        rows = database.execute("SELECT number, payload FROM events ORDER BY number").fetchall()
        database.close()
    assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
    return [payload for _, payload in rows]


def check(log: Path, *followed: Path) -> list[dict[str, Any]]:
    """The events of a log after its service has ended, which must be all there, once each, and make sense.

    followed: what clients have written that followed everything from 0 on.
    """
    payloads = stored(log)
    events = [json.loads(payload) for payload in payloads]
    assert [event["lognumber"] for event in events] == list(range(1, len(events) + 1))
    ids = [(event["source"], event["id"]) for event in events]
    assert len(set(ids)) == len(ids)
    counts: dict[tuple[str, str], list[int]] = defaultdict(list)
    moments: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        of, _, seq = event["id"].rpartition("/")
        assert int(seq) == event["data"]["seq"]
        counts[event["source"], of].append(int(seq))
        if "moment_id" in event["data"]:
            moments[event["source"], event["data"]["moment_id"]].append(event)
    for key, seqs in counts.items():
        assert seqs == list(range(1, len(seqs) + 1)), key  # none that was told is missing
    for name, told in moments.items():
        kinds = [event["type"].split(".")[-2] for event in told]
        if "clip" in told[-1]["data"]:
            assert kinds.pop() == "ready" and told.pop()["data"]["end"], (name, kinds)
        assert (kinds[0], kinds[-1]) == ("opened", "closed"), (name, kinds)
        assert kinds.count("opened") == kinds.count("closed") == 1, (name, kinds)
        first, last = told[0]["data"], told[-1]["data"]
        assert last["end_s"] >= first["start_s"] == last["start_s"] and last["end"] >= last["start"]
    live = [payload for payload, event in zip(payloads, events, strict=True) if "backfill" not in event["data"]]
    for path in followed:
        seen = path.read_bytes().splitlines()
        assert seen == live, f"{len(seen)} of {len(live)}"
    return events


def of(events: Sequence[dict[str, Any]], kind: str, stream: str | None = None) -> list[dict[str, Any]]:
    """The data of the events of a kind."""
    return [
        event["data"]
        for event in events
        if event["type"].split(".")[-2] == kind and stream in (None, event["data"]["stream"])
    ]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# -- the processes


def follow(args: argparse.Namespace) -> None:
    """Write every event after number `since` into a file; come back whenever the server has gone."""
    since = args.since
    with args.out.open("ab", buffering=0) as out:
        print("ready", flush=True)
        while True:
            with suppress(ConnectionError), Client(args.url) as client:
                client.send({"op": "subscribe", "query": "*", "since": since})
                while True:
                    payload = client.receive(1.0)
                    if payload and "op" not in (message := json.loads(payload)):
                        out.write(payload + b"\n")
                        since = message["lognumber"]
            time.sleep(0.05)


def churn(args: argparse.Namespace) -> None:
    """Subscribe to ever new queries and unsubscribe again; in the end say what the server answered."""
    print("ready", flush=True)
    rng, mine = random.Random(args.seed), list[str]()
    counts: dict[str, int] = defaultdict(int)
    with Client(args.url) as client:
        begin = time.monotonic()
        for number in range(round(args.seconds * args.rate)):
            time.sleep(max(0.0, begin + number / args.rate - time.monotonic()))
            if len(mine) < 5 or (len(mine) < 20 and rng.random() < 0.5):
                mine.append(f"a thing number {args.seed} {number}")
                client.send({"op": "subscribe", "query": mine[-1], "threshold": args.threshold})
            else:
                gone = mine.pop(rng.randrange(len(mine)))
                client.send({"op": "unsubscribe", "query": gone, "threshold": args.threshold})
            while "op" not in (answer := json.loads(client.receive(ANSWER_S) or b'{"op": "silence"}')) or (
                answer["op"] == "caught_up"
            ):
                counts[answer.get("op", "event")] += 1
            counts[answer["op"]] += 1
    print(json.dumps(counts), flush=True)


def hook(args: argparse.Namespace) -> None:
    """A receiver of webhooks that answers after some seconds, and writes what it was sent into a file."""
    out = args.out.open("ab", buffering=0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(args.delay)
            out.write(payload + b"\n")
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    print("ready", flush=True)
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serve")
    commands = parser.add_subparsers(required=True)
    for run, arguments in (
        (follow, {"url": str, "out": Path, "since": int}),
        (churn, {"url": str, "seconds": float, "rate": float, "seed": int, "threshold": float}),
        (hook, {"port": int, "out": Path, "delay": float}),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        for name, kind in arguments.items():
            command.add_argument(name, type=kind)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
