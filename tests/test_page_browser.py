"""The page in a browser, on a live camera: what people see of moments, and what they do with it."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from bench.browser import CHROMIUM, SIZES, browser
from bench.camera import clips_folder, free_port
from bench.demo import MAN
from tests.serve import BALL, Service, camera, check, config, of, until
from trainer.render import FPS, Kind, Segment, render

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing: apt-get install chromium")

HOP_MS = 1000
FIXED = "a cartoon rabbit in a meadow"
"""The query of the config: it never comes."""
EMPTY_S, MAN_S = 5, 4
BEFORE_S = 3.0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """It watches a room into which a man comes every 9 s."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    man = Segment(Kind.CLIP, MAN_S * FPS, clips_folder() / "carphone_pristine.mp4")
    render([Segment(Kind.ROOM, EMPTY_S * FPS), man], folder / "man.mp4")
    with camera(port, "--file", folder / "man.mp4", "--loop"):
        sources = {"door": f"rtsp://127.0.0.1:{port}/cam"}
        clips = f'[clips]\nfolder = "clips"\nbefore_s = {BEFORE_S}\nafter_s = 1'
        with Service(
            folder,
            config(sources, [FIXED], engine="", moments="", more=clips),
        ) as running:
            yield running


class Seen:
    """A page, and all that it was told and has asked for."""

    def __init__(self, chromium: Browser, url: str, size: str = "desktop", scheme: Any = "dark") -> None:
        width, height = SIZES[size]
        self.url = url
        self.context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.frames: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if "Security" in said.text else None)
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._take))
        self.page.goto(url)

    def _take(self, payload: str | bytes) -> None:
        self.frames.append(json.loads(payload))

    def events(self, kind: str, query: str) -> list[dict[str, Any]]:
        """The data of the events of a query that came, each once."""
        found = {
            (frame["source"], frame["id"]): frame["data"]
            for frame in self.frames
            if frame.get("type", "").split(".")[-2:-1] == [kind] and frame["data"].get("query") == query
        }
        return [*found.values()]

    def lane(self, query: str, own: bool) -> Locator:
        lane = self.page.locator(".lane", has=self.page.get_by_role("heading", name=query, exact=True))
        yours = self.page.get_by_text("yours", exact=True)
        return lane.filter(has=yours) if own else lane.filter(has_not=yours)

    def rows(self, query: str, state: str = "") -> Locator:
        of_state = f'[data-state="{state}"]' if state else ""
        return self.page.locator(f"#events .moment{of_state}", has_text=query)

    def bands(self, lane: Locator) -> list[dict[str, Any]]:
        """The moments that its canvas shows."""
        found: list[dict[str, Any]] = json.loads(lane.locator("canvas").get_attribute("data-bands") or "[]")
        return found

    def close(self) -> None:
        self.context.close()
        assert self.problems == []
        hosts = {urlsplit(url).netloc for url in self.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(self.url).netloc}, "something was loaded from elsewhere"


@pytest.fixture
def seen(chromium: Browser, service: Service) -> Iterator[Seen]:
    opened = Seen(chromium, service.page)
    yield opened
    opened.close()


def ask(seen: Seen, query: str) -> None:
    seen.page.get_by_label("What to look for").fill(query)
    seen.page.get_by_role("button", name="Watch", exact=True).click()


def loaded(image: Locator) -> bool:
    found: bool = image.evaluate("(image) => image.complete && image.naturalWidth > 0")
    return found


def utc_ms(page: Page, text: str) -> float:
    found: float = page.evaluate("Date.parse", text)
    return found


def test_a_query_is_typed_and_a_moment_comes_and_goes(seen: Seen, service: Service) -> None:
    page = seen.page
    until(lambda: service.streams()["door"]["looked_at"] > EMPTY_S + MAN_S + 3)
    page.reload()
    paint = page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert paint.json_value() < 1000
    expect(page.locator("#link")).to_contain_text("connected, 1 of 1 stream")
    ask(seen, MAN)
    # Its past is there at once: moments that were over before it was asked for, and the curve that they stand on.
    expect(seen.rows(MAN, "closed").first).to_contain_text("earlier")
    lane = seen.lane(MAN, own=True)
    assert seen.bands(lane)[0]["end"] - seen.bands(lane)[0]["start"] <= (MAN_S + 2) * HOP_MS
    assert lane.locator("canvas").get_attribute("aria-label")
    # A moment opens: a row and a band that grows; both close.
    row = page.locator(f'[data-key="{seen.rows(MAN, "open").first.get_attribute("data-key")}"]')
    expect(row).to_contain_text("open")
    start = int(row.get_attribute("data-at") or 0)
    (growing,) = [band for band in seen.bands(lane) if band["open"]]
    assert growing["start"] == start
    expect(row).to_have_attribute("data-state", "closed", timeout=1000 * (MAN_S + 9))
    (closed,) = [data for data in seen.events("closed", MAN) if utc_ms(page, data["start"]) == start]
    page.wait_for_timeout(100)
    (band,) = [band for band in seen.bands(lane) if band["start"] == start]
    assert not band["open"] and abs(band["end"] - utc_ms(page, closed["end"])) <= HOP_MS
    # So it is on the screen: tinted between the two, paper beside them.
    inside, outside = page.evaluate(PROBE, [lane.get_attribute("data-query-id"), start])
    assert inside != outside
    # The live picture came no faster than there were new ones, and each of the two times that the page was opened.
    assert loaded(page.locator(".picture img"))
    windows = {frame["times"][-1] for frame in seen.frames if frame.get("op") == "curve"}
    assert 0 < sum("picture.jpg" in url for url in seen.asked) <= len(windows) + 2
    # What is asked for is kept by the browser.
    page.reload()
    expect(seen.lane(MAN, own=True)).to_be_visible()
    expect(seen.rows(MAN, "closed").first).to_be_visible()
    seen.page.get_by_role("button", name=f"Stop watching for {MAN} on all streams").click()
    expect(seen.lane(MAN, own=True)).to_have_count(0)
    expect(seen.rows(MAN)).to_have_count(0)
    expect(seen.lane(FIXED, own=False)).to_be_visible()


def test_a_threshold_is_tried_and_then_asked_for(seen: Seen) -> None:
    page = seen.page
    ask(seen, MAN)
    expect(seen.lane(MAN, own=True)).to_be_visible()  # from here on nothing moves
    fixed = seen.lane(FIXED, own=False)
    level = fixed.get_by_role("slider", name="Threshold")
    box, plot = fixed.locator(".grip").bounding_box(), fixed.locator("canvas").bounding_box()
    assert box and plot
    # Dragged down, it shows what would lie above; let go, one's own query begins there, for the past as well.
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 10, plot["y"] + plot["height"] - 8, steps=5)
    expect(level).to_have_attribute("aria-valuetext", re.compile(r"^0\.0\d, \d+ stretch(es)? of \d+ seconds in 10 "))
    page.mouse.up()
    variant = seen.lane(FIXED, own=True)
    expect(seen.rows(FIXED).first).to_be_visible()
    expect(level).to_have_attribute("aria-valuenow", "0.50")
    page.wait_for_timeout(100)
    assert seen.bands(variant) and not seen.bands(fixed)
    # By the keys, for one's own query: the same at another threshold, in its place.
    lane = seen.lane(MAN, own=True)
    expect(seen.rows(MAN, "closed").first).to_be_visible()
    count = len(seen.bands(lane))
    level = lane.get_by_role("slider", name="Threshold")
    level.focus()
    for _ in range(3):
        level.press("ArrowDown")
    expect(level).to_have_attribute("aria-valuenow", "0.47")
    level.press("Enter")
    changed = page.locator('[data-query-id$="-at-0.47"]')
    expect(changed).to_be_visible()
    expect(lane).to_have_count(1)
    expect(seen.rows(MAN, "closed").first).to_be_visible()
    until(lambda: count <= len(seen.bands(changed)) <= count + 1)
    expect(page.locator("#own li", has_text=MAN)).to_contain_text("from 0.47")


def test_the_keys_are_enough(seen: Seen) -> None:
    page = seen.page
    expect(seen.lane(FIXED, own=False)).to_be_visible()

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent")
            if name in focused:
                return
        raise AssertionError(f"no way to {name} by the keys")

    tab_to("Skip to the moments")
    page.keyboard.press("Tab")
    page.keyboard.type(MAN)
    page.keyboard.press("Enter")
    expect(seen.rows(MAN, "closed").first).to_be_visible()
    tab_to(f"Time of {MAN}")
    for key in ("End", "ArrowLeft", "ArrowLeft", "PageDown"):
        page.keyboard.press(key)
    expect(page.locator("#peek")).to_contain_text(re.compile(r"\d\d:\d\d:\d\d, score \d\.\d\d"))
    expect(page.locator(":focus")).to_have_attribute("aria-valuetext", re.compile("score"))
    until(lambda: loaded(page.locator("#peek img")))
    page.keyboard.press("Escape")
    expect(page.locator("#peek")).to_be_hidden()
    tab_to(f"Threshold of {MAN}")
    page.keyboard.press("PageUp")
    expect(page.locator('[data-query-id$="-at-0.6"]')).to_be_visible()  # a moment after the last key
    page.locator("#text").focus()
    tab_to(f"Stop watching for {MAN}")
    page.keyboard.press("Enter")
    expect(page.locator("#own li")).to_have_count(0)
    expect(page.locator("#text")).to_be_focused()
    expect(seen.lane(MAN, own=True)).to_have_count(0)


def test_its_clip_is_played_and_kept(seen: Seen) -> None:
    page = seen.page
    ask(seen, MAN)

    def clipped() -> list[dict[str, Any]]:
        """The moments with a clip that began at once: the window before their first was looked at as well.

        Where pictures did not arrive for seconds, on a machine that is busy with other things, a moment begins late.
        """
        page.wait_for_timeout(100)
        middles = {time for frame in seen.frames if frame.get("op") == "curve" for time in frame["times"]}
        return [data for data in seen.events("ready", MAN) if utc_ms(page, data["start"]) - HOP_MS // 2 in middles]

    clip = until(clipped)[0]
    row = page.locator(f'[data-key="{clip["stream"]} {clip["moment_id"]}"].clipped')
    with page.expect_download() as download:
        row.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == clip["clip"]["url"].rpartition("/")[2]
    assert clip["clip"]["start_s"] <= clip["start_s"] - BEFORE_S
    # What the file shows says the same: so much of the empty room, then the man.
    with av.open(str(download.value.path())) as file:
        shown = [(frame.time, frame.to_ndarray(format="gray").astype(float)) for frame in file.decode(video=0)]
    changes = [float(np.abs(picture - before).mean()) for (_, before), (_, picture) in pairwise(shown)]
    comes_s = shown[1 + int(np.argmax(np.asarray(changes) > 20))][0]
    assert comes_s >= BEFORE_S - HOP_MS / 1000
    row.get_by_role("button", name="Play").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    video = page.locator("#clip video")
    if video.evaluate("(video) => video.canPlayType('video/mp4; codecs=avc1.42E01E')"):
        page.wait_for_function("document.querySelector('#clip video').readyState >= 2")
    assert barriers(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(chromium: Browser, service: Service, size: str, scheme: str) -> None:
    seen = Seen(chromium, service.page, size, scheme)
    ask(seen, MAN)
    expect(seen.rows(MAN, "closed").first).to_be_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert barriers(seen.page) == []
    seen.close()


def barriers(page: Page) -> list[tuple[str, str, list[str]]]:
    """What axe finds of serious and critical barriers."""
    return [
        (each["id"], each["help"], [node["html"] for node in each["nodes"]])
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def test_a_token_is_asked_for(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open-sesame-open-sesame")
    with Service(tmp_path, config({}, server='token_file = "token"')) as service:
        seen = Seen(chromium, service.page)
        field = seen.page.get_by_role("textbox", name="Token")
        assert barriers(seen.page) == []
        field.fill("sesame")
        field.press("Enter")
        expect(seen.page.get_by_role("alert")).to_contain_text("not the token")
        field.fill("open-sesame-open-sesame")
        field.press("Enter")
        expect(seen.page.locator("#link")).to_contain_text("connected, 0 of 0 streams")
        expect(seen.page.get_by_role("dialog")).to_be_hidden()
        seen.page.reload()  # once is enough
        expect(seen.page.locator("#link")).to_contain_text("connected")
        seen.close()


def test_it_outlives_the_service(chromium: Browser, tmp_path: Path) -> None:
    """What happened while the page was alone comes from the log, once."""
    port = free_port()
    text = config({"lab": "test:ball"}).replace("page_port = 0", f"page_port = {port}")
    with Service(tmp_path, text) as service:
        seen = Seen(chromium, service.page)
        expect(seen.rows(BALL, "open")).to_have_count(1)
        ask(seen, "a snowstorm")
        expect(seen.lane("a snowstorm", own=True)).to_be_visible()
        service.kill()
        expect(seen.page.locator("#link")).to_contain_text("connection lost")
    with Service(tmp_path, text) as service:
        expect(seen.page.locator("#link")).to_contain_text("connected, 1 of 1 stream", timeout=15000)
        expect(seen.rows(BALL, "closed")).to_have_count(1)  # when it was started again
        expect(seen.rows(BALL, "open")).to_have_count(1)
        expect(seen.lane("a snowstorm", own=True)).to_be_visible()
        expect(seen.page.locator(".news")).to_have_count(2)
        numbers = [frame["lognumber"] for frame in seen.frames if "type" in frame]
        service.stop()
        expect(seen.rows(BALL, "open")).to_have_count(0)  # told on the way out
        seen.close()
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))
    opened = of(check(tmp_path / "events.db"), "opened")
    assert [data["query"] for data in opened].count(BALL) == 2


PROBE = """([query, start]) => {
  const canvas = document.querySelector(`[data-query-id="${query}"] canvas`);
  const band = JSON.parse(canvas.dataset.bands).find((band) => band.start === start);
  // Below the curve: there is nothing but the band.
  const at = (x) => [...canvas.getContext("2d").getImageData(x, canvas.height - 2, 1, 1).data].join();
  return [at((band.left + band.right) / 2), at(band.left - 5)];
}"""
