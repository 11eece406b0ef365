"""What the parts of a config must be to each other, and its secrets that are in files of their own.

These read what tomllib gave, before it is validated: a file with a mistake elsewhere is looked at all the same. What is
not of the right type is passed over here, and told by the validation.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stream.config.lines import KeyPath
from stream.types import normalise

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")

Mistake = tuple[KeyPath, str]
"""Where, and what is wrong: what to do."""
SECRETS = {"server": "token", "server.curve": "secret_key", "webhook": "secret"}
"""Table -> the key that may be given as KEY_file, too."""


def is_host(text: str) -> bool:
    """An IP address or the name of a host, without port and brackets."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # A name does not end in a number: what looks so is a mistyped address.
        return bool(_HOST.fullmatch(text)) and not text.rstrip(".").rpartition(".")[2].isdigit()
    return True


def is_loopback(host: str) -> bool:
    """True if only this machine can connect. A name other than localhost may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def nearest(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown word."""
    known = list(known)
    if near := difflib.get_close_matches(word, known, 1):
        return f"did you mean {near[0]}?"
    return f"known are {', '.join(known)}" if known else "there is none"


def read_secrets(data: dict[str, Any], folder: Path) -> Iterator[Mistake]:
    """Put what the files hold in the place of their names, which are relative to `folder`."""
    tables: list[tuple[KeyPath, dict[str, Any], str]] = [
        (("server",), _table(data, "server"), SECRETS["server"]),
        (("server", "curve"), _table(_table(data, "server"), "curve"), SECRETS["server.curve"]),
        *((("webhook", i), table, SECRETS["webhook"]) for i, table in _tables(data, "webhook")),
    ]
    for path, table, key in tables:
        if (file_key := f"{key}_file") not in table:
            continue
        name, at = table.pop(file_key), (*path, file_key)
        shown = ".".join(str(part) for part in at if isinstance(part, str))
        if key in table:
            yield at, f"{shown} and {key} are both given: keep one"
        elif not isinstance(name, str):
            yield at, f"{shown} must be the name of a file, in quotes"
        else:
            # Not a word of the name: it may be the secret itself, put in the wrong place.
            try:
                table[key] = (folder / Path(name).expanduser()).read_text("utf-8").strip()
            except (OSError, RuntimeError, ValueError) as error:
                reason = (getattr(error, "strerror", None) or "it is no file of text").lower()
                yield at, f"the file of {shown} cannot be read ({reason}): names are relative to {folder}"
            else:
                if not table[key]:
                    yield at, f"the file of {shown} is empty: put the secret into it"
            if not table.get(key):
                table.pop(key, None)


def contradictions(data: dict[str, Any]) -> Iterator[Mistake]:
    """Call it before `read_secrets`, which takes names of files away."""
    yield from _exposed(_table(data, "server"))
    yield from _repeated(data)
    yield from _too_much(data)
    if isinstance(data.get("clips"), dict) and "folder" not in data["clips"]:
        yield ("clips",), "clips.folder is missing: name the folder that clips go to, or take [clips] away"
    streams, urls = _table(data, "streams"), set[str]()
    for i, webhook in _tables(data, "webhook"):
        for j, name in enumerate(_array(webhook, "streams")):
            if isinstance(name, str) and name not in streams:
                yield ("webhook", i, "streams", j), f"there is no stream {name!r}: {nearest(name, streams)}"
        url = webhook.get("url")
        if isinstance(url, str) and url in urls:  # how far a receiver has come in the log is kept by its url
            yield ("webhook", i, "url"), "this webhook's url is given twice: put all it is to get into one [[webhook]]"
        if isinstance(url, str):
            urls.add(url)


def _exposed(server: dict[str, Any]) -> Iterator[Mistake]:
    bind, zmq_port = server.get("bind"), server.get("zmq_port", 5555)
    if isinstance(bind, str) and is_host(bind) and not is_loopback(bind):
        at = ("server", "bind")
        if not {"token", "token_file"} & server.keys():
            yield (
                at,
                f"binding to {bind} without a token lets anybody in: set server.token_file or bind to 127.0.0.1",
            )
        if zmq_port is not False and "curve" not in server:
            yield (
                at,
                f"binding to {bind} without [server.curve] lets anybody read ZeroMQ: add it, "
                "set server.zmq_port = false or bind to 127.0.0.1",
            )
    if "curve" in server and zmq_port is False:
        yield ("server", "curve"), "[server.curve] is for ZeroMQ, which server.zmq_port = false switches off: keep one"
    taken = dict[int, str]()
    for name, default in (("ws_port", 8765), ("zmq_port", 5555), ("page_port", 8766)):
        port = server.get(name, default)
        if type(port) is not int or not port:
            continue
        if port in taken:
            yield (
                ("server", name if name in server else taken[port]),
                (f"server.{name} and server.{taken[port]} are both {port}: change one"),
            )
        taken.setdefault(port, name)
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if one in server and other not in server:
            yield ("server", one), f"server.{one} is given without server.{other}: TLS needs both"


def _repeated(data: dict[str, Any]) -> Iterator[Mistake]:
    """A query that a stream would run twice."""
    everywhere = set[tuple[str, Any]]()
    for i, query in _queries(data):
        if query in everywhere:
            yield ("queries", i), f"the query {query[0]!r} is given twice: take one away"
        everywhere.add(query)
    for name, stream in _table(data, "streams").items():
        seen = set[tuple[str, Any]]()
        for i, query in _queries(stream if isinstance(stream, dict) else {}):
            at = ("streams", name, "queries", i)
            if query in seen:
                yield at, f"the query {query[0]!r} is given twice: take one away"
            elif query in everywhere:
                yield at, f"the query {query[0]!r} runs on every stream already: take it away here or at the top"
            seen.add(query)


def _too_much(data: dict[str, Any]) -> Iterator[Mistake]:
    """More in the file alone than its limits let run."""
    streams, limits = _table(data, "streams"), _table(data, "limits")
    running = len(streams) * len(_array(data, "queries"))
    running += sum(len(_array(each, "queries")) for each in streams.values() if isinstance(each, dict))
    for key, default, count in (("streams", 64, len(streams)), ("queries", 1000, running)):
        limit = limits.get(key, default)
        if type(limit) is int and 0 < limit < count:
            yield ("limits", key), f"this file has {count} {key}, and limits.{key} is {limit}: raise it"


def _queries(table: dict[str, Any]) -> Iterator[tuple[int, tuple[str, Any]]]:
    """Position, text and threshold of each query that has a text."""
    for i, query in enumerate(_array(table, "queries")):
        text, threshold = (query.get("text"), query.get("threshold")) if isinstance(query, dict) else (query, None)
        if isinstance(text, str) and normalise(text) and isinstance(threshold, int | float | None):
            yield i, (normalise(text), threshold)


def _table(data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _array(data: dict[str, Any], key: str) -> list[Any]:
    found = data.get(key)
    return found if isinstance(found, list) else []


def _tables(data: dict[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((i, each) for i, each in enumerate(_array(data, key)) if isinstance(each, dict))
