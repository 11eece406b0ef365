"""A report as an HTML parser reads it."""

import base64
import json
from html.parser import HTMLParser
from typing import Any


class Parsed(HTMLParser):
    """The parts of a report, as an HTML parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.pictures: dict[str, bytes] = {}  # by moment
        self.texts: dict[str, list[str]] = {}  # by tag
        self._json = ""
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self._json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self._is_data = given.get("type") == "application/json"
        self.links += [value or "" for name, value in attrs if name in ("src", "href") and tag != "img"]
        if tag == "tr" and "data-moment" in given:
            self.rows.append(given)
        if tag == "img" and (source := given.get("src")):
            kind, _, encoded = source.partition(",")
            assert kind == "data:image/jpeg;base64"
            self.pictures[str(self.rows[-1]["data-moment"])] = base64.b64decode(encoded)

    def handle_data(self, data: str) -> None:
        if self.tags and self._is_data and self.tags[-1] == "script":
            self._json += data
            self._is_data = False
        elif self.tags:
            self.texts.setdefault(self.tags[-1], []).append(data)
