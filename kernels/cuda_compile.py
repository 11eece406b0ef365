"""The kernels of kernels/cuda, compiled: for a GPU by nvcc, which needs none, and for the CPU by g++, for tests.

nvcc comes with a CUDA toolkit, or from PyPI: `nvidia-cuda-nvcc`, which brings most of what it needs, and
`nvidia-cuda-cccl`, whose headers cuda_fp16.h includes. It calls g++.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernels.errors import BundleError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""A100, A10 and RTX 30, L4 and RTX 40, H100 and H200, RTX 50: what a bundle is built for."""
SOURCES = Path(__file__).parent / "cuda"


def nvcc() -> Path:
    """The compiler: of the PATH, else of /usr/local/cuda, else of PyPI.

    Raises:
        BundleError: there is none.
    """
    for path in _compilers():
        if path.is_file():
            return path
    raise BundleError("nvcc is missing: pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or install a CUDA toolkit")


def compile_kernels(name: str, arch: str) -> bytes:
    """kernels/cuda/<name>.cu as a cubin for one architecture, `sm_90` for instance. It runs on that major version only.

    Raises:
        BundleError: no nvcc, or the source does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        _run(nvcc(), "-cubin", "-O3", "-std=c++17", f"-arch={arch}", _source(name), "-o", cubin)
        return cubin.read_bytes()


def compile_for_host(name: str, folder: Path) -> Path:
    """The same source as a shared library in `folder`, for ctypes; see cuda/host.h.

    Raises:
        BundleError: no g++ (12 or newer: it must know _Float16), or the source does not compile.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise BundleError("g++ is missing: apt install g++")
    library = folder / f"{name}.so"
    # Symbolic: a kernel calls its own, not what libc has under that name (`advance`).
    flags = ("-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic", "-include", SOURCES / "host.h")
    _run(Path(compiler), *flags, "-x", "c++", _source(name), "-o", library)
    return library


def _compilers() -> Iterator[Path]:
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    # A wheel puts it beside other packages, where no PATH points.
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def _source(name: str) -> Path:
    path = SOURCES / f"{name}.cu"
    if not path.is_file():
        raise BundleError(f"there is no kernel {path}")
    return path


def _run(compiler: Path, *arguments: str | Path) -> None:
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        problem = next((line for line in said if "error" in line or "fatal" in line), *said[:1] or ["it says nothing"])
        raise BundleError(f"{compiler} failed: {problem}")
