"""What `parse_source` makes of what users type."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.errors import SourceError
from stream.sources import SourceKind, mask, parse_source


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "My clip (1).mp4"
    path.write_bytes(b"not looked into")
    return path


def test_a_path_and_its_file_uri_are_the_same_source(clip: Path) -> None:
    by_path, by_uri = parse_source(str(clip)), parse_source(clip.as_uri())
    assert by_path.kind is by_uri.kind is SourceKind.FILE
    assert by_path.locator == by_uri.locator == clip.as_uri()
    assert by_path.path == by_uri.path == clip
    assert by_path.name == by_uri.name == "My-clip-1"


def test_a_relative_path_becomes_absolute(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clip.parent)
    assert parse_source(clip.name).locator == clip.as_uri()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("http://example.org/live/cam1.m3u8?token=abc", "example.org-live-cam1"),
        ("https://example.org:8443/a/b.mp4", "example.org-8443-a-b.mp4"),
        ("rtsp://cam.local/stream1", "cam.local-stream1"),
        ("rtsps://cam.local/stream1", "cam.local-stream1"),
        ("rtmp://host/app/play", "host-app-play"),
        ("srt://10.0.0.7:9000?passphrase=0123456789", "10.0.0.7-9000"),
        ("srt://:9000?mode=listener", "any-9000"),
        ("udp://127.0.0.1:5000", "127.0.0.1-5000"),
        ("RTSP://Cam.Local/A", "cam.local-A"),
    ],
)
def test_network_sources_are_named_by_host_port_and_path(text: str, name: str) -> None:
    source = parse_source(text)
    assert (source.kind, source.locator, source.name) == (SourceKind.NETWORK, text, name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:hunter2@cam/1", "rtsp://admin:***@cam/1"),
        ("rtsp://hunter2@cam/1", "rtsp://***@cam/1"),
        ("rtsp://admin:hunter2@x@cam/1", "rtsp://admin:***@cam/1"),
        ("https://h/v.m3u8?a=1&token=hunter2&b=2", "https://h/v.m3u8?a=1&token=***&b=2"),
        ("srt://h:1?passphrase=hunter2", "srt://h:1?passphrase=***"),
        (
            "rtspsrc location=rtsp://u:hunter2@h/1 user-pw=hunter2 ! decodebin",
            "rtspsrc location=rtsp://u:***@h/1 user-pw=*** ! decodebin",
        ),
        ('rtspsrc user-pw="hunter2 hunter2" ! decodebin', "rtspsrc user-pw=*** ! decodebin"),
    ],
)
def test_secrets_are_neither_shown_nor_in_the_name(text: str, shown: str) -> None:
    source = parse_source(text)
    assert source.shown == shown
    assert "hunter2" not in source.name
    assert source.locator == text  # what is opened keeps them


def test_masking_leaves_other_text_alone() -> None:
    assert mask("no @ to see: https://host/@user/v?monkeys=2") == "no @ to see: https://host/@user/v?monkeys=2"


def test_a_malformed_address_is_refused_without_showing_its_password() -> None:
    with pytest.raises(SourceError, match="%-encoded") as caught:
        parse_source("rtsp://admin:hun/ter2@cam/1")
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["test:", "test:ball"])
def test_test_patterns_are_live_descriptions(text: str) -> None:
    source = parse_source(text)
    assert source.kind is SourceKind.TEST
    assert "is-live=true" in source.locator
    assert "width=640,height=360,framerate=30/1" in source.locator
    assert source.name == ("test-ball" if text == "test:ball" else "test-smpte")


@pytest.mark.parametrize(
    "text", ["videotestsrc ! video/x-raw,width=64", "videotestsrc is-live=true", "filesrc location=a ! decodebin"]
)
def test_a_description_is_taken_as_it_is(text: str) -> None:
    source = parse_source(text)
    assert (source.kind, source.locator) == (SourceKind.LAUNCH, text)
    assert source.name == text.split()[0]


def test_a_device_goes_by_path_and_by_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    for text in ("/dev/video3", "v4l2:///dev/video3"):
        source = parse_source(text)
        assert (source.kind, source.locator) == (SourceKind.DEVICE, "v4l2:///dev/video3")
        assert source.name == "video3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no source given"),
        ("/nowhere/clip.mp4", "no such file: /nowhere/clip.mp4"),
        ("file:///nowhere/clip.mp4", "no such file"),
        ("/dev/video97", "no such device: /dev/video97"),
        ("ftp://host/clip.mp4", "ftp:// is none of"),
        ("test:a!b", "a test pattern is a word"),
        ("http:///clip.mp4", "names no host"),
        ("udp://127.0.0.1", "udp needs a port"),
        ("rtsp://cam:port/1", "host or port is malformed"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_what_cannot_be_a_source_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


def test_directories_and_empty_and_forbidden_files_are_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="is a directory"):
        parse_source(str(clip.parent))
    (empty := clip.parent / "empty.mp4").touch()
    with pytest.raises(SourceError, match="is empty"):
        parse_source(str(empty))
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may read everything
    with pytest.raises(SourceError, match="permission denied"):
        parse_source(str(clip))


@pytest.mark.parametrize("stem", ["日本", "..", "-.-", "é" * 300])
def test_names_are_safe_whatever_the_file_is_called(tmp_path: Path, stem: str) -> None:
    name = parse_source(f"test:{'a' * 300}").name if len(stem) > 100 else None
    if name is None:
        path = tmp_path / f"{stem}.mp4"
        path.write_bytes(b"x")
        name = parse_source(str(path)).name
    assert 0 < len(name) <= 64
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz-._ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert name.strip(".-") == name


def test_sources_and_clock_need_no_gi() -> None:
    code = "import sys; sys.modules['gi'] = None; import stream.sources, stream.clock"
    subprocess.run([sys.executable, "-c", code], check=True)
