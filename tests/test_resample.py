"""Irregular features on the grid of windows: held against a loop in exact fractions, and never ahead of their time."""

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.errors import InputError
from trainer.resample import first_windows, resample

HOPS = (2.0, 1.0, 0.5, 0.2, 0.1)


def frames(count: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Times on a grid of a tenth of a second, so that many fall on the edge of a window, with gaps of many windows."""
    draw = np.random.default_rng(seed)
    steps = draw.choice([0, 1, 3, 7, 20, 33, 95], count)
    return np.cumsum(steps) / 10, draw.normal(size=(count, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("hop_s", HOPS)
@pytest.mark.parametrize("seed", range(4))
def test_a_window_is_the_mean_of_its_frames_or_the_newest_before_it(hop_s: float, seed: int) -> None:
    pts, features = frames(30, seed)
    exact = [Fraction(round(10 * at), 10) for at in pts]
    hop = Fraction(round(10 * hop_s), 10)
    windows, newest = resample(pts, features, hop_s)
    for t in range(len(windows)):
        start, end = t * hop, t * hop + 2
        known = [i for i, at in enumerate(exact) if at < end]
        held = [i for i in known if exact[i] >= start]
        assert newest[t] == (known[-1] if known else -1)
        want = features[held].mean(0) if held else features[known[-1]] if known else np.zeros_like(features[0])
        np.testing.assert_allclose(windows[t], want, rtol=1e-6, atol=1e-6)
    first = [next(t for t in range(10_000) if at < t * hop + 2) for at in exact]
    assert first_windows(pts, hop_s).tolist() == first
    assert len(windows) == first[-1] + 1


@pytest.mark.parametrize("hop_s", HOPS)
def test_what_comes_later_changes_no_window_before_it(hop_s: float) -> None:
    pts, features = frames(40, 9)
    windows, newest = resample(pts, features, hop_s)
    for cut in range(1, len(pts)):
        if pts[cut] == pts[cut - 1]:
            continue
        changed = np.concatenate([features[:cut], features[cut:] + 100])
        later = np.concatenate([pts[:cut], pts[cut:] + 0.7])
        again, newest_again = resample(later, changed, hop_s)
        past = first_windows(pts[cut], hop_s)  # the first window that may know of the cut
        np.testing.assert_array_equal(again[:past], windows[:past])
        np.testing.assert_array_equal(newest_again[:past], newest[:past])


def test_windows_before_the_first_frame_are_zero_and_belong_to_no_frame() -> None:
    windows, newest = resample([5.0, 5.5], np.ones((2, 3), np.float16), 1.0)
    assert windows.dtype == np.float16
    np.testing.assert_array_equal(newest, [-1, -1, -1, -1, 1])
    np.testing.assert_array_equal(windows.any(1), [False, False, False, False, True])


def test_no_frames_are_no_windows() -> None:
    windows, newest = resample([], np.ones((0, 3), np.float32), 1.0)
    assert windows.shape == (0, 3) and newest.shape == (0,)


@pytest.mark.parametrize("pts", [[1.0, 0.5], [-0.1, 1.0], [0.0, np.nan], [0.0, np.inf], [0.0]])
def test_times_out_of_order_before_zero_not_finite_or_too_few_are_refused(pts: list[float]) -> None:
    with pytest.raises(ValueError, match="time"):
        resample(pts, np.ones((2, 3), np.float32), 1.0)


def test_a_hop_that_does_not_divide_the_window_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide"):
        resample([0.0], np.ones((1, 3), np.float32), 0.7)
