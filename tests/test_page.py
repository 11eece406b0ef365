"""The page's server: who gets in, what comes out, and that its WebSocket keeps the rules of the other one."""

import json
import random
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import websockets
from websockets.sync.client import ClientConnection, connect

from kernels.errors import InputError
from stream.config.schema import Limits
from stream.curves import Curve
from stream.deliver.log import EventLog
from stream.deliver.switchboard import Switchboard
from stream.deliver.websocket import Client
from stream.export.formats import Format
from stream.history import Scores
from stream.page.server import COOKIE, Page
from stream.types import NS, Saliency
from tests.sockets import QUICK, WAIT_S, Program, ask, next_event, self_signed, wait_for
from tests.test_access import nonsense
from tests.test_events import DOG, event

TOKEN = "correct-horse-battery-staple"
CLIP = b"0123456789" * 1000
DATA = ["/ws", "/streams/door/picture.jpg", "/streams/door/pictures/1.jpg", "/streams/door/moments.vtt", "/metrics"]


class Shown:
    """What stands behind the page, without a service: a picture, a clip, an export."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ready = folder, True
        (folder / "a.mp4").write_bytes(CLIP)

    def picture(self, stream: str) -> bytes | None:
        return b"newest" if stream == "door" else None

    def picture_at(self, stream: str, utc_ns: int) -> bytes | None:
        return str(utc_ns).encode() if stream == "door" else None

    def clip(self, name: str) -> Path | None:
        return self.folder / name if name == "a.mp4" else None

    def export(self, stream: str, kind: Format, given: Mapping[str, str], base: str) -> bytes:
        if "since" in given:
            raise InputError(f"{given['since']} is no time")
        return f"{kind} of {stream}, {base}".encode()

    def metrics(self) -> tuple[bytes, str]:
        return b"livemoments_up 1\n", "text/plain; version=0.0.4; charset=utf-8"

    def health(self) -> tuple[bool, list[str]]:
        return True, []

    def readiness(self) -> tuple[bool, list[str]]:
        return self.ready, [] if self.ready else ["the log cannot be written"]


@contextmanager
def opened(folder: Path, *, port: int = 0, **options: Any) -> Iterator[tuple[Program, Page, Shown]]:
    shown = Shown(folder)
    access = {name: options[name] for name in ("token", "tls") if name in options}
    page = Page(shown, port=port, **access)
    with Program(doors=[page], **options) as program:
        yield program, page, shown


def get(url: str, context: ssl.SSLContext | None = None, **headers: str) -> tuple[int, bytes, Message]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S, context=context) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def login(page: Page, body: bytes) -> tuple[int, str]:
    """Status, and the cookie that was set."""
    request = urllib.request.Request(page.url + "/login", data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, answer.headers["Set-Cookie"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def socket_of(page: Page, **options: Any) -> ClientConnection:
    link: ClientConnection = connect(page.url.replace("http", "ws", 1) + "/ws", proxy=None, compression=None, **options)
    return link


def test_it_serves_what_the_program_shows(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, page, shown):
        status, body, headers = get(page.url + "/")
        assert status == 200 and b"<!doctype html>" in body.lower()
        assert "default-src 'self'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"]
        assert get(page.url + "/streams/door/picture.jpg")[:2] == (200, b"newest")
        assert get(page.url + "/streams/door/pictures/17.jpg")[:2] == (200, b"17000000")
        assert get(page.url + "/streams/yard/picture.jpg")[:2] == (404, b"no picture of yard yet\n")
        status, body, headers = get(page.url + "/streams/door/moments.vtt")
        assert (status, body) == (200, f"vtt of door, {page.url}".encode())
        assert headers["Content-Type"] == "text/vtt; charset=utf-8"
        assert headers["Content-Disposition"] == 'attachment; filename="door.vtt"'
        assert get(page.url + "/streams/door/moments.doc")[:2] == (404, b"moments are given as vtt, otio, jsonl\n")
        assert get(page.url + "/streams/door/moments.vtt?since=x")[:2] == (400, b"x is no time\n")
        assert get(page.url + "/metrics")[1] == b"livemoments_up 1\n"
        assert json.loads(get(page.url + "/healthz")[1]) == {"ok": True, "reasons": []}
        shown.ready = False
        status, body, _ = get(page.url + "/readyz")
        assert (status, json.loads(body)) == (503, {"ok": False, "reasons": ["the log cannot be written"]})


def test_clips_come_with_ranges_and_nothing_else_of_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, page, _):
        status, body, headers = get(page.url + "/clips/a.mp4")
        assert (status, body, headers["Content-Type"]) == (200, CLIP, "video/mp4")
        status, body, headers = get(page.url + "/clips/a.mp4", Range="bytes=10-19")
        assert (status, body, headers["Content-Range"]) == (206, CLIP[10:20], f"bytes 10-19/{len(CLIP)}")
        for name in ("b.mp4", "..%2fa.mp4", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd"):
            assert get(f"{page.url}/clips/{name}")[0] == 404
        assert get(page.url + "/static/../server.py")[0] in (403, 404)


def test_its_websocket_speaks_the_protocol_of_the_other(tmp_path: Path) -> None:
    with opened(tmp_path) as (program, page, _), socket_of(page) as one, Client(program.url) as other:
        for ask_for in ('{"op":"subscribe","query":"*"}', '{"op":"list"}'):
            one.send(ask_for)
            assert "subscri" in str(one.recv(WAIT_S))
        ask(other, op="subscribe", query="*")
        (entry,) = program.tell(event(1))
        assert one.recv(WAIT_S, decode=False) == entry.payload
        assert next_event(other) == json.loads(entry.payload)
        one.send(b"\x00")
        assert "binary" in str(one.recv(WAIT_S))


def test_without_a_token_only_this_machine_and_its_own_page_come_in(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, page, _):
        status, body, _ = get(page.url + "/streams/door/picture.jpg", Host="evil.example")  # its name led to 127.0.0.1
        assert status == 403 and b"not for 'evil.example'" in body
        assert get(page.url + "/streams/door/picture.jpg", Origin="http://evil.example")[0] == 403
        for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
            with pytest.raises(websockets.InvalidStatus, match="403"):
                socket_of(page, origin=websockets.Origin(origin))
        with socket_of(page, origin=websockets.Origin(page.url)) as own:
            own.send('{"op":"list"}')
            assert json.loads(own.recv(WAIT_S))["op"] == "list"


def test_with_a_token_no_data_comes_without_it(tmp_path: Path) -> None:
    with opened(tmp_path, token=TOKEN) as (_, page, _):
        for path in ("/", "/healthz", "/readyz"):
            assert get(page.url + path)[0] == 200
        for path in (*DATA, "/clips/a.mp4", "/nothing"):
            status, body, _ = get(page.url + path)
            assert status == 401 and b"token" in body, path
        assert get(page.url + "/clips/a.mp4", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert get(f"{page.url}/clips/a.mp4?token={TOKEN}")[0] == 200
        assert get(f"{page.url}/clips/a.mp4?token={TOKEN}", Authorization="Bearer no")[0] == 401
        assert get(page.url + "/clips/a.mp4", Cookie=f"{COOKIE}={TOKEN}")[0] == 401  # the token itself is no pass


def test_a_browser_logs_in_once_and_a_restart_does_not_throw_it_out(tmp_path: Path) -> None:
    with opened(tmp_path, token=TOKEN) as (_, page, _):
        for wrong in (b'{"token":"no"}', b'{"token":null}'):
            assert login(page, wrong)[0] == 401
        for nonsense_body in (b"{", b"[]", b"{}", b'{"token":"' + b"x" * 10_000 + b'"}'):
            assert login(page, nonsense_body)[0] == 400
        status, cookie = login(page, json.dumps({"token": TOKEN}).encode())
        assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        mine = cookie.split(";")[0]
        assert get(page.url + "/clips/a.mp4", Cookie=mine)[0] == 200
        with socket_of(page, additional_headers={"Cookie": mine}) as link:
            link.send('{"op":"list"}')
            assert json.loads(link.recv(WAIT_S))["op"] == "list"
        port = page.port
    with opened(tmp_path, token=TOKEN, port=port) as (_, page, _):
        assert get(page.url + "/clips/a.mp4", Cookie=mine)[0] == 200
    with opened(tmp_path, token="another-token-than-before") as (_, page, _):
        assert get(page.url + "/clips/a.mp4", Cookie=mine)[0] == 401


def test_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, "livemoments", "IP:127.0.0.1")
    with opened(tmp_path, tls=(certificate, key), token=TOKEN) as (_, page, _):
        trust = ssl.create_default_context(cafile=certificate)
        assert page.url.startswith("https://127.0.0.1:")
        assert get(page.url + "/clips/a.mp4", trust, Authorization=f"Bearer {TOKEN}")[1] == CLIP
        request = urllib.request.Request(page.url + "/login", data=json.dumps({"token": TOKEN}).encode())
        with urllib.request.urlopen(request, context=trust, timeout=WAIT_S) as answer:
            assert "Secure" in answer.headers["Set-Cookie"]


def test_limits_count_clients_of_both_and_an_oversized_message_is_the_last(tmp_path: Path) -> None:
    limits = replace_limits(clients=2, message_bytes=4096)
    with opened(tmp_path, limits=limits) as (program, page, _), Client(program.url), socket_of(page) as link:
        wait_for(lambda: program.server.clients == 2)
        with pytest.raises(websockets.InvalidStatus, match="503"):
            socket_of(page)
        link.send("x" * 5000)
        with pytest.raises(websockets.ConnectionClosedError, match="1009"):
            link.recv(WAIT_S)
        wait_for(lambda: program.server.clients == 1)


def replace_limits(**changed: int) -> Limits:
    return QUICK.model_copy(update=changed)


def test_nonsense_is_answered_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(3)
    with opened(tmp_path) as (program, page, _), Client(program.url, WAIT_S) as other:
        ask(other, op="subscribe", query=DOG.text)
        for _ in range(4):
            with socket_of(page, close_timeout=0.2) as link:
                for _ in range(500):
                    link.send(nonsense(rng))
                answers = 0
                while answers < 500:
                    answer = json.loads(link.recv(WAIT_S))
                    answers += "op" in answer and answer["op"] != "caught_up"
            for _ in range(25):
                with socket.create_connection(("127.0.0.1", page.port)) as raw:
                    raw.sendall(rng.randbytes(300))
        program.tell(event(1))
        assert next_event(other)["data"]["seq"] == 1
        wait_for(lambda: program.server.clients == 1)
    assert caplog.text == ""


def test_its_end_says_goodbye_and_does_not_wait_for_who_reads_nothing(tmp_path: Path) -> None:
    with (
        opened(tmp_path) as (program, page, _),
        socket_of(page) as link,
        socket_of(page, max_queue=1, close_timeout=0.2) as stalled,
    ):
        stalled.send('{"op":"subscribe","query":"*"}')
        for number in range(1, 2000):
            program.tell(event(number))
        begin = monotonic()
        program.server.close()
        assert monotonic() - begin < 5
        with pytest.raises(websockets.ConnectionClosed, match="1001"):
            link.recv(WAIT_S)


def test_a_taken_port_is_told_and_lets_go_of_the_other(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, page, _):
        again = Program(doors=[Page(Shown(tmp_path), port=page.port)])
        with pytest.raises(InputError, match=rf"port {page.port} \(page\) is taken by another program"):
            again.server.start()
        socket.create_server(("127.0.0.1", again.server.port)).close()
        again.log.close()
    with pytest.raises(InputError, match="without a token lets anybody in"):
        Page(Shown(tmp_path), port=0, host="0.0.0.0")


# ---- curves ----------------------------------------------------------------------------------------------------------


def scores(count: int, capacity: int = 10, first: int = 0) -> Scores:
    found = Scores(capacity)
    for window in range(first, first + count):
        found.append(Saliency("door", DOG.id, window, window / 100, 0.0))
    return found


class Curves(Program):
    """A program with one curve."""

    def __init__(self, drawn: Scores) -> None:
        super().__init__()
        self.drawn = drawn

    def curves(self) -> list[Curve]:
        return [Curve("door", DOG, 0.5, NS, 1000 * NS, self.drawn)]


def test_curves_begin_with_all_that_is_kept_and_go_on_with_what_is_new() -> None:
    with Curves(scores(12)) as program, Client(program.url) as client:
        assert ask(client, op="curves") == {"op": "curves", "on": True}
        first = json.loads(client.receive(WAIT_S) or b"")
        assert (first["query"], first["threshold"], first["hop_s"], first["anew"]) == (DOG.text, 0.5, 1.0, True)
        assert first["times"] == [1_001_000 + 1000 * window for window in range(2, 12)]  # the middle of each window
        np.testing.assert_allclose(first["scores"], np.arange(2, 12) / 100)
        program.drawn.append(Saliency("door", DOG.id, 14, 0.5, 0.0))
        program.server.scored()
        more = json.loads(client.receive(WAIT_S) or b"")
        assert "anew" not in more and (more["times"], more["scores"]) == ([1_015_000], [0.5])
        program.drawn = scores(1, first=20)  # its row began again
        program.server.scored()
        anew = json.loads(client.receive(WAIT_S) or b"")
        assert anew["anew"] and anew["times"] == [1_021_000]
        client.send({"op": "curves", "on": False})
        assert json.loads(client.receive(WAIT_S) or b"") == {"op": "curves", "on": False}
        program.server.scored()
        assert client.receive(0.2) is None
        assert ask(client, op="curves", on="yes")["message"] == '"on" is true or false'


def test_who_reads_curves_slowly_gets_them_in_one() -> None:
    with Curves(scores(1, capacity=600)) as program:
        board = Switchboard(program, EventLog(None), Limits(), 0.0)
        peer = board.enter()
        assert list(board.curves(peer)) == [] and not board.curious
        peer.curves = {}
        assert len(list(board.curves(peer))) == 1
        for window in range(1, 300):
            program.drawn.append(Saliency("door", DOG.id, window, 0.5, 0.0))
        (message,) = board.curves(peer)
        assert len(json.loads(message)["scores"]) == 299
        assert list(board.curves(peer)) == []


def test_a_client_that_goes_is_followed_no_more() -> None:
    with Curves(scores(1)) as program:
        with Client(program.url) as client:
            ask(client, op="curves")
            wait_for(lambda: program.server.board.curious)
        wait_for(lambda: not program.server.board.curious)
