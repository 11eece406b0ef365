"""Decoded frame -> the crop an image tower takes: antialiased bicubic resize and centre crop, as OpenAI's CLIP does.

`crop` is the path of the CPU, by Pillow, and the reference of the GPU's, cuda/preprocess.cu. `plan` works out what that
kernel needs of a frame's size: it holds Pillow's own integer weights, so both give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

BITS = 22  # fractional bits of a weight, as in Pillow
STAGED = 2048  # pixels of a source row that a block of the kernel holds

_BICUBIC = Image.Resampling.BICUBIC


def crop(pixels: Pixels, *, resize: int, size: int) -> Pixels:
    """Scale so that the short side is `resize`, and keep the centre square of `size`.

    Only the source pixels under the square are read: the same result as resizing all of it first, at a third of the
    cost for a 16:9 frame. Rows come first, whatever Pillow thinks cheaper (from 13 on it looks at the size of the
    frame, not of the box): between the passes values are clipped, so the order shows.

    Args:
        pixels: (H, W, 3) uint8 RGB.
    Returns:
        (size, size, 3) uint8 RGB.
    """
    height, width, _ = pixels.shape
    square = _square(height, width, resize, size)
    strip = Image.fromarray(pixels[square.first_row : square.first_row + square.row_count])
    narrow = strip.resize((size, strip.height), _BICUBIC, box=(square.left, 0, square.right, strip.height))
    return np.asarray(narrow.resize((size, size), _BICUBIC, box=(0, square.top, size, square.bottom)))


def normalise(pixels: Pixels, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float16]:
    """(S, S, 3) uint8 -> (3, S, S) fp16. `mean` and `std` of the three channels are those of pixels in [0, 1]."""
    scale, shift = affine(mean, std)
    return np.ascontiguousarray((pixels * scale + shift).astype(np.float16).transpose(2, 0, 1))


def affine(mean: Sequence[float], std: Sequence[float]) -> Floats:
    """(2, 3): what a pixel of 0 .. 255 is multiplied with, and what is added then."""
    return np.array([1 / (255 * np.array(std)), -np.array(mean) / np.array(std)], np.float32)


def _matrix(red: float, blue: float, full: bool) -> Floats:
    """(3, 4): RGB = matrix @ (Y, Cb, Cr, 1), from the weights of red and blue in luma (ITU-R BT.601, BT.709)."""
    black, luma, chroma = (0.0, 1.0, 1.0) if full else (16.0, 255 / 219, 255 / 224)
    cr, cb, green = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma, 1 - red - blue
    chromas = np.array([[0, cr], [-blue / green * cb, -red / green * cr], [cb, 0]])
    luminance = np.full((3, 1), luma)
    return np.hstack([luminance, chromas, -luminance * black - chromas.sum(1, keepdims=True) * 128]).astype(np.float32)


COLOURS = {
    "bt601": _matrix(0.299, 0.114, full=False),
    "bt601-full": _matrix(0.299, 0.114, full=True),
    "bt709": _matrix(0.2126, 0.0722, full=False),
    "bt709-full": _matrix(0.2126, 0.0722, full=True),
}


def nv12_to_rgb(luma: Pixels, chroma: Pixels, colour: Floats) -> Pixels:
    """luma (H, W) and chroma (ceil H / 2, ceil W / 2, 2), nearest, by a matrix of COLOURS -> (H, W, 3)."""
    height, width = luma.shape
    rgb = np.empty((height, width, 3), np.uint8)
    first, second = np.moveaxis(chroma.astype(np.float32), -1, 0)
    for channel, (light, *weights, shift) in enumerate(colour):  # one by one: a third of it all stays in the cache
        tint = first * weights[0] + second * weights[1] + shift
        plane = tint.repeat(2, 1).repeat(2, 0)[:height, :width]
        plane += luma * light
        np.clip(plane, 0, 255, out=plane)
        plane += 0.5
        rgb[..., channel] = plane
    return rgb


@dataclass(frozen=True, eq=False)
class Taps:
    """One pass of a resize: pixel i of the result is the sum of `weights[k, i]` times source pixel `first[i] + k`."""

    first: Ints  # (size,) never falling; first + K stays inside the picture
    weights: Ints  # (K, size) with BITS fractional bits


def taps(side: int, start: float, end: float, size: int) -> Taps:
    """Pixels start .. end of a picture's side, made `size` pixels: bicubic, a = -0.5, as Pillow's precompute_coeffs."""
    low, high = np.float32(start), np.float32(end)  # Pillow takes a box in single precision
    scale = float(high - low) / size
    support = 2 * max(scale, 1.0)
    centre = float(low) + (np.arange(size) + 0.5) * scale
    begin = np.maximum((centre - support + 0.5).astype(np.int64), 0)  # towards 0, as C does
    stop = np.minimum((centre + support + 0.5).astype(np.int64), side)
    count = int((stop - begin).max())
    # At the right edge fewer pixels are left than `count`: the window moves in, those before `begin` weigh nothing.
    first = np.minimum(begin, side - count)
    place = first + np.arange(count)[:, None]  # (K, size)
    weights = _bicubic((place - centre + 0.5) / max(scale, 1.0)) * ((place >= begin) & (place < stop))
    weights /= weights.sum(0)
    return Taps(first.astype(np.int32), np.trunc(weights * 2**BITS + np.copysign(0.5, weights)).astype(np.int32))


@dataclass(frozen=True, eq=False)
class Plan:
    """`crop` of frames of one size, as the kernels take it."""

    columns: Taps  # of the pass along rows
    rows: Taps  # of the pass along columns; row 0 is first_row of the frame
    first_row: int  # of the frame, that is read
    row_count: int
    per_block: int  # columns of the result whose source fits into STAGED pixels


def plan(height: int, width: int, *, resize: int, size: int) -> Plan:
    """
    Raises:
        ValueError: a frame so large that one pixel of the result has more than STAGED source pixels in a row.
    """
    square = _square(height, width, resize, size)
    columns = taps(width, square.left, square.right, size)
    rows = taps(square.row_count, square.top, square.bottom, size)
    count, per_block = len(columns.weights), size
    if count > STAGED:
        raise ValueError(f"a frame {width} pixels wide cannot be made {size}: at most {STAGED} pixels make one")
    while _widest(columns.first, per_block) + count > STAGED:
        per_block = -(-per_block // 2)
    return Plan(columns, rows, square.first_row, square.row_count, per_block)


def _widest(first: Ints, per_block: int) -> int:
    """Source pixels between the first windows and the last of a block, in the block where they are most."""
    starts = np.arange(0, len(first), per_block)
    return int((first[np.minimum(starts + per_block, len(first)) - 1] - first[starts]).max())


@dataclass(frozen=True)
class _Square:
    """What is kept of a frame, in source pixels, and the rows of the frame that it is made from."""

    left: float
    right: float
    top: float  # from first_row on
    bottom: float
    first_row: int
    row_count: int


def _square(height: int, width: int, resize: int, size: int) -> _Square:
    """The long side is cut to an integer and the square's place rounded, as torchvision does.

    Raises:
        ValueError: the square is larger than the scaled frame.
    """
    if size > resize:
        raise ValueError(f"a crop of {size} pixels cannot come from a side of {resize}")
    short = min(height, width)
    tall, wide = (int(resize * side / short) for side in (height, width))
    above, before = round((tall - size) / 2), round((wide - size) / 2)
    top, bottom = above * height / tall, (above + size) * height / tall
    scale = height / tall
    reach = 2 * max(scale, 1.0) - scale / 2 + 1  # of the filter beyond the square, and rounding
    first, last = max(math.floor(top - reach), 0), min(math.ceil(bottom + reach), height)
    return _Square(
        before * width / wide, (before + size) * width / wide, top - first, bottom - first, first, last - first
    )


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys 1981, equation 4, with a = -0.5."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
