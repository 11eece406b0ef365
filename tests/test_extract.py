"""Videos into features: held against frames picked by hand, and against the live detector on the same file."""

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kernels.bundle import EMBEDDED
from kernels.engine import Engine
from kernels.errors import InputError
from kernels.onnx_runtime import Graph
from kernels.preprocess import crop
from models.backbone import Backbone, load_backbone
from stream.detector import Detector
from stream.types import NS
from stream.window import Windower
from tests.media import Decoded, decode, frames_of, truncate, write_audio, write_video
from tests.test_clip import TINY, publish
from trainer import extract
from trainer.annotated import load_annotated
from trainer.windows import encode, watch

QUERIES = ["a dog catches the ball", "a woman opens the door and a man enters the room"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(TINY, tmp_path_factory.mktemp("clip"))


def annotate(path: Path, durations: dict[str, float], queries: list[str] = QUERIES) -> Path:
    """Every query on every video; the first second is true."""
    lines = [
        {"qid": f"{vid}-{i}", "query": query, "vid": vid, "duration": duration, "relevant_windows": [[0, 1]]}
        for vid, duration in durations.items()
        for i, query in enumerate(queries)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(folder: Path, backbone: str | Path, *more: str) -> list[str]:
    where = ["--videos", str(folder), "--annotations", str(folder / "truth.jsonl"), "--out", str(folder / "out")]
    return [*where, "--backbone", str(backbone), "--depth", "2", "--device", "cpu", *more]


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    extract.add_arguments(parser)
    return extract.run(parser.parse_args(arguments))


def by_hand(video: Decoded, backbone: Backbone, hop_s: float) -> dict[int, torch.Tensor]:
    """Window -> layers, of a video without gaps: the first frame past the middle of every hop, and plain means."""
    chosen: dict[int, torch.Tensor] = {}
    for at, pixels in zip(video.times, video.pixels, strict=True):
        slot = max(0, int((float(at) - hop_s / 2) // hop_s))
        if slot not in chosen:
            small = crop(pixels, resize=backbone.resize, size=backbone.size)
            chosen[slot] = backbone.image(torch.from_numpy(small.copy())[None])[0][0]
    per_window = round(2 / hop_s)
    last = max(chosen) - per_window + 1
    windows = range(max(last, 0) + 1)
    return {t: torch.stack([chosen[s] for s in range(t, t + per_window) if s in chosen]).mean(0) for t in windows}


@pytest.mark.parametrize("hop_s", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("steps_ms", [None, (33, 33, 50, 17, 100, 33, 40, 7, 250, 33)])
def test_a_window_is_the_mean_of_the_frames_nearest_the_middles_of_its_hops(
    tmp_path: Path, clip: Path, hop_s: float, steps_ms: tuple[int, ...] | None
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=170, steps_ms=steps_ms, size=(96, 64))
    video = decode(path)
    annotate(tmp_path / "truth.jsonl", {"a": float(video.times[-1])})
    assert run(command(tmp_path, clip, "--hop", str(hop_s), "--batch", "3")) == 0
    found = load_file(tmp_path / "out" / "video" / "a.safetensors")
    backbone = load_backbone(str(clip), 2)
    expected = by_hand(video, backbone, hop_s)
    assert found["counted"].all() and len(found["counted"]) == len(expected)
    assert found["layers"].shape[1:] == (2, 1 + backbone.patches, backbone.video_width)
    assert found["layers"].dtype == found["embedding"].dtype == np.float16
    for t, layers in expected.items():
        np.testing.assert_allclose(found["layers"][t], layers.numpy(), rtol=2e-3, atol=2e-3)


class EngineTower(torch.nn.Module):
    """The embedded engine in the place of a backbone's image tower: lite's own takes half a minute to make."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph(EMBEDDED / "image.onnx")

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.from_numpy(self.graph(crops=crops.numpy())["pooled"])
        return pooled[:, None, None], pooled


def test_features_are_those_of_the_live_detector(tmp_path: Path, clip: Path) -> None:
    """Also where the recording has a gap, which windows do not span."""
    steady = write_video(tmp_path / "steady.mp4", frames=150)
    gap = write_video(tmp_path / "gap.mp4", frames=33, steps_ms=(40,) * 9 + (5300,))
    engine, hop_ns, cpu = Engine(zero_shot=True), NS // 2, torch.device("cpu")
    sizes = {"resize": engine.manifest.image_resize, "size": engine.manifest.image_size}
    backbone = replace(load_backbone(str(clip), 2), image=EngineTower())
    for path in (steady, gap):
        windower, detector = Windower("live", hop_ns), Detector(engine, "live", hop_ns)
        windows = [window for frame in frames_of(path, hop_ns) for window in windower.push(frame)] + windower.drain()
        seen = list(watch(path, hop_ns, **sizes))
        assert [window.index for window in seen] == [window.index for window in windows]
        assert [window.discontinuity for window in seen] == [window.discontinuity for window in windows]
        cropped = []
        for live, own in zip(windows, seen, strict=True):
            frames = tuple(replace(frame, pixels=crop(frame.pixels, **sizes)) for frame in live.frames)
            cropped.append(replace(live, frames=frames))
            for a, b in zip(frames, own.frames, strict=True):
                assert abs(a.pts_ns - b.pts_ns) <= 1  # GStreamer rounds here, and cuts there
                assert np.abs(a.pixels.astype(int) - b.pixels).mean() <= 3  # two converters from YUV
        layers, embedding, counted = encode(cropped, backbone, cpu, hop_ns, batch=4)
        assert np.flatnonzero(counted).tolist() == [window.index for window in windows]
        assert counted.all() == (path is steady)
        assert not layers[~counted].any() and not embedding[~counted].any()
        for window in windows:
            pooled = detector.features(window).pooled
            np.testing.assert_allclose(embedding[window.index], pooled, rtol=2e-3, atol=1e-5)
            np.testing.assert_array_equal(layers[window.index, 0, 0], embedding[window.index])


@pytest.mark.parametrize("size", [(1280, 720), (640, 360)])
def test_colours_without_a_tag_are_those_of_the_live_path(tmp_path: Path, size: tuple[int, int]) -> None:
    """HD is BT.709 and SD is BT.601 where a file does not say; the other one turns this green visibly."""
    path = tmp_path / "flat.mp4"
    pixels = np.full((size[1], size[0], 3), (40, 160, 70), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    live = next(iter(frames_of(path, NS))).pixels[100, 100].astype(int)
    own = next(iter(watch(path, NS, resize=64, size=64))).frames[0].pixels[20, 20].astype(int)
    assert np.abs(live - own).max() <= 3


def test_texts_are_kept_without_padding_as_the_backbone_reads_them(tmp_path: Path, clip: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=60, size=(64, 64))
    annotate(tmp_path / "truth.jsonl", {"a": 2.0}, [QUERIES[0], f"  {QUERIES[1]}\t "])
    annotate(tmp_path / "val.jsonl", {"b": 2.0})
    write_video(tmp_path / "b.mkv", frames=60, size=(64, 64))
    assert (
        run(command(tmp_path, clip, "--annotations", str(tmp_path / "truth.jsonl"), str(tmp_path / "val.jsonl"))) == 0
    )
    dataset = load_annotated({"train": tmp_path / "truth.jsonl", "val": tmp_path / "val.jsonl"}, [tmp_path / "out"])
    backbone = load_backbone(str(clip), 2)
    for query in (QUERIES[0], f"  {QUERIES[1]}\t "):
        layers, embedding = backbone.text(*backbone.tokenize([" ".join(query.split())]))
        text = dataset.text(query)
        np.testing.assert_allclose(text.layers, layers[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(text.embedding, embedding[0].numpy(), rtol=1e-4, atol=1e-5)
    assert dataset.hop_s == 1.0 and dataset.backbone == str(clip.resolve()) and dataset.floor == backbone.floor
    video = dataset.video("b")
    assert video.embedding.shape == (len(video.layers), backbone.embedding)
    assert all(sample.counted.all() for split in dataset.samples.values() for sample in split)


def turn(path: Path) -> Path:
    """Say in an .mp4 that it is to be shown turned right by 90 degrees: the matrix of its track header."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(data)
    return path


def test_a_rotated_video_is_seen_upright_as_live(tmp_path: Path) -> None:
    path = turn(write_video(tmp_path / "a.mp4", frames=60, size=(96, 64)))
    upright = next(frames_of(path, NS)).pixels
    assert upright.shape == (96, 64, 3)
    seen = next(watch(path, NS, resize=64, size=64)).frames[0].pixels
    np.testing.assert_allclose(seen.astype(int), crop(upright, resize=64, size=64).astype(int), atol=8)


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, clip: Path) -> None:
    vids = {f"v{i}": 4.0 for i in range(8)}
    for vid in vids:
        write_video(tmp_path / f"{vid}.mp4", frames=120, size=(320, 240))
    annotate(tmp_path / "truth.jsonl", vids)
    out = tmp_path / "out"
    script = "import sys; from tests.test_extract import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, *command(tmp_path, clip)], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("video/*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.safetensors")}
    assert 2 <= len([path for path in before if path.parent.name == "video"]) < len(vids)
    (out / "video" / ".v7.safetensors.part").write_bytes(b"half a file")
    assert run(command(tmp_path, clip)) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    assert sorted(path.stem for path in out.glob("video/*.safetensors")) == sorted(vids)
    assert not [*out.glob("*/.*.part"), *out.glob(".*.part")]
    dataset = load_annotated({"train": tmp_path / "truth.jsonl"}, [out])
    assert {dataset.video(vid).layers.shape[0] for vid in vids} == {3}


def test_broken_videos_are_named_and_the_others_go_on(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "good.mp4", frames=60, size=(64, 64))
    truncate(write_video(tmp_path / "cut.mp4", frames=60, size=(64, 64)), 0.5)
    truncate(write_video(tmp_path / "short.mkv", frames=900, size=(64, 64)), 0.2)
    write_audio(tmp_path / "deaf.mp4")
    write_video(tmp_path / "twice.mp4", frames=60, size=(64, 64))
    write_video(tmp_path / "twice.mkv", frames=60, size=(64, 64))
    (tmp_path / "[red].mp4").write_bytes(b"no video at all")
    durations = {"cut": 2.0, "short": 30.0, "deaf": 2.0, "gone": 2.0, "twice": 2.0, "[red]": 2.0, "good": 2.0}
    annotate(tmp_path / "truth.jsonl", durations)
    assert run(command(tmp_path, clip)) == 2
    assert [path.stem for path in (tmp_path / "out" / "video").glob("*.safetensors")] == ["good"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told[:6]] == ["cut", "short", "deaf", "gone", "twice", "[red]"]
    for line, reason in zip(told, ("Invalid data", "another hop", "no video", "no video of that name"), strict=False):
        assert reason in line
    assert "twice.mkv, twice.mp4" in told[4]
    assert told[-2].endswith("1 of 7 videos, 2 texts")
    assert told[-1] == "failed: cut, short, deaf, gone, twice, [red]"
    assert run(command(tmp_path, clip)) == 2  # and again: nothing is taken for finished


def test_a_folder_of_other_features_is_refused(tmp_path: Path, clip: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=60, size=(64, 64))
    annotate(tmp_path / "truth.jsonl", {"a": 2.0})
    assert run(command(tmp_path, clip)) == 0
    for more in (["--hop", "0.5"], ["--depth", "3"], ["--backbone", "lite"]):
        with pytest.raises(InputError, match=r"out holds backbone .* depth 2, hop 1 s, not .*: name another folder"):
            run(command(tmp_path, clip, *more))
    (tmp_path / "out" / "features.json").write_text("{")
    with pytest.raises(InputError, match=r"features.json cannot be read"):
        run(command(tmp_path, clip))


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, clip: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=60, size=(64, 64))
    annotate(tmp_path / "truth.jsonl", {"a": 2.0})
    with extract._folder(tmp_path / "out"), pytest.raises(InputError, match="another"):
        run(command(tmp_path, clip))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--hop", "0.7"], "does not divide"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--depth", "99"], "layers"),
        (["--videos", "nowhere"], "nowhere: cannot be read as a folder of videos: No such file"),
        (["--annotations", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--out", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path, clip: Path, more: list[str], line: str) -> None:
    annotate(tmp_path / "truth.jsonl", {"a": 2.0})
    with pytest.raises(InputError, match=line) as caught:
        run(command(tmp_path, clip, *more))
    assert "\n" not in str(caught.value)


def test_a_text_too_long_is_named_by_its_line(tmp_path: Path, clip: Path) -> None:
    annotate(tmp_path / "truth.jsonl", {"a": 2.0}, ["a dog", "a dog " * 50])
    with pytest.raises(InputError, match=r"truth.jsonl:2: text of \d+ tokens"):
        run(command(tmp_path, clip))
