"""The ring of encoded video: what it holds, on which clock, and where a clip of it begins."""

import pytest

from stream.clips.keys import Keys
from stream.clips.ring import FORMAT, INTERRUPTED, JUMP, Part, Ring, Unit
from stream.types import NS

FRAME = NS // 10
CAPS = "video/x-h264, width=320"


class Camera:
    """Ten pictures a second, a key each second, all of 10 bytes."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.now_ns, self.first = ring, 0, True

    def send(self, seconds: float, running_s: float = 0, caps: str = CAPS, key_every: int = 10, size: int = 10) -> None:
        for number in range(round(10 * seconds)):
            pts_ns = round(running_s * NS) + number * FRAME
            unit = Unit(bytes(size), pts_ns, number % key_every == 0, self.now_ns)
            self.ring.put(unit, caps, self.first)
            self.first, self.now_ns = False, self.now_ns + FRAME


@pytest.fixture
def ring() -> Ring:
    ring = Ring(5, 1 << 20)
    ring.source(0)
    return ring


def seconds(ring: Ring, part: Part, after: int) -> list[float]:
    """Stream times of the units of a part, long after they came."""
    return [time_ns / NS for time_ns, _ in ring.run(part, after, 10**18).units]


def find(ring: Ring, start_s: float, before_s: float = 1) -> tuple[float, bool] | None:
    start = ring.find(round(start_s * NS), round(before_s * NS), NS // 2)
    return None if start is None else (start.time_ns / NS, start.oldest)


def test_a_clip_begins_at_the_newest_key_that_is_early_enough(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(4, running_s=7)
    assert find(ring, 2) is None  # nothing is known of the clock yet
    ring.mark(7 * NS, -7 * NS)
    assert find(ring, 2) == (1, False)
    assert find(ring, 2.9) == (1, False)
    assert find(ring, 3) == (2, False)
    assert find(ring, 0.5) == (0, True)
    assert find(ring, 100) == (3, False)
    assert find(ring, 0, before_s=0) == (0, False)
    start = ring.find(2 * NS, NS, 0)
    assert start is not None
    run = ring.run(start.part, start.ordinal, 0)
    assert [time_ns for time_ns, _ in run.units] == [NS + n * FRAME for n in range(30)]
    assert run.units[0][1].key and not run.lost and run.over is None
    camera.send(1, running_s=11)
    more = ring.run(start.part, run.after, 0)
    assert [time_ns / NS for time_ns, _ in more.units] == [4 + n / 10 for n in range(10)]


def test_the_oldest_go_from_key_to_key(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(30)
    ring.mark(0, 0)
    begin, oldest = find(ring, 0) or (0.0, False)
    assert oldest and begin in (24, 25)  # the ring reaches 5 s back, and to the key before
    assert ring.nbytes <= 10 * 61
    start = ring.find(0, 0, 0)
    assert start and ring.run(start.part, 0, 0).lost  # whoever had read nothing so far has lost some
    assert not ring.run(start.part, start.ordinal, 0).lost
    small = Ring(1000, 250)
    small.source(0)
    Camera(small).send(30)
    assert 100 <= small.nbytes <= 250


def test_a_camera_without_keys_costs_no_more_memory() -> None:
    ring = Ring(1000, 250)
    ring.source(0)
    Camera(ring).send(100, key_every=10_000)
    ring.mark(0, 0)
    assert ring.nbytes <= 250 and find(ring, 99) is None  # no clip can begin


def test_what_was_begun_goes_on_though_its_key_has_left() -> None:
    ring = Ring(1000, 250)
    ring.source(0)
    camera = Camera(ring)
    camera.send(2, key_every=10_000)
    ring.mark(0, 0)
    start = ring.find(0, 0, 0)
    assert start
    run = ring.run(start.part, start.ordinal, 0)
    for _ in range(20):
        for _ in range(10):
            pts_ns = camera.now_ns
            ring.put(Unit(bytes(10), pts_ns, False, pts_ns), CAPS, False)
            camera.now_ns += FRAME
        run = ring.run(start.part, run.after, 0)
        assert len(run.units) == 10 and not run.lost
    assert ring.nbytes <= 250


def test_nothing_begins_before_a_key(ring: Ring) -> None:
    for number in range(5):
        ring.put(Unit(b"x", number * FRAME, False, 0), CAPS, number == 0)
    assert ring.nbytes == 0 and ring.caps is None
    ring.mark(0, 3 * NS)  # a decoder that shows what it has of the picture
    Camera(ring).send(1, running_s=0.5)
    assert find(ring, 3.5, 0) == (3.5, False)


@pytest.mark.parametrize("to_s", [100.0, -3600.0])
def test_a_clock_that_jumps_begins_another_part(ring: Ring, to_s: float) -> None:
    """It is told some pictures late, when units on the new clock have come already."""
    camera = Camera(ring)
    camera.send(2)
    ring.mark(0, 0)
    before = ring.find(NS, 0, 0)
    assert before
    camera.send(2, running_s=to_s)
    # What may be on another clock is kept back ...
    assert [at / NS for at, _ in ring.run(before.part, before.ordinal, camera.now_ns - NS).units][-1] == 1.9
    ring.mark(round(to_s * NS), round((2 - to_s) * NS))
    run = ring.run(before.part, before.ordinal, camera.now_ns)
    assert len(run.units) == 10 and run.over == JUMP
    assert find(ring, 2.5, 0) == (2, False)
    assert find(ring, 3.5, 5) == (2, True)  # a clip never goes over the jump
    assert find(ring, 1.2, 0) == (1, False)
    after = ring.find(3 * NS, 0, 0)
    assert after and seconds(ring, after.part, after.ordinal - 10) == [2 + n / 10 for n in range(20)]


def test_a_gap_is_no_jump(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(1)
    ring.mark(0, 0)
    start = ring.find(0, 0, 0)
    assert start
    camera.now_ns += 2 * NS
    camera.send(1, running_s=3)
    assert len(ring.run(start.part, 0, camera.now_ns).units) == 10  # for two seconds it might be
    run = ring.run(start.part, 0, camera.now_ns + 2 * NS)
    assert len(run.units) == 20 and run.over is None


def test_a_jump_in_the_midst_of_a_group_of_pictures(ring: Ring) -> None:
    """What is on the new clock and before its first key belongs to no clip."""
    camera = Camera(ring)
    camera.send(1)
    ring.mark(0, 0)
    for number in range(5):
        ring.put(Unit(b"x", 50 * NS + number * FRAME, False, camera.now_ns), CAPS, False)
    ring.mark(50 * NS, -49 * NS)
    camera.send(1, running_s=50.5)
    assert find(ring, 1.2, 0) == (1.5, True)
    assert find(ring, 0.4, 0) == (0, False)


def test_a_mark_whose_unit_never_came_counts_from_the_next_key(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(1)
    ring.mark(0, 0)
    ring.mark(77 * NS + 1, -70 * NS)
    part = ring.find(0, 0, 0)
    assert part and ring.run(part.part, 0, 0).over == JUMP
    ring.put(Unit(b"x", 77 * NS, False, camera.now_ns), CAPS, False)
    camera.send(1, running_s=78)
    assert find(ring, 8, 0) == (8, False)


def test_another_pipeline_is_another_part_whose_clock_comes_late(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(2)
    ring.mark(0, 0)
    old = ring.find(0, 0, 0)
    assert old
    ring.begin(INTERRUPTED)
    assert ring.run(old.part, 0, 0).over == INTERRUPTED  # though nothing follows yet
    camera.first = True
    camera.send(1)
    assert find(ring, 9, 0) == (1, False)  # of the new one nothing is known
    ring.mark(0, 9 * NS)
    assert find(ring, 9.5, 5) == (9, True)
    assert seconds(ring, old.part, 0) == [n / 10 for n in range(20)]


def test_another_source_tells_where_it_begins_last_of_all(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(1)
    ring.mark(0, 0)
    ring.source(None)
    camera.first = True
    camera.send(1, running_s=5)
    ring.mark(5 * NS, -5 * NS)
    assert find(ring, 60, 0) == (0, False)
    ring.based(60 * NS)
    assert find(ring, 60, 5) == (60, True)
    camera.send(1, running_s=6)
    assert find(ring, 61, 0) == (61, False)


def test_another_format_is_another_part_on_the_same_clock(ring: Ring) -> None:
    camera = Camera(ring)
    camera.send(2)
    ring.mark(0, 0)
    old = ring.find(0, 0, 0)
    assert old
    ring.put(Unit(b"x", 2 * NS, False, camera.now_ns), "video/x-h264, width=640", False)
    camera.send(2, running_s=2.1, caps="video/x-h264, width=640")
    run = ring.run(old.part, 0, camera.now_ns)
    assert len(run.units) == 20 and run.over == FORMAT
    start = ring.find(4 * NS, 10 * NS, 0)
    assert start and (start.time_ns / NS, start.oldest, start.part.caps) == (2.1, True, "video/x-h264, width=640")
    # The same format from another decoder is another part, too.
    camera.first = True
    camera.send(1, running_s=4.1)
    assert ring.run(start.part, start.ordinal, camera.now_ns).over == FORMAT


AVC, START_CODES = "video/x-h264, stream-format=(string)avc", "video/x-h264, stream-format=(string)byte-stream"


@pytest.mark.parametrize("caps", [AVC, START_CODES])
def test_of_h264_an_idr_counts_as_long_as_there_are_any(caps: str) -> None:
    def unit(*types: int) -> bytes:
        parts = [bytes([0x60 | kind]) + bytes([0xAB] * 300) for kind in types]
        return b"".join((len(part).to_bytes(4) if caps is AVC else b"\0\0\0\1") + part for part in parts)

    keys = Keys()
    told = [
        keys.is_key(unit(*types), caps, delta=delta)
        for types, delta in (((1,), True), ((9, 1), False), ((7, 8, 6, 5, 5), False), ((9, 1), False), ((5,), False))
    ]
    assert told == [False, True, True, False, True]
    assert keys.is_key(unit(1), "video/x-h265, stream-format=(string)hvc1", delta=False)
    assert not keys.is_key(b"\0\0\0\x09\x61", AVC, delta=False)  # cut off
