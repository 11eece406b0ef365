"""Runs the graphs of a bundle on the CPU: the one file of serving that imports onnxruntime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kernels.bundle import HeadShape, Manifest
from kernels.errors import BundleError
from kernels.head import HostRows
from kernels.preprocess import Pixels, crop

# Waking a thread takes as long as a small operator. On 2 cores a window of ViT-B/32 int8 took 24 ms when threads slept
# between operators, 21 when they waited actively, and 34 on one thread. Without a limit they go on waiting for 40 ms
# after each window; with this one for 0.1 to 4.
_SPIN = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "200"}


class Graph:
    """One ONNX graph, from a file or from memory. Raises what ONNX Runtime raises, which has no common base."""

    def __init__(self, model: Path | bytes, *, threads: int = 0) -> None:
        """threads: for one operator; 0 leaves the choice to ONNX Runtime (one per core)."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors: of warnings there are some that nobody can act on
        for name, value in _SPIN.items():
            options.add_session_config_entry(name, value)
        source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.shapes = {each.name: each.shape for each in self._session.get_inputs()}  # a length that varies has a name
        self.inputs = list(self.shapes)
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """All outputs by name. Inputs are not copied."""
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


class CpuRuntime:
    """The graphs of one bundle.

    Raises:
        BundleError: a graph cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int = 0) -> None:
        self.manifest, self._folder, self._threads = manifest, folder, threads
        self._image = self.graph("image")
        side, head = manifest.image_size, manifest.head
        fits = self._image.shapes["crops"][1:] == [side, side, 3]
        if fits and head:
            fits = self.graph("head").shapes["keys_0"][1:] == [head.heads, head.window, head.width // head.heads]
        if not fits:
            raise BundleError(f"{folder}/manifest.json does not fit its engines, in image_size or head: build it again")

    def graph(self, name: str) -> Graph:
        """One of them: called with arrays by name, it gives arrays by name."""
        try:
            return Graph(self._folder / f"{name}.onnx", threads=self._threads)
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            line = str(error).splitlines()[0]
            raise BundleError(f"engine bundle {self._folder} cannot be loaded: {line}") from error

    def see(self, frames: Sequence[Pixels]) -> Mapping[str, NDArray[Any]]:
        """frames (H, W, 3) uint8 RGB of any sizes -> what `image` gives of them."""
        m = self.manifest
        return self._image(crops=np.stack([crop(each, resize=m.image_resize, size=m.image_size) for each in frames]))

    def rows(self, shape: HeadShape) -> HostRows:
        """What one stream's queries are kept in."""
        return HostRows(shape)
