"""Where a figure was measured: every benchmark ends with it."""

import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("livemoments", "numpy", "onnxruntime", "pyzmq", "torch", "websockets")
MODULES = {"pyzmq": "zmq"}


def environment() -> dict[str, Any]:
    """Device, versions and commit, for the JSON object at the end of a benchmark."""
    return {
        "device": f"{_processor()}, {_cores()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(MODULES.get(name, name))},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _commit() -> str | None:
    """None outside a git checkout. A working tree with changes is marked."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=root, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def resident_mb(pid: int | str = "self") -> float:
    """Resident memory of a process; of this one unless told otherwise."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status does not tell the resident memory")
