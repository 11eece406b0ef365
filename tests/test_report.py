"""The page that a run leaves: what it says is what was found, and a browser shows it without a network."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page

from bench.browser import CHROMIUM, browser
from bench.camera import clips_folder
from bench.demo import MAN
from kernels.engine import Engine
from livemoments import main
from stream.detector import make_query
from stream.moments import MomentOptions
from stream.page import collector
from stream.page.collector import Collector, Lane, Recording, Told
from stream.page.histogram import histogram
from stream.page.report import Latency, Report, Table, render
from stream.session import Session, Step
from stream.types import NS, Frame, Saliency, Window
from tests.media import decode
from tests.parsed import Parsed
from trainer.render import FPS, Kind, Segment
from trainer.render import render as film

EVIL = '</script><b>bold</b> & "co" \''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s of an empty room, 4 s of a man, 3 s of the room, and what `run` wrote of it."""
    folder = tmp_path_factory.mktemp("report")
    man = Segment(Kind.CLIP, 4 * FPS, clips_folder() / "carphone_pristine.mp4")
    film([Segment(Kind.ROOM, 2 * FPS), man, Segment(Kind.ROOM, 3 * FPS)], folder / "phone.mp4")
    words = ["run", str(folder / "phone.mp4"), "-q", MAN, "-q", EVIL, "--zero-shot"]
    assert main([*words, "--out", str(folder / "found.jsonl"), "--report", str(folder / "report.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def parsed(folder: Path) -> Parsed:
    return Parsed((folder / "report.html").read_text("utf-8"))


def test_it_says_what_the_jsonl_says(folder: Path, parsed: Parsed) -> None:
    rows = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    (stream,) = parsed.data["streams"]
    assert (stream["name"], stream["origin_ms"], stream["hop_s"]) == ("phone", None, 1)
    assert stream["length_s"] == pytest.approx(9, abs=0.1)
    assert [query["query"] for query in stream["queries"]] == [row["query"] for row in rows] == [MAN, EVIL]
    for query, row in zip(stream["queries"], rows, strict=True):
        told = [[moment["start"], moment["end"], moment["score"]] for moment in query["moments"]]
        assert sorted(told, key=lambda window: -window[2]) == row["pred_relevant_windows"]
        scores = dict(zip(stream["times"], query["scores"], strict=True))
        clips = [scores[2 * clip + 1] for clip in range(len(row["pred_saliency_scores"]))]
        assert clips == pytest.approx(row["pred_saliency_scores"], abs=0.0006)
    assert stream["queries"][0]["moments"], "nothing was found, so nothing was compared"
    assert all(query["truth"] is None for query in stream["queries"])


def test_no_text_gets_out_of_its_place(parsed: Parsed) -> None:
    assert parsed.tags.count("script") == 2 and "b" not in parsed.tags
    assert "".join(parsed.texts["h3"]) == MAN + EVIL
    assert parsed.links == []


def test_a_moment_has_its_picture(folder: Path, parsed: Parsed) -> None:
    video = decode(folder / "phone.mp4")
    moments = [moment for query in parsed.data["streams"][0]["queries"] for moment in query["moments"]]
    assert {row["data-moment"] for row in parsed.rows} == {moment["id"] for moment in moments} == set(parsed.pictures)
    for moment in moments:
        image = Image.open(io.BytesIO(parsed.pictures[moment["id"]])).convert("RGB")
        assert image.width == 320
        near = [at for at, time in enumerate(video.times) if abs(time - moment["peak"]) <= 0.55]
        shown = np.asarray(image, np.float32)
        frames = [Image.fromarray(video.pixels[at]).resize(image.size, Image.Resampling.BILINEAR) for at in near]
        assert min(float(np.abs(np.asarray(frame, np.float32) - shown).mean()) for frame in frames) < 6


def test_a_live_stream_tells_the_time_of_day(tmp_path: Path) -> None:
    page = tmp_path / "live.html"
    words = ["run", "test:ball", "-q", "a ball", "--zero-shot", "--threshold", "0.001", "--for", "3.5"]
    assert main([*words, "--report", str(page)]) == 0
    parsed = Parsed(page.read_text("utf-8"))
    (stream,) = parsed.data["streams"]
    assert abs(stream["origin_ms"] / 1000 - page.stat().st_mtime) < 60
    (query,) = stream["queries"]
    assert len(query["scores"]) == len(stream["times"]) >= 2
    assert {"decode", "wait", "image"} <= set(parsed.texts["td"])  # the stages


def test_what_else_was_asked_for_is_written_where_the_report_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.jsonl"
    words = ["run", str(folder / "phone.mp4"), "-q", MAN, "--zero-shot", "--out", str(out)]
    assert main([*words, "--report", "/dev/full"]) == 2
    assert "cannot write /dev/full: No space left" in capsys.readouterr().err
    assert out.read_text().startswith('{"qid": 1')
    for wrong, said in (("/nowhere/x.html", "cannot write"), (str(out), "cannot both be")):
        assert main([*words, "--report", wrong]) == 2
        assert said in capsys.readouterr().err


def window(index: int) -> Window:
    pixels = np.full((36, 64, 3), index % 251, np.uint8)
    frame = Frame("s", index, index * NS + NS // 2, 0, 0, pixels)
    return Window("s", index, index * NS, (index + 2) * NS, (frame,), 5 * NS, 0)


def test_what_it_keeps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for months: the newest windows, and pictures of the strongest moments."""
    monkeypatch.setattr(collector, "WINDOWS", 64)
    monkeypatch.setattr(collector, "PICTURES", 3)
    monkeypatch.setattr(collector, "LANES", 2)
    engine = Engine(zero_shot=True)
    session = Session(engine, "s", NS, MomentOptions(min_gap_s=0.5), recorded=False)
    queries = [make_query(engine, text) for text in ("one", "two", "three")]
    kept = Collector(session, recorded=False)
    trackers = {query.id: session._tracker(query) for query in queries}
    for index in range(200):
        if index == 100:
            for query in queries:  # `two` and `three` come later: one of them is one too many
                session.add(query)
        elif index == 0:
            session.add(queries[0])
        score = 0.6 + index / 1000 if index % 10 == 5 else 0.0
        scores = [Saliency("s", query.id, index, score, 0.0) for query in session.queries]
        for query in session.queries:
            session._epochs[query.id] = 5 * NS
        events = [
            event
            for each in scores
            for event in session._seal(each.query, trackers[each.query].push(each, window(index)), window(index))
        ]
        kept.add(Step(index * NS, [(window(index), scores)], events))
    found = kept.recording()
    assert 64 <= len(found.times) <= 72 and found.times[-1] == 200
    assert [lane.text for lane in found.lanes] == ["one", "two"] and found.lost_lanes == 1
    assert all(len(lane.scores) == len(found.times) for lane in found.lanes)
    moments = [told for lane in found.lanes for told in lane.moments]
    assert len(found.lanes[0].moments) == 20 and found.origin_ns == 5 * NS
    strongest = sorted(moments, key=lambda told: told.score)[-3:]
    assert [told for told in moments if told.picture] == sorted(strongest, key=moments.index)
    for told in strongest:
        assert told.picture
        shown = np.asarray(Image.open(io.BytesIO(told.picture)), np.float32).mean()
        assert abs(shown - (told.peak_s - 1) % 251) <= 1.5  # that of the frame beside the peak
    assert "too many" in render(Report("x", recordings=[found]))


def test_a_histogram_of_what_is_unlike_others() -> None:
    for values in ([5.0], [0.0, 0.0], [1e-9, 1e6], [float(at) for at in range(500)]):
        text = histogram("late", {"one": np.array(values), "none": np.array([])})
        assert text.count("p50") == 3 and "nan" not in text and "none" not in text
    assert "<svg" not in render(Report("x", latencies=[Latency("late", {"one": np.array([])})]))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page, which may load its own file and nothing else, and has nothing to complain about."""
    asked: list[str] = []
    problems: list[str] = []
    context = chromium.new_context(viewport={"width": 1000, "height": 700}, color_scheme="dark")
    opened = context.new_page()
    opened.on("request", lambda each: asked.append(each.url))
    opened.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    yield opened
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith("data:")] == asked[:1] and asked[0].startswith("file:")


PAPER = "canvas => [...canvas.getContext('2d').getImageData(2, 2, 1, 1).data].slice(0, 3)"


def test_a_browser_draws_it_and_says_what_is_under_the_pointer(page: Page, folder: Path, parsed: Parsed) -> None:
    page.goto(f"file://{folder / 'report.html'}")
    page.wait_for_selector("html[data-drawn]")
    lane = page.locator("article.lane").first
    (moment,) = parsed.data["streams"][0]["queries"][0]["moments"]
    assert f"{len(parsed.data['streams'][0]['queries'][0]['moments'])} moments" in (
        lane.locator("canvas").get_attribute("aria-label") or ""
    )
    scrub = lane.locator(".scrub")
    box = scrub.bounding_box()
    assert box
    length_s = parsed.data["streams"][0]["length_s"]
    page.mouse.move(box["x"] + box["width"] * moment["peak"] / length_s, box["y"] + 20)
    peek = page.locator("#peek")
    said = peek.inner_text()
    assert f"{moment['score']:.3f}" in said and "moment 0:" in said
    assert (peek.locator("img").get_attribute("src") or "").startswith("data:image/jpeg")
    page.mouse.move(0, 0)
    assert peek.is_hidden()
    # By keys.
    scrub.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert "0:0" in (scrub.get_attribute("aria-valuetext") or "")
    assert lane.locator(".strip img").count() == 1
    # Closer, and back.
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 20, steps=3)
    page.mouse.up()
    page.wait_for_selector(".whole:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector(".whole", state="hidden")


def test_it_is_light_on_paper_and_where_that_is_liked(page: Page, folder: Path) -> None:
    page.goto(f"file://{folder / 'report.html'}")
    page.wait_for_selector("html[data-drawn]")
    canvas = page.locator("article.lane canvas").first
    dark = canvas.evaluate(PAPER)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    paper = canvas.evaluate(PAPER)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert canvas.evaluate(PAPER) == dark and sum(dark) < 120 and sum(paper) > 650
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"sum => ({PAPER})(document.querySelector('canvas')).reduce((a, b) => a + b) > sum", arg=650)


def test_everybody_can_read_it(page: Page, folder: Path) -> None:
    page.goto(f"file://{folder / 'report.html'}")
    page.wait_for_selector("html[data-drawn]")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(50)
        assert [each["id"] for each in Axe().run(page).response["violations"]] == []


def test_an_hour_of_16_queries_stays_quick(page: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = [at + 0.5 for at in range(3600)]
    lanes = []
    for number in range(16):
        told = [
            Told(f"{number}@{at}", at, at + 9.0, at + 3.0, 0.9, 20.0, [(at + 3.0, 0.9)], None)
            for at in range(0, 3600, 180)
        ]
        lanes.append(Lane(f"query {number}", 0.5, rng.random(3600).tolist(), told, [(30.0, 60.0)]))
    recordings = [Recording("hour", 1_777_863_721 * NS, 1.0, times, lanes, 3600)]
    text = render(
        Report("an hour", recordings=recordings, summary=[Table("all", ("measure ", "value"), [["ap", "1"]])])
    )
    assert len(text) < 1_000_000
    file = tmp_path / "hour.html"
    file.write_text(text, encoding="utf-8")
    page.goto(f"file://{file}")
    page.wait_for_selector("html[data-drawn]")
    page.locator(".scrub").first.hover()
    spent_ms = page.evaluate(
        """async () => {
            const scrub = document.querySelector(".scrub"), before = performance.now();
            for (let x = 10; x < 110; x += 10) {
                scrub.dispatchEvent(new PointerEvent("pointermove", {clientX: 300 + x, clientY: 200}));
                await new Promise(requestAnimationFrame);
            }
            return (performance.now() - before) / 10;
        }"""
    )
    assert spent_ms < 250, "one look at a time of all lanes"
