"""Pictures of the page for the README: `python -m bench.screenshots --out bench/results`.

Nothing is staged: three cameras on loopback show real clips between idle stretches, `livemoments serve` watches them,
and a browser, Debian's Chromium without a screen, opens the page, asks for a query of its own, and waits.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from bench.browser import SIZES, browser
from bench.camera import clips_folder, free_port, serve, start, wait_for_port
from bench.demo import BICYCLE, CARS, MAN
from kernels.errors import InputError, LivemomentsError
from stream.output import check_folder
from trainer.render import FPS, Kind, Segment, render

SCHEMES: tuple[Literal["dark", "light"], ...] = ("dark", "light")
RABBIT = "a cartoon rabbit in a meadow"
SCENES: dict[str, tuple[tuple[Kind | str, float], ...]] = {
    "entrance": ((Kind.ROOM, 24), ("carphone_pristine", 12), (Kind.ROOM, 31), ("carphone_pristine", 8)),
    "street": ((Kind.ROOM, 13), ("bikes", 10), (Kind.GREY, 29), ("bikes", 10), (Kind.ROOM, 23)),
    "studio": ((Kind.NOISE, 17), ("bigbuckbunny", 15), (Kind.GREY, 41)),
}
"""Stream -> what it shows, for so many seconds, over and over."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for desktop.png, phone.png and others")
    parser.add_argument("--seconds", type=float, default=600, help="how long to watch before (default: 10 minutes)")
    args = parser.parse_args(argv)
    try:
        check_folder(args.out)
        with watched() as url:
            take(url, args.out, args.seconds)
    except LivemomentsError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def watched() -> Iterator[str]:
    """A service that watches the scenes; the address of its page."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = [f'[log]\npath = "{folder / "events.db"}"\n[clips]\nfolder = "{folder / "clips"}"']
        port = free_port()
        lines.append(f"[server]\nws_port = 0\nzmq_port = false\npage_port = {port}")
        for (name, scene), query in zip(SCENES.items(), (MAN, CARS, RABBIT), strict=True):
            video = folder / f"{name}.mp4"
            render([_segment(shown, seconds) for shown, seconds in scene], video)
            url = serve(stack, video, loop=True)
            lines.append(f"[streams.{name}]\nsource = {json.dumps(url)}\nqueries = {json.dumps([query])}")
        config = folder / "config.toml"
        config.write_text("\n".join(lines))
        service = start(stack, "livemoments", "serve", str(config))
        wait_for_port(port, service)
        if service.poll() is not None:
            raise InputError("`livemoments serve` did not start")
        yield f"http://127.0.0.1:{port}"


def _segment(shown: Kind | str, seconds: float) -> Segment:
    frames = round(seconds * FPS)
    if isinstance(shown, Kind):
        return Segment(shown, frames)
    return Segment(Kind.CLIP, frames, clips_folder() / f"{shown}.mp4")


def take(url: str, out: Path, seconds: float) -> None:
    """Watch, then ask for something, and take its picture in each size, light and dark."""
    with browser() as opened:
        time.sleep(max(0.0, seconds - 20))
        for name, (width, height) in SIZES.items():
            for scheme in SCHEMES:
                page = opened.new_page(
                    color_scheme=scheme,
                    viewport={"width": width, "height": height},
                    device_scale_factor=2 if name == "phone" else 1,
                )
                page.goto(url)
                page.fill("#text", BICYCLE)
                page.click("#ask button")
                page.locator(".lane", has_text=BICYCLE).first.wait_for()
                page.wait_for_timeout(4500)
                if name == "desktop" and scheme == "dark":
                    lane = page.locator(".lane").first
                    bands = json.loads(lane.locator("canvas").get_attribute("data-bands") or "[]")
                    band = [band for band in bands if not band["open"]][-1]
                    lane.locator(".scrub").hover(position={"x": (band["left"] + band["right"]) / 2, "y": 20})
                    page.wait_for_timeout(800)
                page.screenshot(path=out / f"{name}{'' if scheme == 'dark' else '-light'}.png")
                page.close()


if __name__ == "__main__":
    sys.exit(main())
