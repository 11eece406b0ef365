"""Clips of real video against PyAV: what they show and when, and what the disk does to them."""

import gc
import io
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("gi", reason="needs GStreamer's Python bindings")

from bench.camera import free_port
from stream.clips import recorder as recording
from stream.clips.recorder import RAW, Recorder, Track
from stream.clips.ring import FORMAT
from stream.clips.shelf import Shelf
from stream.config.schema import ClipsConfig
from stream.ingest import VideoSource, open_source
from stream.sources import parse_source
from stream.types import NS, Clip, Event, Frame, Kind, Moment, Pixels
from tests.media import RATE, picture, write_video
from tests.serve import camera, until
from tests.test_events import query
from tests.test_serve_faults import fill

HOP_NS = NS // 2
SIZE = (160, 120)
CAT = query("a cat")
EPOCH_NS = 1_777_863_600 * NS


@dataclass(frozen=True)
class Shown:
    """A clip as PyAV decodes it."""

    times: list[float]  # seconds of the file
    pixels: list[Pixels]
    dts: list[float]  # of the packets


def shown(path: Path) -> Shown:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        assert packets[0].is_keyframe
        dts = [float((packet.dts or 0) * stream.time_base) for packet in packets]
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        times = [float(frame.time or 0) for frame in frames]
        return Shown(times, [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames], dts)


class Desk:
    """A recorder with the folder of its clips, and one stream of it."""

    def __init__(self, folder: Path, *, raw: bool = False, **config: float) -> None:
        self.folder = folder
        options = ClipsConfig(folder=folder, **{"before_s": 2.0, "after_s": 2.0, **config})  # type: ignore[arg-type]
        self.recorder = Recorder(options, history_s=60, hop_ns=HOP_NS, wake=lambda: None)
        self.track = self.recorder.track("door", raw=raw)

    def tell(self, kind: Kind, name: str, start_s: float, end_s: float | None = None, **more: bool) -> None:
        start_ns = round(start_s * NS)
        moment = Moment(name, "door", CAT.id, start_ns, None, start_ns + NS // 2, 0.75)
        if end_s is not None:
            moment = replace(moment, end_ns=round(end_s * NS))
        self.track.tell(Event(kind, "door", 1, EPOCH_NS, EPOCH_NS, CAT, moment, 0.5, **more))  # type: ignore[arg-type]

    def moment(self, name: str, start_s: float, end_s: float, **more: bool) -> None:
        self.tell(Kind.OPENED, name, start_s, **more)
        self.tell(Kind.CLOSED, name, start_s, end_s, **more)

    def status(self, state: str) -> None:
        self.track.tell(Event(Kind.STATUS, "door", 1, EPOCH_NS, EPOCH_NS, status={"state": state}))

    def clips(self, count: int) -> dict[str, Clip]:
        """The clips of so many moments, by the moment's name."""
        found: dict[str, Clip] = {}

        def enough() -> bool:
            for closed, clip in self.recorder.finished():
                assert closed.moment and closed.moment.id not in found
                found[closed.moment.id] = clip
            return len(found) >= count

        until(enough, 20)
        return found

    def video(self, clip: Clip) -> Shown:
        path = self.folder / f"{clip.name}.mp4"
        assert self.recorder.shelf and self.recorder.shelf.find(path.name) == path
        jpeg = path.with_suffix(".jpg")
        assert clip.nbytes == path.stat().st_size + (jpeg.stat().st_size if clip.thumbnail else 0)
        return shown(path)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with opened(tmp_path / "clips") as desk:
        yield desk


@contextmanager
def opened(folder: Path, *, raw: bool = False, **config: float) -> Iterator[Desk]:
    desk = Desk(folder, raw=raw, **config)
    try:
        yield desk
    finally:
        desk.recorder.close()
        assert not list(folder.glob("*.part"))


def watch(track: Track, text: str | Path, until_s: float = 1e9) -> VideoSource:
    """Read a recording as fast as it goes, up to a stream time; the source stays open."""
    if track.ring:
        track.ring.source(0)
    source = open_source(parse_source(str(text)), hop_ns=HOP_NS, pace="max", ring=track.ring)
    for item in source:
        if isinstance(item, Frame):
            track.look(item)
            if item.pts_ns >= until_s * NS:
                break
    return source


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A key every second or so, for 20 s of H.264 and 9 s of others; made once."""
    folder = tmp_path_factory.mktemp("clips")
    codecs = {"h264": "libx264", "h265": "libx265", "vp9": "libvpx-vp9", "mpeg4": "mpeg4"}

    def made(name: str) -> Path:
        path = folder / f"{name}.mkv"
        if not path.exists():
            write_video(path, codecs[name], size=SIZE, frames=(20 if name == "h264" else 9) * RATE, gop=RATE)
        return path

    return made


def is_picture(pixels: Pixels, number: int) -> bool:
    """Whether this is what `tests.media.picture` drew, and neither the one before nor the one after."""
    off = [np.abs(pixels.astype(float) - picture(number + step, *SIZE)).mean() for step in (-1, 0, 1)]
    return bool(off[1] == min(off))


@pytest.mark.parametrize("codec", ["h264", "h265", "vp9", "mpeg4"])
def test_a_clip_shows_what_the_stream_showed_then(codec: str, videos: Callable[[str], Path], desk: Desk) -> None:
    """H.264 and H.265 have B-frames: the order in the file is not that on the screen."""
    source = watch(desk.track, videos(codec))
    desk.moment("m", 4.3, 5.1)
    clip = desk.clips(1)["m"]
    source.close()
    assert clip.missing is None and clip.thumbnail
    assert clip.start_ns <= 2.3 * NS and clip.end_ns >= 7.1 * NS
    assert clip.end_ns - clip.start_ns < 7.5 * NS  # and not the whole ring
    video = desk.video(clip)
    assert video.times[0] == 0 and clip.start_ns / NS + video.times[-1] == pytest.approx(clip.end_ns / NS, abs=0.002)
    asked = [at_s for at_s in video.times if clip.start_ns / NS + at_s <= 7.1]
    assert all(0 < b - a < 1.5 / RATE for a, b in pairwise(asked))  # none is missing
    assert all(0 < b - a < 0.3 for a, b in pairwise(video.times))  # after it, B-frames of the last group may
    assert all(a < b for a, b in pairwise(video.dts))
    for at_s, pixels in zip(video.times, video.pixels, strict=True):
        assert is_picture(pixels, round((clip.start_ns / NS + at_s) * RATE))
    assert desk.track.describe() == {"open": 0, "written": 1, "failed": 0, "bytes": clip.nbytes}


def test_rtsp_does_not_tell_in_which_order_pictures_are_decoded(tmp_path: Path, desk: Desk) -> None:
    """B-frames, which an RTSP server sends without the time of decoding."""
    path, port = write_video(tmp_path / "b.mp4", size=SIZE, frames=9 * RATE, gop=RATE), free_port()
    with camera(port, "--file", path):
        source = watch(desk.track, f"rtsp://127.0.0.1:{port}/cam", until_s=6)
        desk.moment("m", 2.5, 3)
        clip = desk.clips(1)["m"]
        source.close()
    assert clip.missing is None and clip.start_ns <= 0.5 * NS and clip.end_ns >= 5 * NS
    video = desk.video(clip)
    assert all(a < b for a, b in pairwise(video.dts)) and all(a < b for a, b in pairwise(video.times))
    first = next(number for number in range(2 * RATE) if is_picture(video.pixels[0], number))
    asked = [number for number, at_s in enumerate(video.times) if clip.start_ns / NS + at_s <= 5]
    assert all(is_picture(video.pixels[number], first + number) for number in asked)
    assert video.times[asked[-1]] == pytest.approx(asked[-1] / RATE, abs=0.5)  # RTP smooths what came unevenly


def test_a_moment_that_lasts_grows_on_the_disk_and_not_in_memory(videos: Callable[[str], Path], desk: Desk) -> None:
    desk.status("connected")
    source = watch(desk.track, videos("h264"), until_s=6)
    desk.tell(Kind.OPENED, "m", 5)
    until(lambda: list(desk.folder.glob("*.part")))
    for item in source:
        if isinstance(item, Frame):
            desk.track.look(item)
    desk.tell(Kind.CLOSED, "m", 5, 17)
    clip = desk.clips(1)["m"]
    source.close()
    assert clip.missing is None and clip.start_ns <= 3 * NS and clip.end_ns >= 19 * NS
    assert clip.name.startswith(f"door_{CAT.id}_20260504T030005")


def test_what_is_missing_is_said(videos: Callable[[str], Path], tmp_path: Path) -> None:
    with opened(tmp_path / "clips", longest_s=8) as desk:
        source = watch(desk.track, videos("h264"))
        source.close()
        desk.moment("early", 0.5, 3)
        desk.tell(Kind.OPENED, "long", 6)
        desk.tell(Kind.OPENED, "late", 17)
        desk.status("reconnecting")
        desk.tell(Kind.CLOSED, "late", 17, 19)
        clips = desk.clips(2)
        assert clips["early"].missing == "only 0.5 s before it are held"
        assert clips["late"].missing == "the stream was interrupted"
        desk.tell(Kind.CLOSED, "long", 6, 15)
        long = desk.clips(1)["long"]  # told once the moment has closed
        assert long.missing == "it is cut off at 8 s" and 7.5 * NS < long.end_ns - long.start_ns <= 8 * NS
        desk.status("connected")
        desk.moment("last", 15, 19)
        desk.tell(Kind.OPENED, "never closed", 16)
        desk.recorder.close()
        (closed, clip), *others = desk.recorder.finished()
        assert closed.moment and closed.moment.id == "last" and not others
        assert clip.missing == "the service ended"


def test_one_that_was_cut_off_is_told_when_all_ends_with_its_moment(
    videos: Callable[[str], Path], tmp_path: Path
) -> None:
    with opened(tmp_path / "clips", longest_s=3) as desk:
        watch(desk.track, videos("h264")).close()
        desk.tell(Kind.OPENED, "long", 6)
        until(lambda: desk.track.written, 20)
        desk.tell(Kind.CLOSED, "long", 6, 19)
        desk.recorder.close()
        assert desk.clips(1)["long"].missing == "it is cut off at 3 s"


def test_what_was_over_before_it_was_asked_for(videos: Callable[[str], Path], tmp_path: Path) -> None:
    with opened(tmp_path / "clips", before_s=0) as desk:
        long = write_video(tmp_path / "long.mkv", size=(64, 48), frames=20 * RATE, gop=RATE)
        watch(desk.track, long).close()
        assert desk.track.ring
        with (ring := desk.track.ring)._lock:  # as after minutes
            ring._drop_until(next(each for each in ring._keys if ring._at(each).unit.pts_ns > 10 * NS))
        desk.moment("gone", 1, 3, backfill=True)
        desk.moment("half", 8, 13, backfill=True)
        desk.moment("held", 14, 16, backfill=True)
        clips = desk.clips(2)
        assert clips["held"].missing is None
        assert clips["half"].missing is not None and "its first" in clips["half"].missing
        assert desk.track.describe()["failed"] == 0
        desk.moment("another", 15, 16)
        assert desk.clips(1).keys() == {"another"}


def test_no_clip_goes_over_a_change_of_the_format(tmp_path: Path, desk: Desk) -> None:
    """Two recordings glued together: another size, and a clock that begins again."""
    parts = [
        write_video(tmp_path / f"{w}.ts", size=(w, h), frames=6 * RATE, gop=RATE) for w, h in ((160, 120), (320, 240))
    ]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    watch(desk.track, both).close()
    desk.moment("before", 3, 5)
    desk.moment("after", 8, 9)
    clips = desk.clips(2)
    before, after = (desk.video(clips[name]) for name in ("before", "after"))
    assert clips["before"].missing in (FORMAT, "the clock of the stream jumped")
    assert {pixels.shape for pixels in before.pixels} == {(120, 160, 3)}
    assert {pixels.shape for pixels in after.pixels} == {(240, 320, 3)}
    assert 5.5 < clips["before"].end_ns / NS < 6.5 and 5.5 < clips["after"].start_ns / NS < 6.5


def test_raw_and_unsuitable_video_has_no_clips_and_says_so(tmp_path: Path) -> None:
    with opened(tmp_path / "a", raw=True) as desk:
        desk.moment("m", 1, 2)
        assert desk.track.describe() == {"open": 0, "written": 0, "failed": 0, "bytes": 0, "reason": RAW}
    with opened(tmp_path / "b") as desk:
        watch(desk.track, write_video(tmp_path / "vp8.webm", "libvpx", size=(64, 48), frames=30)).close()
        desk.moment("m", 0.2, 0.5)
        until(lambda: not desk.recorder._events)
        told = desk.track.describe()
        assert told["failed"] == 0 and told["reason"].startswith("clips cannot hold video/x-vp8: H.264, H.265,")
    assert not list(tmp_path.glob("?/*"))


def test_the_budget_holds_and_the_oldest_go(videos: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    sizes: list[int] = []
    with opened(folder, max_mb=1) as desk:
        big = write_video(tmp_path / "big.mkv", size=(320, 240), frames=6 * RATE, gop=RATE)
        watch(desk.track, big).close()
        clips: list[Clip] = []
        for number in range(6):
            desk.moment(f"m{number}", 2 + number / 10, 3)
            clips += desk.clips(1).values()
            sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        assert max(sizes) <= 1 << 20 and sizes[-1] > 1 << 18
        kept = [clip.name for clip in clips if (folder / f"{clip.name}.mp4").exists()]
        assert kept == [clip.name for clip in clips][-len(kept) :] and 1 <= len(kept) < 6
        assert {path.stem for path in folder.iterdir()} == set(kept)  # thumbnails went, too
    with opened(folder, max_mb=1) as desk:  # the same after a restart
        watch(desk.track, big).close()
        desk.moment("m9", 2.5, 3.5)
        clips += desk.clips(1).values()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 1 << 20
        assert (folder / f"{clips[-1].name}.mp4").exists() and not (folder / f"{kept[0]}.mp4").exists()


def test_a_disk_that_is_full_costs_clips_and_nothing_else(
    videos: Callable[[str], Path], disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(disk / "clips") as desk:
        watch(desk.track, videos("h264")).close()
        desk.moment("first", 3, 4)
        first = desk.clips(1)["first"]
        filler = fill(disk)
        for number in range(3):
            desk.moment(f"full{number}", 5 + number, 6 + number)
        until(lambda: desk.track.describe()["failed"] + desk.track.describe()["written"] == 4)
        filler.unlink()
        desk.moment("again", 5, 6)
        assert desk.clips(1).popitem()[1].nbytes
        assert first.nbytes
        failed = desk.track.describe()["failed"]
    assert failed and [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], caplog.text


def test_a_disk_that_fills_up_while_a_clip_is_written(
    videos: Callable[[str], Path], disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else was quicker than the look at what is free."""
    with opened(disk / "clips") as desk:
        watch(desk.track, videos("h264")).close()
        filler = fill(disk)
        with monkeypatch.context() as patch:
            patch.setattr(Shelf, "make_room", lambda *_: True)
            for number in range(3):
                desk.moment(f"m{number}", 5 + number, 9 + number)
            until(lambda: desk.track.describe()["failed"] == 3, 20)
        filler.unlink()
        desk.moment("again", 5, 6)
        assert desk.clips(1)["again"].missing is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], caplog.text


def test_a_folder_that_goes_away_costs_clips_and_nothing_else(
    videos: Callable[[str], Path], desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    watch(desk.track, videos("h264")).close()
    shutil.rmtree(desk.folder)
    for number in range(3):
        desk.moment(f"m{number}", 5 + number, 6 + number)
    until(lambda: desk.track.describe()["failed"] == 3)
    assert len(caplog.records) == 1 and caplog.records[0].getMessage().startswith("a clip cannot be written: ")
    desk.folder.mkdir()
    desk.moment("again", 5, 6)
    assert desk.clips(1)["again"].missing is None
    assert desk.track.describe()["open"] == 0


def test_a_disk_too_slow_ends_a_clip_early(videos: Callable[[str], Path], tmp_path: Path) -> None:
    with opened(tmp_path / "clips") as desk:
        source = watch(desk.track, videos("h264"), until_s=6)
        desk.tell(Kind.OPENED, "m", 5)
        until(lambda: desk.track.describe()["open"] == 1)
        ring = desk.track.ring
        assert ring
        with desk.recorder._arrived, ring._lock:  # while the thread is held up, the ring goes round
            ring._drop_until(ring._held[-1].ordinal)
        watch_on = [item for item in source if isinstance(item, Frame)]
        assert watch_on
        desk.tell(Kind.CLOSED, "m", 5, 17)
        clip = desk.clips(1)["m"]
        source.close()
        assert clip.missing in (None, "the disk was too slow")


def test_many_moments_at_once_have_a_limit(
    videos: Callable[[str], Path], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "OPEN_LIMIT", 2)
    watch(desk.track, videos("h264")).close()
    for number in range(4):
        desk.tell(Kind.OPENED, f"m{number}", 10 + number)
    until(lambda: desk.track.describe()["failed"] == 2)
    for number in range(4):
        desk.tell(Kind.CLOSED, f"m{number}", 10 + number, 15)
    assert desk.clips(2).keys() == {"m0", "m1"}


def test_pictures_are_those_that_were_looked_at(videos: Callable[[str], Path], desk: Desk) -> None:
    pictures = desk.recorder.pictures("door")
    assert pictures is desk.track.pictures and desk.recorder.pictures("yard") is None
    assert pictures.newest() is None and pictures.at(10**20) is None
    frames = []
    assert desk.track.ring
    desk.track.ring.source(0)
    with_all = open_source(parse_source(str(videos("h264"))), hop_ns=HOP_NS, pace="max", ring=desk.track.ring)
    for item in with_all:
        if isinstance(item, Frame):
            frames.append(item)
            desk.track.look(item)
            until(lambda: pictures.nearest(0) and pictures._newest is item)  # noqa: B023
    with_all.close()
    assert pictures.at(frames[0].wall_ns - 1) is None
    for frame in frames[::7]:
        jpeg = pictures.at(frame.wall_ns + HOP_NS // 3)
        assert jpeg and pictures.nearest(frame.pts_ns + 1).jpeg == jpeg  # type: ignore[union-attr]
        with av.open(io.BytesIO(jpeg), "r") as container:
            (decoded,) = container.decode(video=0)
            off = np.abs(decoded.to_ndarray(format="rgb24").astype(float) - frame.pixels).mean()
        assert decoded.width == 160 and off < 8
    assert pictures.newest() is pictures.newest() is not None
    desk.recorder.forget("door", desk.track)
    assert desk.recorder.pictures("door") is None


def test_a_source_with_a_ring_leaves_nothing_behind(videos: Callable[[str], Path], desk: Desk) -> None:
    source = watch(desk.track, videos("h264"), until_s=1)
    pipeline, gone = weakref.ref(source._pipeline), weakref.ref(source)
    source.close()
    del source
    gc.collect()
    assert pipeline() is None and gone() is None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root may mount a small disk")
    yield path
    subprocess.run(["umount", path], check=True)
