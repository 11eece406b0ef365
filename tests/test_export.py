"""Exports of a stream's moments: each read back by its own library, from a log on the disk and from a server."""

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import opentimelineio as otio
import pytest
import webvtt

from livemoments import main
from stream.deliver.log import EventLog
from stream.events import encode, rfc3339
from stream.export.formats import TYPES, export, render
from stream.export.moments import Wanted
from stream.types import NS, Event, Kind, Moment
from tests.test_events import EPOCH_NS, query, status
from trainer.metrics import Prediction, read_jsonl

CAT, ODD = query("a cat"), query("a <b>dog</b> --> & co")
SECOND_RUN_NS = EPOCH_NS + 3600 * NS + 123_456_789


def moment(of: object, seq: int, start_s: float, end_s: float, score: float = 0.75, epoch_ns: int = EPOCH_NS) -> Event:
    """A closed moment on the stream `door`."""
    asked = ODD if of is ODD else CAT
    start_ns, end_ns = round(start_s * NS), round(end_s * NS)
    name = f"{asked.id}@{rfc3339(epoch_ns + start_ns)}"
    told = Moment(name, "door", asked.id, start_ns, end_ns, (start_ns + end_ns) // 2, score)
    return Event(Kind.CLOSED, "door", seq, epoch_ns, epoch_ns + end_ns + 2 * NS, asked, told, 0.5, 1_000_000)


RECORDED = [
    moment(CAT, 1, 1, 3.5, 0.9123),
    moment(ODD, 1, 2, 2),  # over where it began
    moment(CAT, 2, 7, 11.25, 0.6),
    moment(CAT, 3, 3600.5, 3605),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of the stream `door`, a recording, and of another."""
    path = tmp_path / "events.db"
    log = EventLog(path)
    opened = replace(RECORDED[0], kind=Kind.OPENED, seq=90)
    log.append([status(1, "yard"), opened, *RECORDED, replace(RECORDED[2], stream="yard")])
    log.append([replace(opened, seq=91, moment=replace(opened.moment, id="open", end_ns=None))])  # type: ignore[type-var]
    log.close()
    return path


def exported(path: Path, kind: str, *more: str, stream: str = "door") -> str:
    out = path.with_name(f"out.{kind}")
    assert main(["export", str(path), "--stream", stream, "--format", kind, "--out", str(out), *more]) == 0
    return out.read_text("utf-8")


def refused(capsys: pytest.CaptureFixture[str], source: object, *more: str, stream: str = "door") -> str:
    capsys.readouterr()
    assert main(["export", str(source), "--stream", stream, "--format", "vtt", "--out", "-", *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_subtitles_say_when_and_what(path: Path) -> None:
    document = webvtt.from_string(exported(path, "vtt"), strict=True)
    assert [(cue.identifier, cue.start, cue.end, unescape(cue.raw_text)) for cue in document.captions] == [
        (RECORDED[0].moment and RECORDED[0].moment.id, "00:00:01.000", "00:00:03.500", "a cat 0.91"),
        (RECORDED[1].moment and RECORDED[1].moment.id, "00:00:02.000", "00:00:02.001", f"{ODD.text} 0.75"),
        (RECORDED[2].moment and RECORDED[2].moment.id, "00:00:07.000", "00:00:11.250", "a cat 0.60"),
        (RECORDED[3].moment and RECORDED[3].moment.id, "01:00:00.500", "01:00:05.000", "a cat 0.75"),
    ]
    assert document.header_comments == [f"Moments of door. Times count from {rfc3339(EPOCH_NS)}."]


def test_a_timeline_has_a_track_a_query(path: Path) -> None:
    timeline = otio.adapters.read_from_string(exported(path, "otio"))
    assert (timeline.name, timeline.global_start_time) == ("door", otio.opentime.RationalTime(0, 25))
    tracks = {track.name: track for track in timeline.tracks}
    assert set(tracks) == {CAT.text, ODD.text}
    clips = list(tracks[CAT.text].find_clips())
    ranges = [clip.range_in_parent() for clip in clips]
    found = [second for each in ranges for second in (each.start_time.to_seconds(), each.duration.to_seconds())]
    assert found == pytest.approx([1, 2.5, 7, 4.25, 3600.5, 4.5], abs=1 / 25)
    assert all(isinstance(clip.media_reference, otio.schema.MissingReference) for clip in clips)
    told = clips[0].metadata["livemoments"]
    assert (told["moment_id"], told["score"]) == (RECORDED[0].moment and RECORDED[0].moment.id, 0.9123)
    assert (told["query"], told["start"]) == ("a cat", rfc3339(EPOCH_NS + NS))
    (marker,) = clips[0].markers
    assert (marker.name, marker.marked_range.start_time.to_seconds()) == ("peak 0.91", pytest.approx(1.25, abs=0.021))
    assert next(iter(tracks[ODD.text].find_clips())).duration().value == 1  # an editor shows no less


def test_the_jsonl_of_the_field_is_read_by_its_evaluator(path: Path) -> None:
    exported(path, "jsonl")
    cat, odd = read_jsonl(path.with_name("out.jsonl"), Prediction)
    assert cat.windows.tolist() == [[1, 3.5, 0.9123], [3600.5, 3605, 0.75], [7, 11.25, 0.6]]
    assert len(cat.saliency) == 0
    assert odd.windows.tolist() == [[2, 2, 0.75]]
    row = json.loads(path.with_name("out.jsonl").read_text().splitlines()[0])
    assert (row["qid"], row["query"], row["vid"], row["origin"]) == (1, "a cat", "door", rfc3339(EPOCH_NS))


def test_a_live_stream_counts_from_its_first_moment() -> None:
    """Two runs of a service: both begin to count at 0."""
    with_log = [moment(CAT, 1, 50, 60), moment(CAT, 2, 10, 12, epoch_ns=SECOND_RUN_NS)]
    log = EventLog(None)
    log.append(with_log)
    document = webvtt.from_string(export(log, "door", "vtt").decode(), strict=True)
    assert [(cue.start, cue.end) for cue in document.captions] == [
        ("00:00:00.000", "00:00:10.000"),
        ("00:59:20.123", "00:59:22.123"),
    ]
    assert rfc3339(EPOCH_NS + 50 * NS) in document.header_comments[0]
    timeline = otio.adapters.read_from_string(export(log, "door", "otio").decode())
    assert timeline.global_start_time.to_time_string()[:8] == rfc3339(EPOCH_NS + 50 * NS)[11:19]
    (row,) = export(log, "door", "jsonl").splitlines()
    assert json.loads(row)["pred_relevant_windows"] == [[0, 10, 0.75], [3560.123, 3562.123, 0.75]]
    log.close()


def test_a_moment_that_is_told_again_is_as_it_was_told_last() -> None:
    again = replace(RECORDED[0], seq=9, moment=replace(RECORDED[0].moment, score=0.5))  # type: ignore[type-var]
    text = render([encode(each, "run") for each in (*RECORDED, again)], "door", "vtt", Wanted()).decode()
    assert "a cat 0.50" in text and "0.91" not in text


def test_moments_that_overlap_lie_on_two_tracks() -> None:
    both = [encode(each, "run") for each in (moment(CAT, 1, 1, 5), moment(CAT, 2, 3, 7), moment(CAT, 3, 6, 8))]
    timeline = otio.adapters.read_from_string(render(both, "door", "otio", Wanted()).decode())
    assert [len(list(track.find_clips())) for track in timeline.tracks] == [2, 1]


def test_a_clip_that_was_cut_is_the_media() -> None:
    message = json.loads(encode(RECORDED[2], "run"))
    clip = {"url": "/clips/x.mp4", "thumbnail": "/clips/x.jpg", "start_s": 5.0, "end_s": 13.0, "complete": True}
    told = {**message, "type": "io.livemoments.clip.ready.v1", "data": {**message["data"], "clip": clip}}
    payloads = [json.dumps(each).encode() for each in (message, told)]
    text = render(payloads, "door", "otio", Wanted(), "http://host:8766").decode()
    (found,) = otio.adapters.read_from_string(text).find_clips()
    assert found.media_reference.target_url == "http://host:8766/clips/x.mp4"
    assert found.media_reference.available_range.duration.to_seconds() == 8
    assert found.source_range.start_time.to_seconds() == 2


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--query", " A  Cat "], 3),
        (["--query", "nothing"], 0),
        (["--since", rfc3339(EPOCH_NS + 3 * NS)], 3),  # one still lasts then
        (["--since", rfc3339(EPOCH_NS + 4 * NS), "--until", rfc3339(EPOCH_NS + 60 * NS)], 1),
        (["--until", rfc3339(EPOCH_NS + 7 * NS)[:-1]], 2),  # UTC, though it does not say so
    ],
)
def test_a_part_is_exported(path: Path, options: list[str], count: int) -> None:
    assert len(webvtt.from_string(exported(path, "vtt", *options), strict=True)) == count
    clips = otio.adapters.read_from_string(exported(path, "otio", *options)).find_clips()
    assert len(list(clips)) == count


def test_a_stream_without_moments_has_an_empty_export(path: Path) -> None:
    log = EventLog(path)
    log.append([status(1, "empty")])
    log.close()
    assert len(webvtt.from_string(exported(path, "vtt", stream="empty"), strict=True)) == 0
    assert not list(otio.adapters.read_from_string(exported(path, "otio", stream="empty")).find_clips())
    assert exported(path, "jsonl", stream="empty") == ""


def test_an_export_leaves_the_log_as_it_was(path: Path) -> None:
    before = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    for kind in TYPES:
        exported(path, kind)
    after = {each.name: each.read_bytes() for each in path.parent.iterdir() if not each.name.startswith("out.")}
    assert after == before


def test_what_a_killed_service_left_is_exported_and_left(tmp_path: Path) -> None:
    """The last events are in -wal only, and a moment is open."""
    alive = EventLog(tmp_path / "alive.db")
    alive.append([*RECORDED[:1], replace(RECORDED[1], kind=Kind.OPENED)])
    path = tmp_path / "events.db"
    for end in ("", "-wal"):
        path.with_name(f"events.db{end}").write_bytes((tmp_path / f"alive.db{end}").read_bytes())
    alive.close()
    held = [path.read_bytes(), path.with_name("events.db-wal").read_bytes()]
    assert len(webvtt.from_string(exported(path, "vtt"))) == 1
    assert held == [path.read_bytes(), path.with_name("events.db-wal").read_bytes()]


def test_what_is_wrong_with_a_log_is_said_in_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no log" in refused(capsys, path.with_name("none.db"))
    assert not path.with_name("none.db").exists()
    assert "there is no log" in refused(capsys, path.parent)
    other = path.with_name("other.db")
    other.write_text("a text that is longer than a header " * 30)
    assert "another kind" in refused(capsys, other)
    other.write_bytes(b"")
    assert "is empty" in refused(capsys, other)
    sqlite3.connect(other).execute("CREATE TABLE t (x)").connection.close()
    assert "another program" in refused(capsys, other)
    assert 'no stream "gate": it has door, yard' in refused(capsys, path, stream="gate")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE events SET payload = 'what' WHERE number = 3")
    database.close()
    assert "damaged" in refused(capsys, path)
    path.write_bytes(path.read_bytes()[:4096] + bytes(range(256)) * 64)
    assert str(path) in refused(capsys, path)


def test_a_log_in_use_leads_to_the_page(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(path)
    said = refused(capsys, path)
    assert "in use" in said and "http://HOST:8766" in said
    log.append([status(2, "yard")])
    log.close()
    assert "WEBVTT" in exported(path, "vtt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--since", "yesterday"], "--since must be a time such as"),
        (["--since", "2026-01-02", "--until", "2026-01-01"], "is not before"),
        (["--token", "x"], "--token is for http://HOST:PORT"),
    ],
)
def test_options_that_cannot_be_meant(
    path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, path, *options)


class Site(ThreadingHTTPServer):
    """Gives the exports of a log, as the page does, to who knows the token."""

    log: EventLog


class Answer(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, b"who is it?")
        if parts.path == "/streams/the%20door/moments.vtt":
            return self.answer(200, export(self.server.log, "door", "vtt", dict(parse_qsl(parts.query))))
        if parts.path == "/streams/other/moments.vtt":
            return self.answer(200, b"<html>")
        return self.answer(404, b"there is no such stream\n")

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def site(path: Path) -> Iterator[str]:
    with Site(("127.0.0.1", 0), Answer) as server:
        server.log = EventLog(path)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.log.close()


def test_a_running_service_is_asked(site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    key = "--token-file", str(token)
    options = ["--stream", "the door", "--format", "vtt", "--out", "-", *key, "--query", "a cat"]
    assert main(["export", site, *options]) == 0
    document = webvtt.from_string(capsys.readouterr().out, strict=True)
    assert len(document) == 4  # and the one that was open: whoever opens the log closes it
    assert all(cue.text.startswith("a cat") for cue in document.captions)
    assert "asks for a token" in refused(capsys, site)
    assert "another token" in refused(capsys, site, "--token", "wrong")
    assert "refuses (404): there is no such stream" in refused(capsys, site, *key, stream="gate")
    assert "not livemoments" in refused(capsys, site, *key, stream="other")


def test_a_service_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "nothing answers at" in refused(capsys, f"http://127.0.0.1:{port}")
    assert "must look like" in refused(capsys, f"http://127.0.0.1:{port}/page")
    assert "must look like" in refused(capsys, "http://127.0.0.1:http")
    assert "--certificate is for" in refused(capsys, f"http://127.0.0.1:{port}", "--certificate", "x.pem")
    assert "--certificate: x.pem cannot" in refused(capsys, f"https://127.0.0.1:{port}", "--certificate", "x.pem")
