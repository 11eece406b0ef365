"""The first NVIDIA GPU of this machine: memory, copies, kernels and time on one CUDA stream. Imports PyCUDA, alone.

PyCUDA is imported when a `Device` is made, so that everything else can be imported anywhere. Its context is the primary
one of the GPU, which TensorRT and torch use too, and is current only inside `with device.current()`: whatever touches
the GPU is called in there, from one thread at a time. PyCUDA 2026.1 knows no stream capture, so there is none here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.cuda_compile import compile_kernels
from kernels.errors import BundleError

_ALIGNMENT = 256  # bytes, of each piece of staging memory


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array in the GPU's memory, rows first. Whoever holds it keeps the memory."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    capacity: int  # bytes, at least `nbytes`
    owner: Any  # PyCUDA's allocation

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Kernel:
    """A CUDA kernel; launched with what its C declaration asks for: device arrays as pointers, None as NULL."""

    function: Any
    stream: Any

    def __call__(self, grid: tuple[int, int], block: int, *arguments: "DeviceArray | float | None") -> None:
        """Put it on the stream: `grid` blocks of `block` threads."""
        plain = [each.pointer if isinstance(each, DeviceArray) else 0 if each is None else each for each in arguments]
        self.function.prepared_async_call((*grid, 1), (block, 1, 1), self.stream, *plain)


class Staging:
    """Host memory that copies go through, handed out piece behind piece. It grows to the largest that was asked for."""

    def __init__(self, allocate: Callable[[int], NDArray[np.uint8]], wait: Callable[[], None]) -> None:
        """
        Args:
            allocate: new memory of so many bytes.
            wait: until nothing is copied from or to the pieces any more.
        """
        self._allocate, self._wait = allocate, wait
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._taken = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """(size,) that no copy uses, up to the next `release`; what was taken before may then be used again."""
        start = _aligned(self._taken)
        if start + size > len(self._memory):
            self._wait()
            start = 0
            if size > len(self._memory):
                self._memory = self._allocate(2 * size)
        self._taken = start + size
        return self._memory[start : self._taken]

    def release(self) -> None:
        """Nothing is copied any more."""
        self._taken = 0


class Device:
    """One GPU with one stream, on which all work runs in the order in which it is given.

    Raises:
        BundleError: PyCUDA, the driver or the GPU is missing.
    """

    def __init__(self) -> None:
        self._cuda = _pycuda()
        try:
            self._cuda.init()
            self._device = self._cuda.Device(0)
            self._context = self._device.retain_primary_context()
        except self._cuda.Error as error:
            raise BundleError(f"this needs an NVIDIA GPU, and there is none that works: {_line(error)}") from None
        self.name: str = self._device.name()
        major, minor = self._device.compute_capability()
        self.compute_capability = f"{major}.{minor}"
        self._kernels: dict[str, Any] = {}  # modules by the name of their source
        with self.current():
            self._stream = self._cuda.Stream()
        self.stream_handle: int = self._stream.handle
        # Pinned: other memory is not copied while the GPU works.
        self._staging = Staging(lambda size: self._cuda.pagelocked_empty(size, np.uint8), self._stream.synchronize)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside, the CUDA calls of this thread go to this GPU. May be nested."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """New memory with anything in it.

        Raises:
            BundleError: there is not enough.
        """
        kind = np.dtype(dtype)
        size = max(math.prod(shape) * kind.itemsize, 1)  # CUDA gives no memory of no size
        try:
            owner = self._cuda.mem_alloc(size)
        except self._cuda.MemoryError:
            raise BundleError(f"{self.name} is out of memory: {size / 1e6:.0f} MB more are needed") from None
        return DeviceArray(int(owner), tuple(shape), kind, size, owner)

    def fit(self, old: DeviceArray | None, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """The same in the memory of `old` where that is large enough: addresses stay, and nothing is allocated."""
        if old is not None:
            made = DeviceArray(old.pointer, tuple(shape), np.dtype(dtype), old.capacity, old.owner)
            if made.nbytes <= made.capacity:
                return made
            self.synchronize()  # something on the stream may still read what is given back now
        return self.empty(shape, dtype)

    def zero(self, array: DeviceArray) -> None:
        if array.nbytes:
            self._cuda.memset_d8_async(array.pointer, 0, array.nbytes, self._stream)

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        """Copy values of the same shape in, converted to its type. `values` may change as soon as it returns."""
        assert values.shape == target.shape, f"{values.shape} does not fit into {target.shape}"
        if target.nbytes:
            pinned = self._staging.take(target.nbytes)
            pinned.view(target.dtype).reshape(target.shape)[...] = values
            self._cuda.memcpy_htod_async(target.pointer, pinned, self._stream)

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        """New memory with these values."""
        array = self.empty(values.shape, values.dtype)
        self.write(array, values)
        return array

    def read(self, arrays: Sequence[DeviceArray]) -> list[NDArray[Any]]:
        """Wait for all that is on the stream, and copy out."""
        starts = [0, *accumulate(_aligned(each.nbytes) for each in arrays)]
        pinned = self._staging.take(starts.pop())
        parts = [pinned[start : start + each.nbytes] for start, each in zip(starts, arrays, strict=True)]
        for part, array in zip(parts, arrays, strict=True):
            if array.nbytes:
                self._cuda.memcpy_dtoh_async(part, array.pointer, self._stream)
        self.synchronize()
        return [part.view(array.dtype).reshape(array.shape).copy() for part, array in zip(parts, arrays, strict=True)]

    def kernel(self, source: str, name: str, signature: str) -> Kernel:
        """A kernel of kernels/cuda/<source>.cu, compiled for this GPU once.

        Args:
            signature: a letter for each parameter: P a pointer, i an int, q a 64-bit one, f a float (as in `struct`).
        Raises:
            BundleError: it cannot be compiled.
        """
        if source not in self._kernels:
            cubin = _compiled(source, f"sm_{self.compute_capability.replace('.', '')}")
            self._kernels[source] = self._cuda.module_from_buffer(cubin)
        function = self._kernels[source].get_function(name)
        function.prepare(signature)
        return Kernel(function, self._stream)

    def synchronize(self) -> None:
        """Wait for all that is on the stream."""
        self._stream.synchronize()
        self._staging.release()

    def time_ms(self, work: Callable[[], object]) -> float:
        """What the GPU took for `work`, from the first that it puts on the stream to the last."""
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record(self._stream)
        work()
        end.record(self._stream)
        end.synchronize()
        return float(start.time_till(end))

    def attribute(self, name: str) -> int:
        """By CUDA's name, such as "MULTIPROCESSOR_COUNT"; clocks are in kHz, widths in bits."""
        return int(self._device.get_attribute(getattr(self._cuda.device_attribute, name)))


@cache
def _compiled(source: str, architecture: str) -> bytes:
    """Once a process, however many engines it loads: it takes seconds."""
    return compile_kernels(source, architecture)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pycuda() -> Any:
    # By name: its types, which a checker would look for, are only where it is installed.
    try:
        return import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pycuda":
            raise BundleError(f"PyCUDA cannot be imported: {_line(error)}: pip install 'livemoments[gpu]'") from None
        raise BundleError(
            "PyCUDA, which engines for NVIDIA GPUs need, is missing: pip install 'livemoments[gpu]'"
        ) from None
    except ImportError as error:  # libcuda.so.1, which comes with the driver
        raise BundleError(f"this needs an NVIDIA GPU, and its driver cannot be loaded: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
