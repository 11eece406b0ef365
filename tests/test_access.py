"""Who is let in: tokens, TLS, addresses and web pages; and what arrives at an open port that is no protocol at all."""

import contextlib
import gc
import json
import logging
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets.exceptions
from websockets.sync.client import connect

from kernels.errors import InputError
from stream.config.schema import Limits
from stream.deliver.log import EventLog
from stream.deliver.websocket import Client
from tests.sockets import WAIT_S, Program, ask, next_event, self_signed, wait_for
from tests.test_events import DOG, event

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), "livemoments", "IP:127.0.0.1")


def test_a_token_lets_in_who_has_it() -> None:
    with Program(token=TOKEN) as program:
        with Client(program.url, WAIT_S, token=TOKEN) as client:
            assert ask(client, op="subscribe", query="*")["op"] == "subscribed"
            program.tell(event(1))
            assert next_event(client)["lognumber"] == 1
        with connect(f"{program.url}/?token={TOKEN}", compression=None) as page:  # browsers can send no header
            page.send('{"op":"list"}')
            assert json.loads(page.recv(WAIT_S))["op"] == "list"
        for wrong in (None, TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "*"):
            with pytest.raises(InputError, match="refuses: the token is wrong or missing") as caught:
                Client(program.url, WAIT_S, token=wrong)
            assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
        for path in ("", "/?token=", "/?token=nonsense", "/?Token=" + TOKEN, "//[?token", "/%ff?token=%ff"):
            with pytest.raises(websockets.exceptions.InvalidStatus, match="401"), connect(program.url + path):
                pass
        wait_for(lambda: program.server.clients == 0)
        assert program.server.board.tally.connections == {"token": 11}


def test_binding_elsewhere_needs_a_token() -> None:
    log = EventLog(None)
    with pytest.raises(InputError, match=r"binding to 0\.0\.0\.0 without a token lets anybody in"):
        Program(log, host="0.0.0.0")
    with Program(log, host="0.0.0.0", token=TOKEN) as program:
        assert program.url == f"ws://127.0.0.1:{program.server.port}"
        with Client(program.url, WAIT_S, token=TOKEN) as client:
            assert ask(client, op="list")["op"] == "list"


def test_tls_with_a_certificate_of_our_own(tls: tuple[Path, Path], tmp_path: Path) -> None:
    with Program(tls=tls, token=TOKEN) as program:
        assert program.url.startswith("wss://127.0.0.1:")
        with Client(program.url, WAIT_S, token=TOKEN, certificate=tls[0]) as client:
            assert ask(client, op="subscribe", query=DOG.text)["op"] == "subscribed"
            program.tell(event(1))
            assert next_event(client)["lognumber"] == 1
        with pytest.raises(InputError, match=r"is not trusted .*give its certificate"):
            Client(program.url, WAIT_S, token=TOKEN)
        with pytest.raises(InputError, match="token is wrong"):
            Client(program.url, WAIT_S, certificate=tls[0])
        with pytest.raises(ConnectionError):
            Client(program.url.replace("wss:", "ws:"), token=TOKEN)
        with socket.create_connection(("127.0.0.1", program.server.port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"HTTP" not in plain.recv(1000)
    (tmp_path / "no.pem").write_text("nonsense")
    with pytest.raises(InputError, match=r"no\.pem cannot be used: it is no PEM"):
        Client("wss://127.0.0.1:1", certificate=tmp_path / "no.pem")
    with pytest.raises(InputError, match=r"none\.pem cannot be used: No such file"):
        Client("wss://127.0.0.1:1", certificate=tmp_path / "none.pem")
    with pytest.raises(InputError, match="for TLS"):
        Program(EventLog(None), tls=(tls[0], tmp_path / "no.pem"))


def test_web_pages_from_elsewhere_are_kept_out(program: Program) -> None:
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        with (
            pytest.raises(websockets.exceptions.InvalidStatus, match="403"),
            connect(program.url, origin=websockets.Origin(origin)),
        ):
            pass
    assert program.server.board.tally.connections == {"origin": 3}
    with connect(program.url, origin=websockets.Origin("http://localhost:3000")) as page:
        page.send('{"op":"list"}')
        assert json.loads(page.recv(WAIT_S))["op"] == "list"
    with Program(token=TOKEN) as guarded:  # a page that has the token may come from anywhere
        address, origin = f"{guarded.url}/?token={TOKEN}", websockets.Origin("https://dashboard.example")
        with connect(address, origin=origin) as page:
            page.send('{"op":"list"}')
            assert json.loads(page.recv(WAIT_S))["op"] == "list"


# ---- anything at all -------------------------------------------------------------------------------------------------

PIECES = ['{"op":', '"subscribe"', '"query":', '"*"', "}", "[", ",", '"stream":', "null", "1e999", "\\u0000", "é"]
OPS = ["subscribe", "unsubscribe", "list", "why", "streams", "add_stream", "remove_stream", "caught_up", "error"]
NAMES = ["op", "query", "stream", "threshold", "cooldown", "backfill", "since", "source", "id"]
VALUES: list[object] = [
    *OPS[:4],
    "*",
    "!",
    DOG.text,
    "door",
    None,
    True,
    3,
    0.5,
    -1,
    10**14,
    1e300,
    [],
    {},
    "\x00",
    "x" * 999,
]


def nonsense(rng: random.Random) -> str | bytes:
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            return "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(50)))
        case 2:
            return "".join(rng.choices(PIECES, k=rng.randrange(12)))
        case 3:
            return json.dumps({rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randrange(4))})
        case _:
            some = {name: rng.choice(VALUES) for name in rng.sample(NAMES[1:], rng.randrange(5))}
            return json.dumps({"op": rng.choice(OPS), **some})


def garbage(rng: random.Random, port: int) -> None:
    """What does not even speak HTTP, stops in the middle of it, or breaks WebSocket's rules after the handshake."""
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    kinds = [
        rng.randbytes(300),
        b"",
        b"GET / HTTP/1.1\r\nUpgrade: web",
        b"GET //[ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500,
        b"A" * 20_000,
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS where there is none
        upgrade.replace(b"13", b"9"),
        upgrade.replace(b"AAAA==", b"\xff\xff"),
        upgrade + rng.randbytes(300),
        upgrade + b"\x81\x7f\x7f\xff\xff\xff\xff\xff\xff\xff",  # it announces more than there is
        upgrade + b"\x81\xff\x00\x00\x00\x10\x00\x00\x00\x00" + rng.randbytes(100),
        upgrade + b"\x01\x80\x00\x00\x00\x00" * 1000,  # the beginning of a message, again and again
        upgrade + b"\x89\x80\x00\x00\x00\x00" * 1000,  # pings
    ]
    with socket.create_connection(("127.0.0.1", port)) as raw, contextlib.suppress(OSError):  # it hung up first
        raw.sendall(rng.choice(kinds))


def resident_kb() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_messages_of_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(messages_per_second=1e6, message_bytes=4096, queries=50)
    rng = random.Random(7)

    def attack(program: Program, messages: int) -> None:
        for _ in range(messages // 500):
            with connect(program.url, compression=None, close_timeout=0.2) as client:
                sent = 0
                for _ in range(500):
                    client.send(nonsense(rng))
                    sent += 1
                while sent:  # one answer to each, whatever it was
                    answer = json.loads(client.recv(WAIT_S))
                    sent -= "op" in answer and answer["op"] != "caught_up"
                client.send("x" * 5000)
                with pytest.raises(websockets.exceptions.ConnectionClosedError, match="1009"):
                    while True:
                        client.recv(WAIT_S)
            for _ in range(10):
                garbage(rng, program.server.port)

    with (
        caplog.at_level(logging.WARNING),
        Program(limits=limits, token=None) as program,
        Client(program.url, WAIT_S) as other,
    ):
        ask(other, op="subscribe", query=DOG.text)
        attack(program, 2000)  # now all that is made once has been made
        gc.collect()
        before_kb = resident_kb()
        attack(program, 10_000)
        gc.collect()
        assert resident_kb() - before_kb < 5000
        program.tell(event(1))
        assert next_event(other)["data"]["seq"] == 1
        assert ask(other, op="list")["subscriptions"][0]["query"] == DOG.text
        wait_for(lambda: program.server.clients == 1 and program.wanted() == {DOG.text})
    assert caplog.text == ""  # nobody can fill a log file this way
