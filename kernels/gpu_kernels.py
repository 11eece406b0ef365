"""What our own CUDA kernels do between the engines of a bundle: frames to pixels, and rows that stay on the GPU."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kernels.bundle import HeadShape, Manifest
from kernels.device import Device, DeviceArray
from kernels.head import Maps, ring_shapes, stack
from kernels.preprocess import Pixels, affine, plan

_BLOCK = 128  # threads


class DeviceRows:
    """`kernels.head.Rows` in the GPU's memory."""

    def __init__(self, device: Device, shape: HeadShape) -> None:
        self._device, self._shapes = device, ring_shapes(shape)
        self.rings: dict[str, DeviceArray] = {}  # empty until there is a row
        self._stacked: dict[str, DeviceArray] = {}
        self._count: DeviceArray | None = None
        with device.current():
            self._gather = device.kernel("ring", "gather_rows", "PPPi")
            self._append = device.kernel("ring", "append", "PPPPiii")

    def settle(self, places: NDArray[np.int64], queries: Sequence[Maps]) -> None:
        rows, old = len(places), self.rings
        with self._device.current():
            self.rings = {}
            if rows:  # an engine is never run without, and CUDA launches nothing of no size
                place = self._device.upload(places.astype(np.int32))
                for name, size in self._shapes.items():
                    self.rings[name] = self._device.empty((rows, *size), np.float32)
                    if old:
                        words = int(np.prod(size))  # of four bytes, in a row
                        self._gather((rows, 1), _BLOCK, old[name], self.rings[name], place, words)
                    else:
                        self._device.zero(self.rings[name])
            for name, maps in stack(queries).items():
                self._stacked[name] = self._device.fit(self._stacked.get(name), maps.shape, maps.dtype)
                self._device.write(self._stacked[name], maps)
            self._device.synchronize()  # the old rings are read until then

    def inputs(self) -> Mapping[str, DeviceArray]:
        return {**self._stacked, **self.rings}

    def absorb(self, other: Self) -> None:
        with self._device.current():  # by way of the host: seldom, when a query comes with a past
            for name, pair in {name: [ring, other.rings[name]] for name, ring in self.rings.items()}.items():
                self.rings[name] = self._device.upload(np.concatenate(self._device.read(pair)))

    def append(self, outputs: Mapping[str, Any], count: NDArray[np.int64]) -> None:
        with self._device.current():
            self._count = self._device.fit(self._count, count.shape, np.int64)
            self._device.write(self._count, count)
            for name, ring in self.rings.items():
                *across, length, width = ring.shape[1:]  # the heads, of keys and values
                self._append(
                    *((len(count), 1), _BLOCK),
                    *(ring, outputs[f"new_{name}"], self._count, None),  # None: every row is active
                    *(int(np.prod(across)), length, width),
                )


class Crops:
    """Frames of any sizes -> pixels as an image engine reads them: `crop` and `normalise` of kernels/preprocess.py."""

    def __init__(self, device: Device, manifest: Manifest) -> None:
        """Where the device is current."""
        self._device, self._resize, self._size = device, manifest.image_resize, manifest.image_size
        unit_mean, unit_std = ([value / 255 for value in each] for each in (manifest.mean, manifest.std))
        self._affine = device.upload(affine(unit_mean, unit_std))
        self._rows = device.kernel("preprocess", "resample_rows", "PiPiPPPiiiiP")
        self._columns = device.kernel("preprocess", "resample_columns", "PPPiiiPPi")
        self._plans: dict[tuple[int, int], _PlacedPlan] = {}  # by height and width
        self._frame: DeviceArray | None = None
        self._narrow: DeviceArray | None = None
        self._pixels: DeviceArray | None = None

    def __call__(self, frames: Sequence[Pixels]) -> DeviceArray:
        """(N, 3, S, S) fp16, which holds until the next call; where the device is current."""
        size = self._size
        self._pixels = self._device.fit(self._pixels, (len(frames), 3, size, size), np.float16)
        for place, frame in enumerate(frames):
            self._add(place, frame, self._pixels)
        return self._pixels

    def _add(self, place: int, frame: Pixels, pixels: DeviceArray) -> None:
        height, width, _ = frame.shape
        if (height, width) not in self._plans:
            self._plans[height, width] = _PlacedPlan(self._device, height, width, self._resize, self._size)
        p, size = self._plans[height, width], self._size
        under = frame[p.top : p.bottom, p.left : p.right]  # the square: of 16:9 little more than half
        self._frame = self._device.fit(self._frame, under.shape, np.uint8)
        self._device.write(self._frame, under)
        self._narrow = self._device.fit(self._narrow, (3, p.bottom - p.top, size), np.uint8)
        self._rows(
            *((-(-size // p.per_block), p.bottom - p.top), _BLOCK),
            *(self._frame, 3 * (p.right - p.left), None, 0, None),  # None: RGB, no chroma and no colours
            *(p.column_first, p.column_weights, p.column_weights.shape[0], size, p.per_block, 0, self._narrow),
        )
        self._columns(
            *((-(-size // _BLOCK), 3 * size), _BLOCK),
            *(self._narrow, p.row_first, p.row_weights, p.row_weights.shape[0], size, p.bottom - p.top),
            *(self._affine, pixels, place),
        )


class _PlacedPlan:
    """`kernels.preprocess.plan` on the GPU, of the part of a frame that is read: top, bottom, left and right."""

    def __init__(self, device: Device, height: int, width: int, resize: int, size: int) -> None:
        made = plan(height, width, resize=resize, size=size)
        columns, rows = made.columns, made.rows
        self.per_block = made.per_block
        self.top, self.bottom = made.first_row, made.first_row + made.row_count
        self.left, self.right = int(columns.first[0]), int(columns.first[-1]) + len(columns.weights)
        self.column_first, self.row_first = device.upload(columns.first - self.left), device.upload(rows.first)
        self.column_weights, self.row_weights = device.upload(columns.weights), device.upload(rows.weights)
