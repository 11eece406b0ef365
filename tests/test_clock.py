"""Stream time out of source time, and which frames are looked at."""

import random

import pytest

from stream.clock import Sampler, StreamClock, Tick, slot_of
from stream.types import NS, WINDOW_NS

MS = NS // 1000


def ticks(clock: StreamClock, *pairs: tuple[int, int]) -> list[Tick]:
    """Feed (running, monotonic) times in ms."""
    return [clock.tick(running * MS, monotonic * MS) for running, monotonic in pairs]


def times(found: list[Tick]) -> list[int]:
    return [tick.time_ns // MS for tick in found]


def breaks(found: list[Tick]) -> list[bool]:
    return [tick.discontinuity for tick in found]


def test_the_first_frame_past_the_middle_stands_for_a_hop() -> None:
    sampler = Sampler(NS)
    offered = [0, 500, 1000, 1499, 1500, 1501, 2499, 2500, 3000, 3700, 4500]
    assert [time for time in offered if sampler.take(time * MS)] == [0, 1500, 2500, 3700, 4500]
    assert [slot_of(time * MS, NS) for time in offered] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4]


def test_a_source_of_one_frame_a_hop_has_every_frame_looked_at() -> None:
    for phase in (0, 400, 600):
        sampler = Sampler(NS)
        assert sum(sampler.take((phase + i * 1000) * MS) for i in range(20)) >= 19


def test_hops_without_frames_are_not_made_up_for() -> None:
    sampler = Sampler(NS)
    assert [time for time in [100, 5900, 5950, 6000, 6500] if sampler.take(time * MS)] == [100, 5900, 6500]


def test_without_hop_every_frame_is_taken() -> None:
    sampler = Sampler(None)
    assert all(sampler.take(time) for time in [0, 0, 1, 1])


@pytest.mark.parametrize("hop_ns", [0, -NS])
def test_a_hop_must_be_positive(hop_ns: int) -> None:
    with pytest.raises(ValueError, match="hop_ns must be positive"):
        Sampler(hop_ns)


@pytest.mark.parametrize("live", [True, False])
def test_time_starts_at_zero_and_follows_the_source_exactly(live: bool) -> None:
    clock = StreamClock(live=live)
    running = [5_000_000_007, 5_033_333_340, 5_066_666_674, 5_100_000_001]
    found = [clock.tick(time, 77 * NS + time) for time in running]
    assert [tick.time_ns for tick in found] == [time - running[0] for time in running]
    assert not any(breaks(found))


def test_live_jitter_of_arrival_does_not_change_time() -> None:
    clock = StreamClock(live=True)
    found = ticks(clock, (0, 0), (40, 900), (80, 901), (120, 902), (160, 1700))
    assert times(found) == [0, 40, 80, 120, 160]
    assert not any(breaks(found))


def test_a_reconnect_goes_on_by_the_time_that_passed() -> None:
    clock = StreamClock(live=True)
    before = ticks(clock, (3000, 10_000), (3040, 10_040))
    clock.interrupt()
    after = ticks(clock, (100, 17_040), (140, 17_080))
    assert times(before + after) == [0, 40, 7040, 7080]
    assert breaks(before + after) == [False, False, True, False]


def test_a_reconnect_before_the_first_frame_is_no_break() -> None:
    clock = StreamClock(live=True)
    clock.interrupt()
    assert ticks(clock, (500, 0), (540, 40)) == [Tick(0, False, -500 * MS), Tick(40 * MS, False, -500 * MS)]


@pytest.mark.parametrize("restart_ms", [0, 500_000])
def test_a_live_clock_that_jumps_is_anchored_anew(restart_ms: int) -> None:
    clock = StreamClock(live=True)
    found = ticks(clock, (60_000, 0), (60_040, 40), (restart_ms, 100), (restart_ms + 40, 140))
    assert times(found) == [0, 40, 100, 140]
    assert breaks(found) == [False, False, True, False]


def test_a_live_gap_that_really_passed_is_kept() -> None:
    clock = StreamClock(live=True)
    found = ticks(clock, (0, 0), (40, 40), (8040, 8040), (8080, 8080))
    assert times(found) == [0, 40, 8040, 8080]
    assert breaks(found) == [False, False, True, False]


def test_a_file_that_steps_back_goes_on_one_frame_later() -> None:
    clock = StreamClock(live=False)
    found = ticks(clock, (0, 0), (40, 0), (80, 0), (9000, 0), (9040, 0), (0, 0), (40, 0))
    assert times(found) == [0, 40, 80, 9000, 9040, 9080, 9120]
    assert breaks(found) == [False, False, False, True, False, True, False]


def test_a_gap_in_a_file_breaks_only_when_longer_than_a_window() -> None:
    clock = StreamClock(live=False)
    found = [clock.tick(time, 0) for time in (0, WINDOW_NS, 2 * WINDOW_NS + 1)]
    assert [tick.time_ns for tick in found] == [0, WINDOW_NS, 2 * WINDOW_NS + 1]
    assert breaks(found) == [False, False, True]


@pytest.mark.parametrize("live", [True, False])
def test_small_steps_back_hold_time_still(live: bool) -> None:
    clock = StreamClock(live=live)
    found = ticks(clock, (0, 0), (100, 100), (60, 101), (140, 140))
    assert times(found) == [0, 100, 100, 140]
    assert not any(breaks(found))


def test_small_steps_back_that_add_up_to_a_jump_are_one() -> None:
    clock = StreamClock(live=False)
    ticks(clock, (0, 0), (1000, 0))
    found = ticks(clock, *((1000 - 200 * step, 0) for step in range(1, 5)))
    assert breaks(found).count(True) == 1


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_goes_in_time_never_runs_back(live: bool, seed: int) -> None:
    chance = random.Random(seed)
    clock, monotonic, last = StreamClock(live=live), 0, 0
    for _ in range(500):
        if chance.random() < 0.02:
            clock.interrupt()
        monotonic += chance.randrange(0, 3 * NS)
        time_ns = clock.tick(chance.randrange(0, 100 * NS), monotonic).time_ns
        assert time_ns >= last
        if live:  # nor can a lying source run away from the time that passed
            assert time_ns - last <= 6 * NS
        last = time_ns
