"""What a benchmark found, as tables: the same on a terminal and in a report."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from stream.page.report import Table


def show(console: Console, tables: Iterable[Table]) -> None:
    for table in tables:
        drawn = Drawn(title=Text(table.title), title_justify="left")
        for name in table.columns:
            drawn.add_column(Text(name.strip()), justify="left" if name.endswith(" ") else "right")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)


def facts(found: Mapping[str, Any]) -> dict[str, str]:
    """How and where it was measured, for the head of a report."""
    named = {name: value for name, value in found.items() if name != "versions" and value is not None}
    size = named.pop("size", None)
    shown = {}
    for name, value in named.items():
        unit = " s" if name.endswith("_s") else ""
        shown[name.removesuffix("_s").replace("_", " ")] = f"{_words(value)}{unit}"
    if size:
        shown["size"] = "x".join(map(str, size))
    return shown


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
