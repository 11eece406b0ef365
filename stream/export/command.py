"""`livemoments export`: the closed moments of a stream, from a log on the disk or from a running service."""

import argparse
import contextlib
import http.client
import sqlite3
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from kernels.errors import InputError, LogError
from stream.client.access import Access, access, add_access_arguments
from stream.client.board import clean
from stream.deliver import log_file
from stream.export.formats import FORMATS, render
from stream.export.moments import KINDS, Wanted
from stream.output import check_writable, write

TIMEOUT_S = 60.0  # of silence
_FIRST = {"vtt": b"WEBVTT", "otio": b"{", "jsonl": b"{"}  # what a format begins with; jsonl may be empty
_IN_USE = "ask it for the export, by its page's address, as http://HOST:8766"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="LOG|http://HOST:PORT", help="a log that no service holds, or the page of a service that runs"
    )
    parser.add_argument("--stream", required=True, metavar="NAME", help="of which stream")
    parser.add_argument("--format", required=True, choices=FORMATS, help="subtitles, a timeline of an editor, or jsonl")
    parser.add_argument("--out", required=True, metavar="FILE|-", help="where to write it; - is stdout")
    parser.add_argument("--query", metavar="TEXT", help="only the moments of this query")
    parser.add_argument(
        "--since", metavar="TIME", help="only moments that end after this, as 2026-11-21T10:53Z; UTC unless it says so"
    )
    parser.add_argument("--until", metavar="TIME", help="only moments that begin before this")
    add_access_arguments(parser.add_argument_group("from a service"))


def run(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out != "-" else None
    if out:
        check_writable(out)
    names = ("query", "since", "until")
    given: dict[str, str] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        wanted = Wanted.parse(given)
    except InputError as error:
        raise InputError(f"--{error}") from None
    if args.source.startswith(("http://", "https://")):
        body = _fetch(args.source, args.stream, args.format, given, access(args, args.source))
    else:
        for name in ("token", "token_file", "certificate"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for http://HOST:PORT, and {args.source} is a file")
        path = Path(args.source)
        if out and out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"cannot write {out}: it is the log that is read")
        with log_file.reading(path, _IN_USE) as database, _explained(path):
            body = render(_told(database, path, args.stream), args.stream, args.format, wanted)
    write(out, body.decode("utf-8"))
    return 0


def _told(database: sqlite3.Connection, path: Path, stream: str) -> Iterator[bytes]:
    """What a log on the disk tells of a stream's closed moments, oldest first. InputError: it knows no such stream."""
    if not database.execute("SELECT 1 FROM events WHERE stream = ? LIMIT 1", [stream]).fetchone():
        known = [clean(name) for (name,) in database.execute("SELECT DISTINCT stream FROM events ORDER BY stream")]
        raise InputError(f'the log {path} knows no stream "{clean(stream)}": it has {", ".join(known) or "none"}')
    rows = database.execute(
        f"SELECT payload FROM events WHERE stream = ? AND kind IN ({', '.join('?' * len(KINDS))}) ORDER BY number",
        [stream, *KINDS],
    )
    return (payload for (payload,) in rows)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise LogError(f"the log {path} cannot be read: {error}") from error


def _fetch(url: str, stream: str, kind: str, given: dict[str, str], allowed: Access) -> bytes:
    """What a service exports. Neither proxies nor redirections: the token goes to this very server.

    Raises:
        InputError: nobody answers, or it refuses, or it is another program.
    """
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port
        if not host or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise ValueError
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=allowed.certificate)
            connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    except ValueError:
        raise InputError(f"{url} must look like http://HOST:PORT") from None
    except OSError as error:  # of SSL too
        raise InputError(f"--certificate: {allowed.certificate} cannot be used ({error.strerror or error})") from None
    path = f"/streams/{quote(stream, safe='')}/moments.{kind}" + (f"?{urlencode(given)}" if given else "")
    headers = {"Authorization": f"Bearer {allowed.token}"} if allowed.token else {}
    with contextlib.closing(connection):
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise InputError(f"nothing answers at {url} ({reason}): start it, or check the port") from None
    if answer.status == 401:
        raise InputError(f"{url} asks for {'another' if allowed.token else 'a'} token: give --token-file FILE")
    if answer.status != 200:
        said = clean(body[:200].decode("utf-8", errors="replace"))
        raise InputError(f"{url} refuses ({answer.status}): {said}")
    if not body.startswith(_FIRST[kind]) and not (kind == "jsonl" and not body):
        raise InputError(f"what answers at {url} is not livemoments")
    return body
