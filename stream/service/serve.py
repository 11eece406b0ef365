"""`livemoments serve`: what a config says, until it is told to stop."""

import argparse
import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kernels.engine import Engine
from kernels.errors import LivemomentsError
from stream.config.check import check_engine
from stream.config.schema import load_config
from stream.deliver.log import EventLog
from stream.operate.health import healthy
from stream.operate.logs import FORMATS, spoken
from stream.operate.notify import Supervisor
from stream.service.service import Service

log = logging.getLogger(__name__)

POLL_S = 1.0  # how soon a changed config is noticed
SETTLE_S = 0.2  # a config that stays as it is for so long has been written to its end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="streams, queries, sockets, log, limits, webhooks"
    )
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="what is said on stderr: lines, or one JSON object a line"
    )


def run(args: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM: then open moments close and are stored. SIGHUP and a changed file: the config anew.

    Raises:
        ConfigError, InputError, SourceError, BundleError, LogError: it cannot begin.
    """
    with spoken(args.log_format, log):
        try:
            return _serve(args.config)
        except LivemomentsError as error:
            if args.log_format == "text":
                raise
            log.critical("%s", error)
            return 2


def _serve(path: Path) -> int:
    supervisor = Supervisor()
    with _signals() as signals:
        seen = _stamp(path)
        config = load_config(path)
        check_engine(path, config.engine)
        engine = Engine(config.engine.path, zero_shot=config.engine.zero_shot)
        events = EventLog(config.log.path, max_bytes=config.log.max_mb << 20)
        try:
            for entry in events.recovered:
                log.info("closed what was open when this was killed: %s of %s", entry.moment_id, entry.stream)
            with Service(engine, config, events) as service:
                addresses = [service.ws_url, *([service.zmq_address] if service.zmq_address else [])]
                log.info("%d streams, %s", len(config.streams), " and ".join(addresses))
                if service.page_url:
                    log.info("the page is at %s", service.page_url)
                supervisor.ready()
                while not (came := signals(POLL_S)) & {signal.SIGINT, signal.SIGTERM}:
                    if healthy(service)[0]:
                        supervisor.alive()
                    if signal.SIGHUP in came or _stamp(path) not in (seen, None):
                        supervisor.reloading()
                        seen = _settled(path)
                        _reload(service, path)
                        supervisor.ready()
                supervisor.stopping()
        finally:
            events.close()
    return 0


def _reload(service: Service, path: Path) -> None:
    """A config with mistakes, and what cannot change while it runs, are told; the rest is followed."""
    try:
        config = load_config(path)
        waits = service.configure(config)
    except LivemomentsError as error:
        log.info("the config is left as it was: %s", error)
        return
    log.info("the config was read again: %d streams", len(config.streams))
    if waits:
        log.info("this waits for a restart: %s", ", ".join(waits))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the file; None while an editor has it moved away."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _settled(path: Path) -> tuple[int, int, int] | None:
    """The stamp, once nobody writes any more: half a config may well be a config, one with fewer streams."""
    while (before := _stamp(path)) is not None:
        time.sleep(SETTLE_S)
        if _stamp(path) == before:
            break
    return before


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[float], set[int]]]:
    """A function that waits for signals, and gives those that came since.

    They interrupt nothing: what a second Ctrl-C cut short would be events that are not stored.
    """
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    asked = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(each, lambda *_: None) for each in asked]

    def wait(timeout_s: float) -> set[int]:
        ready, _, _ = select.select([reading], [], [], timeout_s)
        return set(os.read(reading, 64)) if ready else set()

    try:
        yield wait
    finally:
        for each, handler in zip(asked, before, strict=True):
            signal.signal(each, handler)
        signal.set_wakeup_fd(woken)
        os.close(reading)
        os.close(writing)
