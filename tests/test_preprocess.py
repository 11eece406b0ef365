"""Resize, crop, normalisation and colours: against Pillow's own two steps, and against what the standards say."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kernels.preprocess import (
    BITS,
    COLOURS,
    STAGED,
    Pixels,
    Taps,
    affine,
    crop,
    normalise,
    nv12_to_rgb,
    plan,
)

SIZES = [
    (720, 1280), (1280, 720), (241, 320), (640, 360), (400, 224), (300, 300), (48, 64), (224, 224), (256, 256),
    (13, 7), (7, 300), (481, 853), (255, 257), (256, 455), (1, 1), (3, 2),
]  # fmt: skip


def two_steps(pixels: Pixels, resize: int, size: int) -> Pixels:
    """What CLIP does: torchvision's Resize and CenterCrop on a Pillow image."""
    height, width, _ = pixels.shape
    short = min(height, width)
    # Rows first in any version of Pillow: it may turn the order round where height shrinks much more than width.
    scaled = Image.fromarray(pixels)
    scaled = scaled.resize((int(resize * width / short), height), Image.Resampling.BICUBIC)
    scaled = scaled.resize((scaled.width, int(resize * height / short)), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def waves(height: int, width: int) -> Pixels:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    each = [np.sin(x / width * 9), np.cos(y / height * 7), np.sin((x / width + y / height) * 5)]
    return ((np.stack(each, -1) + 1) * 127).astype(np.uint8)


def furthest(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[1]}x{shape[0]}")
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (224, 224), (7, 4)])
def test_the_crop_is_clips_resize_and_centre_crop(shape: tuple[int, int], resize: int, size: int) -> None:
    for picture in (noise(*shape), waves(*shape)):
        got = crop(picture, resize=resize, size=size)
        assert got.shape == (size, size, 3) and got.dtype == np.uint8
        assert furthest(got, two_steps(picture, resize, size)) <= 2


@pytest.mark.shared
def test_the_crop_of_photos(shared_data: Path) -> None:
    paths = sorted((shared_data / "photos").rglob("*.jpg"))[::80]
    assert paths
    for path in paths:
        photo = np.asarray(Image.open(path).convert("RGB"))
        assert furthest(crop(photo, resize=256, size=224), two_steps(photo, 256, 224)) <= 2


def test_the_whole_resize_agrees_where_pillow_keeps_its_order() -> None:
    """Landscape: every version of Pillow scales its rows first."""
    picture = noise(240, 426)
    scaled = Image.fromarray(picture).resize((int(256 * 426 / 240), 256), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled.crop((115, 16, 339, 240)))
    assert scaled.width == 454
    assert furthest(crop(picture, resize=256, size=224), expected) <= 2


@pytest.mark.parametrize("shape", [*SIZES, (2160, 3840), (4320, 7680)], ids=lambda shape: f"{shape[1]}x{shape[0]}")
def test_a_plan_is_the_crop_in_integers(shape: tuple[int, int]) -> None:
    picture, planned = noise(*shape), plan(*shape, resize=256, size=224)
    strip = picture[planned.first_row : planned.first_row + planned.row_count]
    narrow = weighted(strip.transpose(1, 0, 2), planned.columns).transpose(1, 0, 2)
    np.testing.assert_array_equal(weighted(narrow, planned.rows), crop(picture, resize=256, size=224))
    first, count = planned.columns.first, len(planned.columns.weights)
    for start in range(0, 224, planned.per_block):
        assert first[min(start + planned.per_block, 224) - 1] + count - first[start] <= STAGED


def weighted(pixels: NDArray[np.integer], taps: Taps) -> NDArray[np.int64]:
    """One pass along the first axis, as the kernel makes it."""
    total = np.full((taps.first.size, *pixels.shape[1:]), 1 << (BITS - 1), np.int64)
    for tap, weights in enumerate(taps.weights):
        total += weights[:, None, None] * pixels[taps.first + tap].astype(np.int64)
    assert np.abs(total).max() < 2**31
    return (total >> BITS).clip(0, 255)


def test_what_cannot_be_cropped_is_refused() -> None:
    with pytest.raises(ValueError, match="a crop of 256 pixels cannot come from a side of 224"):
        crop(noise(300, 300), resize=224, size=256)
    with pytest.raises(ValueError, match="a frame 1000000 pixels wide cannot be made 224"):
        plan(1_000_000, 1_000_000, resize=256, size=224)


def test_pixels_are_normalised_per_channel() -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    got = normalise(np.array([[[0, 255, 51]]], np.uint8), mean, std)
    assert got.shape == (3, 1, 1) and got.dtype == np.float16 and got.flags.c_contiguous
    np.testing.assert_allclose(got[:, 0, 0], [-1, 3, 0.2], atol=1e-3)
    assert affine(mean, std).dtype == np.float32


@pytest.mark.parametrize(
    ("colour", "yuv", "rgb"),
    [
        ("bt601", (16, 128, 128), (0, 0, 0)),
        ("bt601", (235, 128, 128), (255, 255, 255)),
        ("bt601", (81, 90, 240), (255, 0, 0)),
        ("bt601", (145, 54, 34), (0, 255, 0)),
        ("bt601", (41, 240, 110), (0, 0, 255)),
        ("bt709", (63, 102, 240), (255, 0, 0)),
        ("bt709", (173, 42, 26), (0, 255, 0)),
        ("bt709", (32, 240, 118), (0, 0, 255)),
        ("bt601-full", (76, 85, 255), (254, 0, 0)),
        ("bt601-full", (255, 128, 128), (255, 255, 255)),
        ("bt709-full", (54, 99, 255), (254, 0, 0)),
        ("bt709-full", (0, 128, 128), (0, 0, 0)),
    ],
)
def test_colours_are_those_of_the_standard(colour: str, yuv: tuple[int, int, int], rgb: tuple[int, int, int]) -> None:
    """Colour bars: black, white and the primaries."""
    luma, chroma = np.full((3, 5), yuv[0], np.uint8), np.full((2, 3, 2), yuv[1:], np.uint8)
    got = nv12_to_rgb(luma, chroma, COLOURS[colour])
    assert got.shape == (3, 5, 3) and got.dtype == np.uint8
    assert furthest(got, np.broadcast_to(np.array(rgb, np.uint8), got.shape)) <= 2


def test_chroma_lies_under_two_by_two_pixels() -> None:
    luma, chroma = np.full((3, 3), 128, np.uint8), np.full((2, 2, 2), 128, np.uint8)
    chroma[1, 0] = 200
    got = nv12_to_rgb(luma, chroma, COLOURS["bt709"])
    changed = (got != got[0, 0]).any(-1)
    np.testing.assert_array_equal(changed, [[0, 0, 0], [0, 0, 0], [1, 1, 0]])
