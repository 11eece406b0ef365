"""Frames to windows: what is in each, when it comes, and what a gap does."""

import numpy as np
import pytest

from kernels.errors import InputError
from stream.types import NS, WINDOW_NS, Frame, Window
from stream.window import Windower, hop_from_seconds

WALL = 1_700_000_000 * NS


def frame(hops: float, *, index: int = 0, discontinuity: bool = False) -> Frame:
    """The frame in the middle of a hop of 1 s, unless told otherwise."""
    pts = round((hops + 0.5) * NS)
    return Frame("cam", index, pts, 5, WALL + pts, np.zeros((2, 2, 3), np.uint8), discontinuity)


def windows_of(times: list[float], hop: float = 1.0) -> list[Window]:
    windower = Windower("cam", hop_from_seconds(hop))
    return [w for t in times for w in windower.push(frame(t - 0.5))] + windower.drain()


@pytest.mark.parametrize("hop", [2.0, 1.0, 0.5, 0.25])
def test_every_frame_travels_exactly_once_and_windows_overlap(hop: float) -> None:
    times = [(i + 0.5) * hop + 0.01 for i in range(40)]
    windows = windows_of(times, hop)
    carried = [f.pts_ns for w in windows for f in w.frames]
    assert carried == [round(t * NS) for t in times]
    assert [w.index for w in windows] == list(range(len(windows)))
    assert len(windows) == 40 - round(2 / hop) + 1
    for window in windows:
        assert window.end_ns - window.start_ns == WINDOW_NS
        assert window.start_ns == window.index * hop_from_seconds(hop)


def test_a_window_comes_with_the_frame_of_its_last_slot() -> None:
    windower = Windower("cam", NS)
    assert windower.push(frame(0.0)) == []
    (first,) = windower.push(frame(1.0))
    assert (first.start_ns, first.end_ns) == (0, 2 * NS)
    assert [f.pts_ns for f in first.frames] == [NS // 2, 3 * NS // 2]
    assert first.captured_ns == WALL + 3 * NS // 2
    assert first.epoch_ns == WALL


def test_a_missing_frame_does_not_cost_its_window() -> None:
    windows = windows_of([0.5, 1.5, 3.5, 4.5])
    assert [(w.index, len(w.frames), w.discontinuity) for w in windows] == [
        (0, 2, False),
        (1, 0, False),
        (2, 1, False),
        (3, 1, False),
    ]


def test_a_gap_of_a_window_begins_a_new_take() -> None:
    windows = windows_of([0.5, 1.5, 4.5, 5.5, 6.5])
    assert [(w.index, w.discontinuity) for w in windows] == [(0, False), (4, True), (5, False)]
    assert [f.pts_ns // NS for f in windows[1].frames] == [4, 5]


def test_no_window_spans_an_interruption() -> None:
    windower = Windower("cam", NS)
    windows = [w for t in (0, 1, 2) for w in windower.push(frame(t))]
    windows += windower.push(frame(3, discontinuity=True)) + windower.push(frame(4))
    assert [(w.index, w.discontinuity) for w in windows] == [(0, False), (1, False), (3, True)]
    assert [f.pts_ns // NS for f in windows[-1].frames] == [3, 4]


def test_a_take_too_short_for_a_window_still_has_its_say() -> None:
    """A slideshow, a camera of one picture in 4 s, a connection that lasts a second: every frame is looked at."""
    windows = windows_of([0.5, 4.5, 8.5, 9.5])
    assert [(w.index, len(w.frames), w.discontinuity) for w in windows] == [(0, 1, False), (4, 1, True), (8, 2, True)]
    windower = Windower("cam", NS)
    told = [w for t in (0, 1, 13, 20) for w in windower.push(frame(t, discontinuity=t == 20))] + windower.drain()
    assert [f.pts_ns // NS for w in told for f in w.frames] == [0, 1, 13, 20]


def test_a_stream_shorter_than_a_window_still_gets_one() -> None:
    (window,) = windows_of([0.2])
    assert window.start_ns == 0 and len(window.frames) == 1
    assert windows_of([]) == []


def test_reset_forgets() -> None:
    windower = Windower("cam", NS)
    windower.push(frame(7))
    windower.reset()
    assert windower.push(frame(0)) == []
    assert [w.index for w in windower.push(frame(1))] == [0]


def test_two_frames_in_one_slot_are_a_mistake() -> None:
    windower = Windower("cam", NS)
    windower.push(frame(0.1))
    with pytest.raises(ValueError, match="already has one"):
        windower.push(frame(0.9))


@pytest.mark.parametrize("hop", [0.0, -1.0, 3.0, 0.7, 0.01, float("nan"), float("inf")])
def test_a_hop_that_does_not_divide_the_window_is_refused(hop: float) -> None:
    with pytest.raises(InputError, match="does not divide"):
        hop_from_seconds(hop)
