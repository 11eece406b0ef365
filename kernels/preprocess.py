"""Decoded frame -> the crop an image tower takes: antialiased bicubic resize and centre crop in one pass."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def crop(pixels: Pixels, *, resize: int, size: int) -> Pixels:
    """Scale so that the short side is `resize`, and keep the centre square of `size`.

    Only the source pixels under the square are read: the same result as resizing all of it first (to the rounding
    of the long side), at a third of the cost for a 16:9 frame.

    Args:
        pixels: (H, W, 3) uint8 RGB.
    Returns:
        (size, size, 3) uint8 RGB.
    """
    height, width, _ = pixels.shape
    side = min(height, width) * size / resize  # of the kept square, in source pixels
    left, top = (width - side) / 2, (height - side) / 2
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))
