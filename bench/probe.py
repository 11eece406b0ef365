"""`python -m bench.probe CONFIG.toml`: `livemoments serve` that tells what its parts take, whenever it is asked.

The command runs as it always does. Beside it one thread sleeps until a line comes on stdin, then writes one JSON object
to stdout: the CPU seconds of every stage since the start, and the durations of stages since the line before. When
stdin closes the command ends, as by SIGTERM: it never outlives who started it.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import stream.session
from kernels.onnx_runtime import CpuRuntime, Graph
from livemoments import main
from stream.deliver.publish import Sockets
from stream.detector import Detector
from stream.session import Session
from stream.timings import Durations, Timings

P = ParamSpec("P")
R = TypeVar("R")

TASKS = Path("/proc/self/task")
ENGINE, IMAGE, HEAD = "service", ("image", "video"), ("head",)
"""The thread of the engine, and the graphs that run in it, by stage."""
DELIVERY = ("delivery", "websocket", "asyncio", "ZMQbg")
"""How the names of the threads begin that store events and tell them."""


class Clock:
    """CPU time that the engine's thread spends inside a function."""

    def __init__(self) -> None:
        self._spent_ns = 0
        self._since_ns: int | None = None  # of the thread's time, while it is inside

    def around(self, function: Callable[P, R]) -> Callable[P, R]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self._since_ns = since_ns = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent_ns += time.thread_time_ns() - since_ns
                self._since_ns = None

        return timed

    def seconds(self, thread_s: float) -> float:
        """Until now, when the thread has run for `thread_s`."""
        since_ns = self._since_ns
        inside_s = 0.0 if since_ns is None else max(0.0, thread_s - since_ns / 1e9)
        return self._spent_ns / 1e9 + inside_s


def cpu_seconds(image: Clock, head: Clock) -> dict[str, float]:
    """CPU seconds of this process by stage; `engine_thread` is that of the one thread that runs the engine.

    Python's threads are told by their names, those of ONNX Runtime by what `_named` makes of theirs; what is left are
    GStreamer and its decoders, which come and go with the sources.
    """
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent = dict.fromkeys(("decode", "image", "head", "engine", "delivery", "other"), 0.0)
    engine_s = image_s = head_s = 0.0
    for task in TASKS.iterdir():
        try:
            name = names.get(int(task.name)) or (task / "comm").read_text().strip()
            seconds = _seconds(task)
        except OSError:  # it ended just now
            continue
        if name == ENGINE:
            engine_s, image_s, head_s = seconds, image.seconds(seconds), head.seconds(seconds)
        elif name in IMAGE or name in HEAD:
            spent["image" if name in IMAGE else "head"] += seconds
        elif name.startswith(DELIVERY):
            spent["delivery"] += seconds
        elif name in ("MainThread", "probe", "text", "query"):
            spent["other"] += seconds
        else:
            spent["decode"] += seconds
    spent["image"] += image_s
    spent["head"] += head_s
    spent["engine"] = engine_s - image_s - head_s
    return spent | {"engine_thread": engine_s}


def durations() -> dict[str, list[int]]:
    """What each stage took, ns, window by window, since the last call; `delivery` event by event."""
    found: dict[str, list[int]] = {name: [] for name in (*vars(Timings()), "delivery")}
    # Found and not handed over: the command makes them, as it does for anybody. Only a look at the type asks nothing of
    # objects that it does not know.
    for each in gc.get_objects():
        if type(each) is Session:
            timings, each.timings = each.timings, Timings()
            for name, values in vars(timings).items():
                found[name] += values.values().tolist()
        elif type(each) is Sockets:
            stored, each.stored = each.stored, Durations()
            found["delivery"] += stored.values().tolist()
    return found


def _seconds(task: Path) -> float:
    """CPU time of a thread."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:  # a kernel without it counts in ticks
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _named(graph: Callable[[CpuRuntime, str], Graph]) -> Callable[[CpuRuntime, str], Graph]:
    """The threads of a graph get its name: a thread begins with the name of the one that makes it."""

    def named(runtime: CpuRuntime, name: str) -> Graph:
        comm = TASKS / str(threading.get_native_id()) / "comm"
        before = comm.read_text().strip()
        comm.write_text(name)
        try:
            return graph(runtime, name)
        finally:
            comm.write_text(before)

    return named


def _answer(image: Clock, head: Clock) -> None:
    # Not sys.stdin: a thread that waits in it would hold its lock when the interpreter ends.
    try:
        while os.read(0, 1):
            answer: dict[str, Any] = {"cpu_s": cpu_seconds(image, head), "durations": durations()}
            print(json.dumps(answer), flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def run(config: str) -> int:
    image, head = Clock(), Clock()
    stream.session.see = image.around(stream.session.see)  # type: ignore[attr-defined]
    Detector.saliency = head.around(Detector.saliency)  # type: ignore[method-assign]
    CpuRuntime.graph = _named(CpuRuntime.graph)  # type: ignore[method-assign, assignment]
    threading.Thread(target=_answer, args=(image, head), name="probe", daemon=True).start()
    return main(["serve", config])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
