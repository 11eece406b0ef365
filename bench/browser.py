"""Debian's Chromium without a screen, for pictures of the page and its tests. The only file that imports playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.errors import InputError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
"""It is to load the page and nothing else."""


@contextmanager
def browser() -> "Iterator[Browser]":
    """A browser with nothing open, for one thread.

    Raises:
        InputError: it, or what steers it, is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise InputError("playwright is missing: pip install 'livemoments[dev]'") from None
    if not CHROMIUM.exists():
        raise InputError(f"{CHROMIUM} is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_QUIET))
        try:
            yield opened
        finally:
            opened.close()
