"""Ingest against PyAV, and against sources that misbehave."""

import gc
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gi", reason="needs GStreamer's Python bindings")

from kernels.errors import SourceError
from stream.clock import slot_of
from stream.ingest import VideoSource, open_source
from stream.pipeline import Pipeline
from stream.sources import SourceStatus, parse_source
from stream.types import NS, Frame
from tests.media import VARIABLE, decode, truncate, write_audio, write_video

ROOT = Path(__file__).parent.parent
Gst: Any = importlib.import_module("gi.repository.Gst")  # of the version that ingest asked for


@contextmanager
def opened(text: str | Path, **options: Any) -> Iterator[VideoSource]:
    options = {"hop_ns": None, "pace": "max"} | options
    source = open_source(parse_source(str(text)), **options)
    try:
        yield source
    finally:
        source.close()


def drain(source: VideoSource) -> tuple[list[Frame], list[SourceStatus]]:
    items = list(source)
    return [i for i in items if isinstance(i, Frame)], [i for i in items if isinstance(i, SourceStatus)]


def read_until(
    source: VideoSource, enough: Callable[[list[Frame], list[SourceStatus]], bool], limit_s: float = 20
) -> tuple[list[Frame], list[SourceStatus]]:
    """Read until `enough(frames, statuses)`."""
    frames: list[Frame] = []
    statuses: list[SourceStatus] = []
    deadline = time.monotonic() + limit_s
    while not enough(frames, statuses):
        assert time.monotonic() < deadline, f"not enough: {len(frames)} frames, {statuses}"
        item = source.read(0.1)
        if isinstance(item, Frame):
            frames.append(item)
        elif item is not None:
            statuses.append(item)
    return frames, statuses


def wait_for(condition: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str | Path, ready: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run a command of our own; `ready` waits for its first line."""
    child = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE if ready else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if child.stdout is not None:
            assert child.stdout.readline(), "it did not start"
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def camera(port: int, *options: str | Path) -> Any:
    return process(sys.executable, "-m", "bench.rtsp_server", "--port", str(port), *options, ready=True)


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- recordings

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264.mp4": ("libx264", {}),
    "h265.mp4": ("libx265", {}),
    "vp9.webm": ("libvpx-vp9", {"frames": 30}),
    "odd.mp4": ("libx264", {"size": (321, 241)}),
    "odd.webm": ("libvpx-vp9", {"size": (321, 241), "frames": 20}),
    "variable.mp4": ("libx264", {"steps_ms": VARIABLE}),
    "variable.mkv": ("libx264", {"steps_ms": VARIABLE}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        codec, options = FORMATS[name]
        path = folder / name
        return path if path.exists() else write_video(path, codec, **options)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_times_and_pixels_are_those_of_pyav(videos: Callable[[str], Path], name: str) -> None:
    path = videos(name)
    truth = decode(path)
    with opened(path) as source:
        frames, statuses = drain(source)
    assert [round(frame.pts_ns / NS / truth.tick) for frame in frames] == [at / truth.tick for at in truth.times]
    assert all(abs(frame.pts_ns - at * NS) <= 2 for frame, at in zip(frames, truth.times, strict=True))
    for frame, pixels in zip(frames, truth.pixels, strict=True):
        assert frame.pixels.shape == pixels.shape
        assert np.abs(frame.pixels.astype(int) - pixels).mean() <= 3
    assert [frame.index for frame in frames] == list(range(len(truth.times)))
    assert not any(frame.discontinuity for frame in frames)
    assert statuses == [SourceStatus("connected"), SourceStatus("ended")]


@pytest.mark.parametrize("name", ["h264.mp4", "variable.mkv", "vp9.webm"])
def test_sampling_takes_the_first_frame_that_stands_for_each_hop(videos: Callable[[str], Path], name: str) -> None:
    path, hop_ns = videos(name), NS // 5
    with opened(path) as source:
        every, _ = drain(source)
    slots: dict[int, Frame] = {}
    for frame in every:
        slots.setdefault(slot_of(frame.pts_ns, hop_ns), frame)
    with opened(path, hop_ns=hop_ns) as source:
        sampled, _ = drain(source)
        assert (source.decoded, source.taken, source.dropped) == (len(every), len(slots), 0)
    assert [frame.pts_ns for frame in sampled] == [frame.pts_ns for frame in slots.values()]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(sampled, slots.values(), strict=True))


def test_a_file_waits_for_a_slow_reader_and_loses_nothing(videos: Callable[[str], Path]) -> None:
    path, frames = videos("h264.mp4"), list[Frame]()
    with opened(path) as source:
        while not source.ended:
            # Read only once the decoder got as far ahead as it may.
            wait_for(lambda: source.taken == 45 or source.taken - len(frames) >= 4)
            assert source.taken - len(frames) <= 6
            if isinstance(item := source.read(1), Frame):
                frames.append(item)
        assert (source.decoded, source.taken, source.dropped) == (45, 45, 0)
    assert [frame.index for frame in frames] == list(range(45))


def test_a_recording_is_described_and_two_runs_of_a_file_are_equal(videos: Callable[[str], Path]) -> None:
    path = videos("variable.mkv")
    os.utime(path, ns=(0, 1_700_000_000 * NS))
    runs = []
    for _ in range(2):
        with opened(path, name="lobby") as source:
            assert (source.live, source.duration_ns) == (False, 2_550_000_000)
            runs.append([(f.stream, f.index, f.pts_ns, f.wall_ns) for f in drain(source)[0]])
    assert runs[0] == runs[1]
    assert all(stream == "lobby" and wall == 1_700_000_000 * NS + pts for stream, _, pts, wall in runs[0])


def test_a_recording_can_run_at_its_own_pace(videos: Callable[[str], Path]) -> None:
    with opened(videos("h264.mp4"), pace="real") as source:
        frames, _ = drain(source)
    for frame in frames:
        late_ns = (frame.arrival_ns - frames[0].arrival_ns) - frame.pts_ns
        assert -NS // 10 < late_ns < NS // 2
    assert len(frames) == 45


def test_the_resolution_may_change_within_a_stream(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{w}.ts", size=(w, h), frames=20) for w, h in ((320, 240), (162, 122))]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    with opened(both) as source:
        frames, _ = drain(source)
    shapes = [frame.pixels.shape for frame in frames]
    assert set(shapes) == {(240, 320, 3), (122, 162, 3)}
    assert all(a.pts_ns < b.pts_ns for a, b in pairwise(frames))
    assert len(frames) >= 38


def test_a_gap_is_told_by_the_next_frame_that_is_looked_at(tmp_path: Path) -> None:
    path = write_video(tmp_path / "gap.mkv", size=(64, 48), frames=30, steps_ms=(500, 500, 2500))
    with opened(path, hop_ns=3 * NS) as source:
        frames, _ = drain(source)
    # Frames at 0, 0.5, 1, 3.5, 4, 4.5, 7, 7.5, 8 ...: those after the gaps, 3.5 and 7, are not looked at.
    assert [frame.pts_ns / NS for frame in frames[:3]] == [0, 4.5, 7.5]
    assert [frame.discontinuity for frame in frames[:3]] == [False, True, True]


def test_a_truncated_file_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", frames=240, size=(160, 120), options={"movflags": "faststart"})
    with opened(truncate(path, 0.5)) as source:
        frames, statuses = drain(source)
    assert 60 < len(frames) < 200
    assert statuses[-1].state == "ended"
    assert statuses[-1].reason is not None and "it may be truncated" in statuses[-1].reason


def test_sound_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "both.mkv"
    make = (
        f"gst-launch-1.0 -q matroskamux name=mux ! filesink location={path} "
        "audiotestsrc num-buffers=60 ! vorbisenc ! mux. "
        "videotestsrc num-buffers=45 ! video/x-raw,width=64,height=48 ! x264enc ! mux."
    )
    subprocess.run(make.split(), check=True)
    for text in (str(path), f"filesrc location={path} ! decodebin"):
        with opened(text) as source:
            assert len(drain(source)[0]) == 45


def test_a_rotated_video_comes_upright() -> None:
    bars = "videotestsrc num-buffers=2 ! video/x-raw,format=RGB,width=64,height=48"
    with opened(bars) as source:
        plain = drain(source)[0][0].pixels
    with opened(f"{bars} ! taginject tags=image-orientation=rotate-90") as source:
        turned = drain(source)[0][0].pixels
    assert turned.shape == (64, 48, 3)
    assert np.array_equal(turned, np.rot90(plain, -1))


# -- what cannot be opened


def test_what_has_no_video_is_refused_in_one_line(tmp_path: Path) -> None:
    sound = write_audio(tmp_path / "sound.m4a")
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    for path, message in (
        (sound, "no video in .*sound.m4a"),
        (text, "not a video that GStreamer can read: This appears to be a text file"),
    ):
        with pytest.raises(SourceError, match=message) as caught, opened(path):
            pass
        assert "\n" not in str(caught.value)


def test_an_unfinished_recording_is_refused_at_once(tmp_path: Path) -> None:
    path = truncate(write_video(tmp_path / "unfinished.mp4"), 0.5)  # its index would have come last
    for _ in range(20):  # in one of four GStreamer's own error is lost
        with pytest.raises(SourceError, match="no playable stream"):
            open_source(parse_source(str(path)), hop_ns=None, stall_s=1)


def test_a_server_that_is_not_there_is_refused_at_once() -> None:
    port = free_port()
    for scheme in ("rtsp", "http", "rtmp"):
        with pytest.raises(SourceError, match="connection refused") as caught:
            open_source(parse_source(f"{scheme}://user:hunter2@127.0.0.1:{port}/a/b"), hop_ns=None)
        assert "hunter2" not in str(caught.value)


def test_silence_is_refused_after_a_while() -> None:
    port = free_port(socket.SOCK_DGRAM)
    with pytest.raises(SourceError, match=f"udp://127.0.0.1:{port}: no picture came within 1 s"):
        open_source(parse_source(f"udp://127.0.0.1:{port}"), hop_ns=None, stall_s=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test:zork", "could not set property"),
        ("videotestsrc ! nosuchelement", 'no element "nosuchelement"'),
        ("videotestsrc ! x264enc", "could not link"),
        ("videotestsrc num-buffers=0 ! identity", "ended before its first picture"),
        (
            "fakesrc num-buffers=9 sizetype=fixed sizemax=49152 format=time "
            "! video/x-raw,format=RGB,width=128,height=128,framerate=0/1",
            "no timestamps: add do-timestamp=true",
        ),
    ],
)
def test_a_description_that_gives_no_pictures_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(parse_source(text), hop_ns=None)
    assert "\n" not in str(caught.value)


def in_a_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_missing_bindings_and_decoders_are_named(videos: Callable[[str], Path]) -> None:
    without_gi = (
        "import sys; sys.modules['gi'] = None\ntry: import stream.ingest\nexcept Exception as e: print(repr(e))"
    )
    assert "SourceError" in (said := in_a_fresh_process(without_gi))
    assert "apt install python3-gi" in said
    open_h265 = (
        "from stream.ingest import open_source; from stream.sources import parse_source\n"
        f"try: open_source(parse_source({str(videos('h265.mp4'))!r}), hop_ns=None)\n"
        "except Exception as e: print(repr(e))"
    )
    said = in_a_fresh_process(open_h265, GST_PLUGIN_FEATURE_RANK="avdec_h265:NONE,libde265dec:NONE")
    assert "SourceError" in said
    assert "no decoder for H.265" in said


def test_threads_that_start_together_see_the_same_classes() -> None:
    """Of a probe's information there is no type in C: PyGObject makes its class anew for each that asks at once."""
    together = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from threading import Barrier\n"
        "import stream.pipeline; from gi.repository import Gst, GstVideo\n"
        "sys.setswitchinterval(1e-6); all_here = Barrier(8)\n"
        "def ask(_):\n"
        "    all_here.wait()\n"
        "    return Gst.PadProbeInfo, Gst.ReferenceTimestampMeta, GstVideo.VideoMeta\n"
        "with ThreadPoolExecutor(8) as threads: print(len(set(threads.map(ask, range(8)))))"
    )
    assert [in_a_fresh_process(together).strip() for _ in range(3)] == ["1"] * 3


# -- live

FAST = "videotestsrc is-live=true num-buffers={} ! video/x-raw,width=64,height=48,framerate=500/1"


def test_a_live_source_drops_the_oldest_for_a_slow_reader_and_counts_exactly() -> None:
    with opened(FAST.format(300)) as source:
        assert source.live
        frames: list[Frame] = []
        while not source.ended:
            seen = source.taken
            wait_for(lambda seen=seen: source.taken >= min(seen + 20, 300))  # type: ignore[misc]
            taken = source.taken
            if isinstance(item := source.read(1), Frame):
                frames.append(item)
                assert item.index >= taken - 10  # fresh, however long ago the last read was
        assert source.taken == 300
        assert source.dropped == 300 - len(frames)
    assert 20 <= source.dropped < 300
    indices = [frame.index for frame in frames]
    assert indices[-1] == 299  # the newest is kept
    assert indices == sorted(set(indices))
    assert not any(frame.discontinuity for frame in frames)


def test_a_live_source_is_not_held_up_by_what_comes_after_the_decoder() -> None:
    with opened(FAST.format(200)) as source:
        assert source._pipeline is not None
        sink_pad = source._pipeline._sink.get_static_pad("sink")
        block = sink_pad.add_probe(Gst.PadProbeType.BLOCK | Gst.PadProbeType.BUFFER, lambda *_: Gst.PadProbeReturn.OK)
        wait_for(lambda: source.taken == 200)
        sink_pad.remove_probe(block)
        frames, _ = drain(source)
        assert frames[-1].index == 199  # the newest is kept
        assert len(frames) + source.dropped == 200
        assert source.dropped > 100


def test_a_live_source_that_nobody_reads_does_not_pile_up() -> None:
    with opened(FAST.format(700)) as source:
        wait_for(lambda: source.taken == 700)
        assert len(source._flight) <= 256
        frames, _ = drain(source)
        assert len(frames) + source.dropped == 700
        assert len(frames) <= 6


def test_a_break_is_not_lost_with_the_frame_that_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(FAST.format(100)) as source:
        honest = source._clock.tick
        monkeypatch.setattr(source._clock, "tick", lambda *at: replace(honest(*at), discontinuity=source.decoded == 50))
        wait_for(lambda: source.taken == 100)
        frames, _ = drain(source)
    assert 49 not in [frame.index for frame in frames]
    assert [frame.discontinuity for frame in frames].count(True) == 1


def test_the_senders_clock_counts_if_it_is_plausible() -> None:
    reference = Gst.Caps.from_string("timestamp/x-ntp")
    with opened("test:") as source:
        pipeline, now_ns = source._pipeline, time.time_ns()
        assert pipeline is not None

        def captured_ns(off_ns: int) -> int:
            buffer = Gst.Buffer.new()
            buffer.add_reference_timestamp_meta(reference, now_ns + off_ns + 2_208_988_800 * NS, Gst.CLOCK_TIME_NONE)
            return pipeline.captured_ns(buffer, 0)

        assert captured_ns(-NS) == now_ns - NS
        for off_ns in (-3600 * NS, 3600 * NS):
            assert abs(captured_ns(off_ns) - now_ns) < NS


def test_rtsp_frames_carry_the_senders_clock() -> None:
    port = free_port()
    with camera(port) as _, opened(f"rtsp://127.0.0.1:{port}/cam") as source:
        told: list[int | None] = []
        pipeline = source._pipeline
        assert pipeline is not None
        honest = pipeline.captured_ns

        def watch(buffer: Any, running_ns: int) -> int:
            meta = buffer.get_reference_timestamp_meta(pipeline._ntp)
            told.append(meta and meta.timestamp - 2_208_988_800 * NS)
            return honest(buffer, running_ns)

        pipeline.captured_ns = watch  # type: ignore[method-assign]
        frames, _ = read_until(source, lambda frames, _: any(told) and told[-1] == frames[-1].wall_ns)
    # Before the first report of the sender the local clock serves: the same time, to what a camera needs.
    walls = [frame.wall_ns - frame.pts_ns for frame in frames]
    assert max(walls) - min(walls) < NS // 4


def test_the_test_pattern_is_live() -> None:
    before_ns = time.time_ns()
    with opened("test:ball", hop_ns=NS // 10) as source:
        frames, statuses = read_until(source, lambda frames, _: len(frames) == 5)
    assert (source.live, source.duration_ns) == (True, None)
    assert statuses == [SourceStatus("connected")]
    assert frames[0].pixels.shape == (360, 640, 3)
    assert [frame.pts_ns // (NS // 10) for frame in frames] == [0, 1, 2, 3, 4]
    assert all(before_ns < frame.wall_ns <= time.time_ns() for frame in frames)


def test_a_description_that_ends_is_over_even_if_live() -> None:
    with opened(FAST.format(20)) as source:
        frames, statuses = drain(source)
    assert frames[-1].index == 19
    assert statuses[-1] == SourceStatus("ended")
    assert source.read(5) is None
    assert source.reconnects == 0


def test_rtsp_survives_the_death_of_its_server() -> None:
    port = free_port()
    with camera(port, "--size", "320x240") as server, opened(f"rtsp://127.0.0.1:{port}/cam") as source:
        before, told = read_until(source, lambda frames, _: len(frames) == 20)
        assert told == [SourceStatus("connected")]
        server.send_signal(signal.SIGKILL)
        server.wait()
        killed_ns = time.monotonic_ns()
        rest, told = read_until(source, lambda _, statuses: len(statuses) == 2)  # the second try fails too
        before += rest
        assert [status.state for status in told] == ["reconnecting"] * 2
        assert [status.retry_s for status in told] == [0.5, 1.0]
        assert all(status.reason for status in told)
        with camera(port, "--size", "162x122"):
            after, told = read_until(source, lambda frames, _: len(frames) == 20)
        assert told[-1] == SourceStatus("connected")
        assert source.reconnects == 1
        assert source.taken >= 40
    assert {frame.pixels.shape for frame in before} == {(240, 320, 3)}
    assert {frame.pixels.shape for frame in after} == {(122, 162, 3)}
    assert [frame.discontinuity for frame in after] == [True] + [False] * 19
    assert not any(frame.discontinuity for frame in before)
    pts = [frame.pts_ns for frame in before + after]
    assert pts == sorted(set(pts))
    # The clock went on by the time that passed.
    assert after[0].pts_ns - before[-1].pts_ns == after[0].arrival_ns - before[-1].arrival_ns
    assert after[0].arrival_ns > killed_ns


def test_a_stalled_source_is_reconnected_and_reads_stay_short() -> None:
    port = free_port()
    with camera(port) as server, opened(f"rtsp://127.0.0.1:{port}/cam", stall_s=1) as source:
        read_until(source, lambda frames, _: len(frames) == 5)
        server.send_signal(signal.SIGSTOP)  # the connection stays up, nothing comes
        _, told = read_until(source, lambda _, statuses: len(statuses) == 1)
        assert told == [SourceStatus("reconnecting", "no picture for 1 s", 0.5)]
        start = time.monotonic()
        assert source.read(0.1) is None
        assert time.monotonic() - start < 0.4
        assert source._pipeline is None  # nothing is tried before its time
        server.send_signal(signal.SIGCONT)
        frames, _ = read_until(source, lambda frames, _: len(frames) == 5)
        assert frames[0].discontinuity


def test_rtsp_that_ends_is_opened_again(videos: Callable[[str], Path]) -> None:
    port = free_port()
    with camera(port, "--file", videos("h264.mp4")), opened(f"rtsp://127.0.0.1:{port}/cam") as source:
        frames, told = read_until(source, lambda _, statuses: len(statuses) == 3)
    assert [status.state for status in told] == ["connected", "reconnecting", "connected"]
    assert told[1].reason == "the far end closed the stream"
    assert len(frames) + source.dropped == 45


def test_close_does_not_hang_whatever_the_source_does() -> None:
    port = free_port()
    with camera(port) as server:
        source = open_source(parse_source(f"rtsp://127.0.0.1:{port}/cam"), hop_ns=None)
        read_until(source, lambda frames, _: len(frames) == 2)
        server.kill()
        read_until(source, lambda _, statuses: len(statuses) >= 3)  # waits 2 s before the next try
        reader = threading.Thread(target=source.read, args=(60,))
        reader.start()
        start = time.monotonic()
        source.close()
        reader.join(5)
        assert not reader.is_alive()
        assert time.monotonic() - start < 1
        assert source.read(5) is None
        source.close()


def test_a_pipeline_stops_while_its_first_frame_waits() -> None:
    asked: list[int] = []
    pipeline = Pipeline(parse_source("test:"))
    pipeline.start(lambda _pipeline, _buffer, running_ns: bool(asked.append(running_ns)))  # type: ignore[func-returns-value]
    assert pipeline.first.wait(10)
    pipeline.stop()
    assert asked == []


def test_udp_carries_mpeg_ts() -> None:
    port = free_port(socket.SOCK_DGRAM)
    sender = (
        "gst-launch-1.0 -q videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1 ! x264enc "
        f"tune=zerolatency speed-preset=ultrafast key-int-max=10 ! mpegtsmux alignment=7 "
        f"! udpsink host=127.0.0.1 port={port}"
    )
    with process(*sender.split()), opened(f"udp://127.0.0.1:{port}") as source:
        frames, _ = read_until(source, lambda frames, _: len(frames) == 20)
    assert source.live
    assert frames[-1].pts_ns - frames[0].pts_ns == pytest.approx(19 * NS / 30, rel=0.2)


def test_http_gives_a_recording_or_a_clear_line(videos: Callable[[str], Path]) -> None:
    path = videos("h264.mp4")
    with http_server(path.parent) as address:
        with opened(f"{address}/{path.name}") as source:
            assert (source.live, source.duration_ns) == (False, 1_500_000_000)
            assert len(drain(source)[0]) == 45
        with pytest.raises(SourceError, match=r"cannot open .*nothing.mp4: File not found \(404\)") as caught:
            open_source(parse_source(f"{address}/nothing.mp4"), hop_ns=None)
        assert "\n" not in str(caught.value)


LIVE_HLS = (
    "gst-launch-1.0 -q videotestsrc is-live=true ! video/x-raw,width=160,height=120,framerate=30/1 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=30 "
    "! hlssink2 target-duration=1 playlist-length=5 max-files=20 "
    "location={folder}/%05d.ts playlist-location={folder}/list.m3u8"
)


def test_recorded_hls_is_a_recording(tmp_path: Path) -> None:
    write_video(tmp_path / "list.m3u8", frames=120, options={"hls_time": "1", "hls_list_size": "0"})
    with http_server(tmp_path) as address, opened(f"{address}/list.m3u8") as source:
        assert not source.live
        frames, _ = drain(source)
    assert len(frames) == 120
    assert frames[-1].pts_ns == pytest.approx(119 * NS / 30, abs=NS // 100)


def test_live_hls_is_live_and_paced(tmp_path: Path) -> None:
    with process(*LIVE_HLS.format(folder=tmp_path).split()), http_server(tmp_path) as address:
        wait_for(lambda: len(list(tmp_path.glob("*.ts"))) >= 5 and (tmp_path / "list.m3u8").exists())
        with opened(f"{address}/list.m3u8", stall_s=5) as source:
            assert (source.live, source.duration_ns) == (True, None)
            frames, _ = read_until(source, lambda frames, _: len(frames) >= 60)
    assert source.dropped == 0  # a segment comes at once, but its frames one after another
    assert frames[-1].arrival_ns - frames[0].arrival_ns == pytest.approx(frames[-1].pts_ns, abs=NS // 2)


# -- for hours


def test_memory_does_not_grow_with_frames_or_reconnects(videos: Callable[[str], Path]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def watch(frames: int) -> None:
        with opened(f"videotestsrc num-buffers={frames} ! video/x-raw,format=RGB,width=1280,height=720") as source:
            assert len([None for item in source if isinstance(item, Frame)]) == frames

    watch(100)
    before = resident()
    watch(2000)  # 5.5 GB of pixels
    assert resident() - before < 60e6

    source = open_source(parse_source(str(videos("h264.mp4"))), hop_ns=None)
    pipeline, gone = weakref.ref(source._pipeline), weakref.ref(source)
    source.close()
    del source
    gc.collect()
    assert pipeline() is None and gone() is None


def test_a_bug_in_a_streaming_thread_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("test:") as source:
        monkeypatch.setattr(source._sampler, "take", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read_until(source, lambda _frames, _statuses: False)
