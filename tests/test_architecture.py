"""The house rules that can be checked: imports point left, heavy dependencies stay in their one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("models", "kernels", "stream", "trainer", "bench", "tests")
ADAPTERS = {
    "onnxruntime": {"kernels/onnx_runtime.py", "kernels/quantise.py"},
    "tensorrt": {"kernels/tensorrt.py"},
    "tensorrt_rtx": {"kernels/tensorrt.py"},
    "tensorrt_rtx_bindings": {"kernels/tensorrt.py"},
    "pycuda": {"kernels/device.py"},
    "openvino": {"bench/ops.py"},
    "zmq": {"stream/deliver/zeromq.py"},
    "websockets": {"stream/deliver/websocket.py"},
    "aiohttp": {"stream/page/server.py"},
    "prometheus_client": {"stream/operate/metrics.py"},
    "opentimelineio": {"stream/export/otio.py"},
    "webvtt": {"stream/export/vtt.py"},
    "playwright": {"bench/browser.py"},
    "gi": {"stream/pipeline.py", "stream/clips/mp4.py", "bench/rtsp_server.py"},
}
BUILD_HALF = {
    f"kernels/{name}.py"
    for name in ("build", "build_engine", "compress", "export", "parity", "quantise", "recipe", "rounding")
}
TORCH_BENCH = {f"bench/{name}.py" for name in ("features", "gpu", "gpu_torch", "model", "ops")}  # the model itself


def sources() -> list[Path]:
    return [path for package in ORDER[:-1] for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: write imports in full"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left_and_adapters_are_the_only_door(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/")[0]
    allowed = ORDER[: ORDER.index(package) + 1]
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in ORDER or top in allowed, f"{name} imports {module}, which lies to its right"
        assert top not in ADAPTERS or name in ADAPTERS[top], f"{name} imports {module}: use {ADAPTERS[top]}"
        assert top != "transformers", "transformers is for tests only"
        if top in ("torch", "models", "onnx"):
            assert package in ("models", "trainer") or name in BUILD_HALF | TORCH_BENCH, name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_serving_loads_neither_torch_nor_transformers() -> None:
    """The whole command, on a real stream, in a process of its own."""
    script = (
        "import sys; from livemoments import main;"
        "code = main('run test:ball -q ball --for 2 --publish --zmq-port 0 --ws-port 0'.split());"
        "heavy = {'torch', 'transformers', 'onnx', 'models'} & set(sys.modules);"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
