"""Clips of `livemoments serve`, with cameras on RTSP: what they show, and what happens to them when something ends."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bench.camera import clips_folder, free_port
from bench.demo import MAN
from stream.deliver.websocket import Client
from tests.serve import ANSWER_S, Service, camera, check, config, follower, messages, of, resident_mb, until
from trainer.render import FPS, Kind, Segment, render

BALL = "a ball"
MAN_S = 6.0
"""When the man comes."""


def text(streams: Mapping[str, tuple[str, Sequence[str]]], folder: Path, more: str = "") -> str:
    """A config with clips: source and queries of each stream. A ball is open from the first window on."""
    tables = "\n".join(
        f"[streams.{name}]\nsource = {json.dumps(source)}\nqueries = [{', '.join(map(asked, queries))}]"
        for name, (source, queries) in streams.items()
    )
    clips = f"[clips]\nfolder = {json.dumps(str(folder))}\n{more}"
    return config({}, (), engine="", moments="", log="events.db", more=f"{tables}\n{clips}")


def asked(query: str) -> str:
    return json.dumps(query) if query == MAN else f'{{text = "{query}", threshold = 0.001}}'


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty room, 3 s of a man, an empty room."""
    path = tmp_path_factory.mktemp("clips") / "man.mp4"
    clip = Segment(Kind.CLIP, 3 * FPS, clips_folder() / "carphone_pristine.mp4")
    render([Segment(Kind.ROOM, round(MAN_S) * FPS), clip, Segment(Kind.ROOM, 9 * FPS)], path)
    return path


def file_of(folder: Path, data: dict[str, Any], key: str = "url") -> Path:
    return folder / Path(data["clip"][key]).name


def shown(path: Path) -> list[tuple[float, np.ndarray[Any, Any]]]:
    """Time in the file, and picture, of each frame that PyAV decodes."""
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).is_keyframe
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [(float(frame.time or 0), frame.to_ndarray(format="gray").astype(np.float32)) for frame in frames]


def test_clips_show_what_was_before_and_after_and_end_with_their_streams(tmp_path: Path, man: Path) -> None:
    folder, seen = tmp_path / "clips", tmp_path / "seen"
    ports = [free_port() for _ in range(3)]
    urls = [f"rtsp://127.0.0.1:{port}/cam" for port in ports]
    streams = {
        "man": (urls[0], (MAN,)),
        "dies": (urls[1], (BALL,)),
        "goes": (urls[2], (BALL,)),
        "last": (urls[2], (BALL,)),
        "raw": ("test:ball", (BALL,)),
    }
    with (
        camera(ports[0], "--file", man, "--loop"),
        camera(ports[1]) as dying,
        camera(ports[2], "--pattern", "smpte"),
        Service(tmp_path, text(streams, folder)) as service,
        follower(service, seen),
    ):
        for name in ("dies", "goes", "last", "raw"):
            until(lambda name=name: of(messages(seen), "opened", name), 20)  # type: ignore[misc]
        until(lambda: service.streams()["dies"]["clips"]["open"] == 1)
        time.sleep(3)
        dying.kill()
        until(lambda: of(messages(seen), "ready", "dies"))
        assert service.ask("remove_stream", stream="goes")["op"] == "stream_removed"
        until(lambda: of(messages(seen), "ready", "goes"))
        until(lambda: of(messages(seen), "ready", "man"))
        told = {name: stream["clips"] for name, stream in service.streams().items()}
        assert told["man"]["written"] == 1 and told["man"]["bytes"] > 10_000 and "reason" not in told["man"]
        assert told["dies"]["written"] == 1 and told["last"]["open"] == 1
        assert "raw" in told["raw"]["reason"] and not told["raw"]["open"] + told["raw"]["failed"]
        past = backfill(service, MAN)
        service.stop()
    events = check(tmp_path / "events.db", seen)

    (data,) = (each for each in of(events, "ready", "man"))
    clip, video = data["clip"], shown(file_of(folder, data))
    assert clip["complete"] and "missing" not in clip
    assert clip["start_s"] <= data["start_s"] - 5 and clip["end_s"] >= data["end_s"] + 5
    assert clip["bytes"] == sum(file_of(folder, data, key).stat().st_size for key in ("url", "thumbnail"))
    assert video[0][0] == 0 and clip["start_s"] + video[-1][0] == pytest.approx(clip["end_s"], abs=0.01)
    assert len(video) == pytest.approx(FPS * video[-1][0] + 1, abs=2)
    comes_s = next(at_s for at_s, picture in video if np.abs(picture - video[0][1]).mean() > 15)
    assert clip["start_s"] + comes_s == pytest.approx(data["start_s"], abs=1)  # a hop
    assert clip["start_s"] + comes_s == pytest.approx(MAN_S, abs=0.2)
    with av.open(str(file_of(folder, data, "thumbnail"))) as container:
        (small,) = container.decode(video=0)
        of_peak = min(video, key=lambda each: abs(clip["start_s"] + each[0] - data["peak_s"]))[1]
        assert small.width == 320 and abs(small.to_ndarray(format="gray").mean() - of_peak.mean()) < 10
    kinds = [event["type"].split(".")[-2] for event in past if event["data"]["moment_id"] == data["moment_id"]]
    assert (kinds[0], kinds[-2], kinds[-1], kinds.count("ready")) == ("opened", "closed", "ready", 1)

    for name, why in (("dies", "was interrupted"), ("goes", "was removed"), ("last", "the service ended")):
        (data,) = of(events, "ready", name)
        clip, video = data["clip"], shown(file_of(folder, data))
        assert not clip["complete"] and why in clip["missing"] and "before it are held" in clip["missing"]
        assert clip["start_s"] >= data["start_s"] and video[-1][0] > 3
    assert not of(events, "ready", "raw") and not list(folder.glob("*.part"))


def backfill(service: Service, query: str) -> list[dict[str, Any]]:
    """What a client that comes now is told of the past."""
    told = []
    with Client(service.url) as client:
        client.send({"op": "subscribe", "query": query, "stream": "man"})
        while (message := json.loads(client.receive(ANSWER_S) or b'{"op": "silence"}')).get("op") != "caught_up":
            assert message.get("op") != "silence"
            if "op" not in message:
                told.append(message)
    return told


def test_what_a_killed_service_was_writing_goes_at_its_next_start(tmp_path: Path) -> None:
    folder, seen, port = tmp_path / "clips", tmp_path / "seen", free_port()
    words = text({"cam": (f"rtsp://127.0.0.1:{port}/cam", (BALL,))}, folder, "after_s = 1")
    folder.mkdir()
    (folder / "mine.mp4.part").write_text("somebody else's")
    with camera(port):
        service = Service(tmp_path, words)
        with follower(service, seen):
            until(lambda: of(messages(seen), "opened"), 20)
            until(lambda: len(list(folder.glob("*Z.mp4*.part"))) == 2)
            time.sleep(1)
            service.kill()
            assert len(list(folder.glob("*Z.mp4*.part"))) == 2
            with Service(tmp_path, words) as again:
                until(lambda: again.streams()["cam"]["clips"]["open"] == 1, 20)
                time.sleep(1)
                again.stop()
    events = check(tmp_path / "events.db")
    first, second = of(events, "closed", "cam")
    assert first["interrupted"]
    assert [data["moment_id"] for data in of(events, "ready")] == [second["moment_id"]]
    left = {path.name for path in folder.iterdir()}
    (data,) = of(events, "ready")
    assert left == {"mine.mp4.part", *(file_of(folder, data, key).name for key in ("url", "thumbnail"))}


SOAK_MINUTES = float(os.environ.get("LIVEMOMENTS_SOAK_MINUTES", "20"))
SOAK_MB = 8
"""Clips take up to 1 MB here, and two are written at a time, each twice until it is whole."""
PERSON = "a person standing in a room"


@pytest.mark.soak
@pytest.mark.shared
@pytest.mark.timeout(round(60 * SOAK_MINUTES) + 300)
def test_clips_for_long_keep_to_their_budget_and_to_the_memory(tmp_path: Path, shared_data: Path) -> None:
    """People that come one by one, for ever. LIVEMOMENTS_SOAK_MINUTES says how long."""
    source, folder, seen, port = tmp_path / "people.mp4", tmp_path / "clips", tmp_path / "seen", free_port()
    original = shared_data / "clips" / "one-by-one-person-detection.mp4"
    with av.open(str(original)) as container:
        seconds = float(container.duration or 0) / av.time_base
    render([Segment(Kind.CLIP, int(seconds * FPS), original)], source)
    words = config(
        {"room": f"rtsp://127.0.0.1:{port}/cam"},
        (PERSON,),
        engine="",
        moments="",
        limits="history_s = 60",
        more=f'[clips]\nfolder = "{folder}"\nmax_mb = {SOAK_MB}',
    )
    memory_mb, bytes_seen = list[float](), list[int]()
    with camera(port, "--file", source, "--loop"), Service(tmp_path, words) as service, follower(service, seen):
        service.until_state("room", "connected")
        begin = time.monotonic()
        while (minute := (time.monotonic() - begin) / 60) < SOAK_MINUTES:
            time.sleep(0.5)
            bytes_seen.append(taken(folder))
            if minute >= min(5, SOAK_MINUTES / 4):
                memory_mb.append(resident_mb(service.process.pid))
        told = service.streams()["room"]
        service.stop()
    events = check(tmp_path / "events.db", seen)
    closed, ready = ([data["moment_id"] for data in of(events, kind)] for kind in ("closed", "ready"))
    assert told["clips"]["failed"] == 0 and told["reconnects"] == 0
    assert sorted(closed) == sorted(ready) and len(ready) >= SOAK_MINUTES
    # The first may have come as the service began, the last as it ended.
    assert all(data["clip"]["complete"] for data in of(events, "ready")[1:-1])
    assert max(bytes_seen) <= SOAK_MB << 20
    assert told["clips"]["bytes"] > 1.2 * (SOAK_MB << 20), "the budget was never used up"
    for data in of(events, "ready"):
        path = file_of(folder, data)
        if path.exists():
            assert data["clip"]["bytes"] > path.stat().st_size and len(shown(path)) > 5 * FPS
    kept = sorted(path.stem for path in folder.glob("*.mp4"))
    assert kept == sorted(data["clip"]["url"].split("/")[-1][:-4] for data in of(events, "ready"))[-len(kept) :]
    some = max(1, len(memory_mb) // 8)
    first, last = float(np.median(memory_mb[:some])), float(np.median(memory_mb[-some:]))
    print(f"{len(ready)} clips, {max(bytes_seen)} bytes at most, {first:.1f} MB of memory, {last:.1f} MB in the end")
    assert last < 1.02 * first, (first, last)


def taken(folder: Path) -> int:
    """Bytes of a folder from which files may go at any time."""
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
