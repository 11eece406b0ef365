"""Runs a bundle of TensorRT engines on the first NVIDIA GPU: kernels, engines and state on one stream.

Frames go up once; what a kernel makes of them is what the image engine reads. What a head remembers, and the maps of
the queries that it reads, stay on the GPU from window to window (kernels/gpu_kernels.py). Outputs of an engine lie in
memory of its own until it runs again.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.agreement import confirm
from kernels.bundle import HeadShape, Manifest
from kernels.device import Device, DeviceArray
from kernels.errors import BundleError, InputError
from kernels.gpu_kernels import Crops, DeviceRows
from kernels.preprocess import Pixels
from kernels.tensorrt import Messages, load_module

_KEPT = "new_"
"""Outputs whose names begin so are the columns that `DeviceRows` appends: they stay on the GPU."""
_TYPES: Mapping[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}
"""By the names of TensorRT's DataType."""

Limits = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, usual and largest shape of an input."""


class Library(NamedTuple):
    """TensorRT as it was loaded for a target."""

    module: Any
    runtime: Any
    messages: Messages

    def complaint(self) -> str:
        """The last one, in one line."""
        return " ".join((self.messages.kept or ["TensorRT does not say why"])[-1].split())[:300]


class GpuRuntime:
    """The engines of one bundle.

    Raises:
        BundleError: the GPU, its driver, PyCUDA or TensorRT is missing, the bundle was made for other GPUs, or it is
            wrong on this one.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.device = Device()
        check_capability(folder, manifest, self.device.name, self.device.compute_capability)
        module = load_module(manifest.target)
        messages = Messages(module)
        self._folder, self._profiles = folder, manifest.profiles
        self._graphs: dict[str, GpuGraph] = {}
        with self.device.current():
            self._library = Library(module, module.Runtime(messages.logger), messages)
            self.crops = Crops(self.device, manifest)
        gpu = f"{self.device.name}, compute capability {self.device.compute_capability}"
        self.manifest = confirm(folder, manifest, gpu, self.sample)
        self._image = self.graph("image")

    def graph(self, name: str) -> "GpuGraph":
        """One of the engines: called with arrays by name, it gives arrays by name."""
        if name not in self._graphs:
            with self.device.current():
                path = self._folder / f"{name}.engine"
                self._graphs[name] = GpuGraph(self.device, self._library, path, self._profiles)
        return self._graphs[name]

    def see(self, frames: Sequence[Pixels]) -> Mapping[str, NDArray[Any]]:
        """frames (H, W, 3) uint8 RGB of any sizes -> what `image` gives of them."""
        most = self._image.most
        parts = []
        with self.device.current():
            for start in range(0, len(frames), most):
                parts.append(self._read(self._image.run({"pixels": self.crops(frames[start : start + most])})))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def rows(self, shape: HeadShape) -> DeviceRows:
        """What the state of one stream lies in, see `kernels.head.Rows`."""
        return DeviceRows(self.device, shape)

    def close(self) -> None:
        """Give the engines' memory back; nothing of this runtime may be called any more."""
        with self.device.current():
            self.device.synchronize()
            self._graphs.clear()
            del self._image, self.crops, self._library

    def sample(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """A graph, and all that it gives on the host; as many samples at a time as it takes."""
        graph = self.graph(name)
        with self.device.current():
            parts = [self._read(graph.run(some)) for some in batches(inputs, graph.most)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _read(self, found: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        return dict(zip(found, self.device.read(list(found.values())), strict=True))


class GpuGraph:
    """One engine with an execution context of its own.

    Raises:
        BundleError: the engine cannot be loaded.
    """

    def __init__(self, device: Device, library: Library, path: Path, profiles: Mapping[str, Sequence[int]]) -> None:
        """profiles: of the manifest, to name what a caller has too many of."""
        self._device, self._library, self._path, self._profiles = device, library, path, profiles
        try:
            engine = library.runtime.deserialize_cuda_engine(path.read_bytes())
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from None
        if engine is None:
            raise BundleError(f"{path} cannot be loaded on {device.name}: {library.complaint()}; build it again")
        self._context = _new_context(library.module, engine)
        if self._context is None:
            raise BundleError(f"{path} cannot be run on {device.name}: {library.complaint()}")
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        into = {name for name in names if engine.get_tensor_mode(name) == library.module.TensorIOMode.INPUT}
        self.inputs = [name for name in names if name in into]
        self._outputs = [name for name in names if name not in into]
        self._types = {name: np.dtype(_TYPES[engine.get_tensor_dtype(name).name]) for name in names}
        self._limits = {name: _limits(engine, name) for name in self.inputs}
        # Grown when needed and never shrunk, so that addresses, which a CUDA graph is bound to, seldom change.
        self._memory: dict[str, DeviceArray] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}  # address and shape of each input of the last run

    @property
    def most(self) -> int:
        """How many samples it takes at once."""
        return min(largest[0] for _, _, largest in self._limits.values())

    def __call__(self, **inputs: "NDArray[Any] | DeviceArray") -> dict[str, Any]:
        """All outputs by name, on the host but for the columns of a state.

        Raises:
            InputError: more of something than the engine was built for.
        """
        with self._device.current():
            outputs: dict[str, Any] = dict(self.run(inputs))
            back = [name for name in outputs if not name.startswith(_KEPT)]
            return outputs | dict(zip(back, self._device.read([outputs[name] for name in back]), strict=True))

    def run(self, inputs: Mapping[str, "NDArray[Any] | DeviceArray"]) -> dict[str, DeviceArray]:
        """Put it on the stream, where the device is current. Outputs hold until it is put there again."""
        placed = {name: self._placed(name, inputs[name]) for name in self.inputs}
        bound = {name: (each.pointer, each.shape) for name, each in placed.items()}
        if bound != self._bound:
            self._bound = {}  # in case it fails half way
            self._bind(placed)
            self._bound = bound
        self._check(self._context.execute_async_v3(self._device.stream_handle), "failed")
        return {name: self._memory[name] for name in self._outputs}

    def _placed(self, name: str, value: "NDArray[Any] | DeviceArray") -> DeviceArray:
        """An input on the GPU, as the engine takes it."""
        check_shape(name, value.shape, self._limits[name], self._profiles)
        if isinstance(value, DeviceArray):
            assert value.dtype == self._types[name], f"{name} is {value.dtype}, not {self._types[name]}"
            return value
        self._memory[name] = self._device.fit(self._memory.get(name), value.shape, self._types[name])
        self._device.write(self._memory[name], value)
        return self._memory[name]

    def _bind(self, placed: Mapping[str, DeviceArray]) -> None:
        for name, each in placed.items():
            self._check(self._context.set_input_shape(name, each.shape), f"takes no {name} of {each.shape}")
            self._point(name, each)
        unclear = self._context.infer_shapes()
        self._check(not unclear, f"does not say the shape of {', '.join(unclear)}")
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            self._memory[name] = self._device.fit(self._memory.get(name), shape, self._types[name])
            self._point(name, self._memory[name])

    def _point(self, name: str, array: DeviceArray) -> None:
        self._check(self._context.set_tensor_address(name, array.pointer), f"takes no memory for {name}")

    def _check(self, well: bool, problem: str) -> None:
        if not well:
            raise BundleError(f"{self._path} {problem}: {self._library.complaint()}")


def check_capability(folder: Path, manifest: Manifest, name: str, capability: str) -> None:
    """
    Raises:
        BundleError: the bundle was not made for a GPU of that compute capability, such as "8.6".
    """
    if manifest.compute_capabilities and capability not in manifest.compute_capabilities:
        raise BundleError(
            f"{folder} is built for GPUs of compute capability {', '.join(manifest.compute_capabilities)}, this one, "
            f"{name}, has {capability}: build it for that"
        )


def check_shape(name: str, shape: Sequence[int], limits: Limits, profiles: Mapping[str, Sequence[int]]) -> None:
    """Hold the shape of an input against what the engine takes.

    Args:
        profiles: axis -> least, usual and largest length, as a manifest has them: they say what an axis counts.
    Raises:
        InputError: it takes no such shape.
    """
    if len(shape) != len(limits[0]):
        raise InputError(f"{name} has {len(shape)} axes, this engine takes {len(limits[0])}")
    for place, (size, *lengths) in enumerate(zip(shape, *limits, strict=True)):
        least, _, largest = lengths
        if not least <= size <= largest:
            axis = next(
                (axis for axis, each in profiles.items() if list(each) == lengths), f"on axis {place} of {name}"
            )
            taken = f"{largest}" if size > largest else f"no fewer than {least}"
            raise InputError(f"{size} {axis}, this engine takes {taken}")


def batches(inputs: Mapping[str, NDArray[Any]], most: int) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Samples, at most so many at a time. Rows of a head share their window: they are no samples, and stay together."""
    lengths = {len(each) for each in inputs.values()}
    if len(lengths) > 1 or max(lengths) <= most:
        yield inputs
        return
    for start in range(0, max(lengths), most):
        yield {name: each[start : start + most] for name, each in inputs.items()}


def _limits(engine: Any, name: str) -> Limits:
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:  # of one shape only: it may be in no profile
        return shape, shape, shape
    least, usual, largest = (tuple(each) for each in engine.get_tensor_profile_shape(name, 0))
    return least, usual, largest


def _new_context(module: Any, engine: Any) -> Any:
    """None where it cannot be made."""
    if not hasattr(module, "CudaGraphStrategy"):
        return engine.create_execution_context()
    # TensorRT-RTX captures by itself, once a shape comes again and its kernels are compiled.
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(runtime_config=config)
