"""Webhooks: real HTTP servers on 127.0.0.1 that take, refuse, hang and go away, and a real log."""

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kernels.errors import InputError
from stream.deliver import http_post
from stream.deliver.http_post import PostError, Receiver, Request, retry_after_s
from stream.deliver.log import Entry, EventLog
from stream.deliver.webhook import Webhook, WebhookState, retry_delay_s, sign, signing_key, wants
from stream.types import Kind
from tests.sockets import self_signed
from tests.test_events import event, query, status

WAIT_S = 10.0
"""How long a test waits for what must come. Only a failing test waits so long."""
QUIET_S = 0.2
"""How long a test waits for what must not come."""
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KEY = bytes.fromhex("31f290f6bf06298aab4f08d43c3f082cf648a362da2da4b0")
ALL = wants(None, None, None)


@dataclass
class Post:
    at_s: float
    path: str
    headers: Message
    body: bytes

    @property
    def number(self) -> int:
        number: int = json.loads(self.body)["lognumber"]
        return number


class Server(HTTPServer):
    """Answers with what `answers` holds, one after the other, then with 204: a status, or what a function does."""

    def __init__(self, port: int = 0) -> None:
        self.posts: list[Post] = []
        self.answers: list[int | tuple[int, dict[str, str]] | Callable[[BaseHTTPRequestHandler], None]] = []
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def wait_for(self, posts: int) -> list[Post]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.posts) >= posts, WAIT_S), f"{len(self.posts)} of {posts}"
            return self.posts[:]

    def numbers(self, posts: int) -> list[int]:
        return [post.number for post in self.wait_for(posts)]

    def handle_error(self, request: object, address: object) -> None:
        pass  # a client that hangs up is what some of the tests are about

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.changed:
            self.server.posts.append(Post(time.monotonic(), self.path, self.headers, body))
            answer = self.server.answers.pop(0) if self.server.answers else 204
            self.server.changed.notify_all()
        if callable(answer):
            answer(self)
            return
        code, headers = answer if isinstance(answer, tuple) else (answer, {})
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path / "events.sqlite")
    yield log
    log.close()


@contextlib.contextmanager
def following(
    log: EventLog, url: str, wanted: Callable[[Entry], bool] = ALL, secret: str | None = SECRET
) -> Iterator[Webhook]:
    webhook = Webhook(log, url, secret=secret, wanted=wanted)
    webhook.start()
    try:
        yield webhook
    finally:
        started = time.monotonic()
        webhook.close()
        assert time.monotonic() - started < 1.5
        assert not webhook._thread.is_alive()


def append(log: EventLog, webhook: Webhook | None, *seqs: int) -> None:
    log.append([event(seq) for seq in seqs])
    if webhook:
        webhook.wake()


def until(webhook: Webhook, true: Callable[[WebhookState], bool]) -> WebhookState:
    deadline = time.monotonic() + WAIT_S
    while not true(webhook.state):
        assert time.monotonic() < deadline, webhook.state
        time.sleep(0.005)
    return webhook.state


# ---- what is sent ----------------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_the_reference_library() -> None:
    # The values in the tests of github.com/standard-webhooks/standard-webhooks.
    arguments = ("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert sign(signing_key(SECRET), *arguments) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signing_key("a plain secret, é") == "a plain secret, é".encode()


def test_events_arrive_in_order_as_they_are_stored_and_signed(server: Server, log: EventLog) -> None:
    append(log, None, 1)  # before the first start: not for this webhook
    with following(log, server.url) as webhook:
        for seq in range(2, 42):
            append(log, webhook, seq)
        posts = server.wait_for(40)
        state = until(webhook, lambda state: state.delivered == 40)
        until(
            webhook, lambda _: log.position(Receiver(server.url).key) == 41
        )  # on the disk already, in case of a crash
    assert [post.body for post in posts] == [entry.payload for entry in log.read(1)]
    assert state == WebhookState(webhook.state.name, delivered=40)
    for post in posts:
        assert post.path == "/hook"
        assert post.headers["Content-Type"] == "application/cloudevents+json"
        assert post.headers["User-Agent"].startswith("livemoments/0.")
        assert post.headers["Host"] == f"127.0.0.1:{server.server_port}"
        assert post.headers["webhook-id"] == f"{log.run}-{post.number}"
        assert abs(int(post.headers["webhook-timestamp"]) - time.time()) < WAIT_S
        signed = f"{post.headers['webhook-id']}.{post.headers['webhook-timestamp']}.".encode() + post.body
        mac = hmac.new(KEY, signed, hashlib.sha256).digest()
        assert post.headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()


def test_ids_differ_where_those_of_cloudevents_do_not(server: Server, log: EventLog) -> None:
    """The same query on two streams: (source, id) is unique, id alone is not. A full stop could forge a signature."""
    asked = query("a dog runs")
    asked = replace(asked, id=f"{asked.id}-at-0.7")
    with following(log, server.url) as webhook:
        log.append([event(1, "door", asked), event(1, "yard", asked)])
        webhook.wake()
        posts = server.wait_for(2)
    assert json.loads(posts[0].body)["id"] == json.loads(posts[1].body)["id"]
    ids = [post.headers["webhook-id"] for post in posts]
    assert ids[0] != ids[1] and "." not in "".join(ids)


def test_without_a_secret_there_is_no_signature(server: Server, log: EventLog) -> None:
    with following(log, server.url, secret=None) as webhook:
        append(log, webhook, 1)
        headers = server.wait_for(1)[0].headers
    assert "webhook-signature" not in headers and "Authorization" not in headers
    assert headers["webhook-id"] == f"{log.run}-1"


def test_user_and_password_of_a_url_are_sent_and_never_shown(
    server: Server, log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.answers = [400, 307]
    url = server.url.replace("//", "//cat:p%40ss@") + "/sesame?token=0123"
    with following(log, url) as webhook:
        append(log, webhook, 1, 2, 3)
        posts = server.wait_for(3)
        state = until(webhook, lambda state: state.delivered == 1)
    assert posts[0].headers["Authorization"] == "Basic " + base64.b64encode(b"cat:p@ss").decode()
    assert posts[0].headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert posts[0].path == "/hook/sesame?token=0123"
    assert len(caplog.records) >= 2
    for hidden in ("cat", "p%40ss", "p@ss", "sesame", "0123"):
        assert hidden not in caplog.text + state.name
    assert f"127.0.0.1:{server.server_port}" in caplog.text
    # A new password is the same receiver, another path is not.
    assert Receiver(url).key == Receiver(url.replace("p%40ss", "better")).key != Receiver(server.url).key


def test_tls_is_checked(server: Server, log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = self_signed(tmp_path, "localhost", "DNS:localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    with following(log, url) as webhook:
        append(log, webhook, 1)
        error = until(webhook, lambda state: state.failures > 0).last_error
        assert error and "CERTIFICATE_VERIFY_FAILED" in error
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with following(log, url) as webhook:  # it has not forgotten what it could not deliver
        assert server.numbers(1) == [1]
        assert server.wait_for(1)[0].headers["Host"] == f"localhost:{server.server_port}"
    with following(log, url.replace("localhost", "127.0.0.1")) as webhook:  # the certificate is for another name
        append(log, webhook, 2)
        error = until(webhook, lambda state: state.failures > 0).last_error
        assert error and "CERTIFICATE_VERIFY_FAILED" in error
    assert len(server.posts) == 1


# ---- which are sent --------------------------------------------------------------------------------------------------


def test_what_is_wanted(log: EventLog) -> None:
    dog, cat = query("a dog runs"), query("a cat sleeps")
    log.append(
        [
            event(1),
            event(2, kind=Kind.CLOSED, end_ns=20_000_000_000),
            event(1, asked=cat),
            event(1, stream="yard"),
            status(1),
            replace(event(3), backfill=True),
        ]
    )

    def numbers(wanted: Callable[[Entry], bool]) -> list[int]:
        return [entry.number for entry in log.read(0) if wanted(entry)]

    assert numbers(wants(None, None, None)) == [1, 2, 3, 4, 5]  # never old news
    assert numbers(wants({Kind.CLOSED, Kind.STATUS}, None, None)) == [2, 5]
    assert numbers(wants(None, ["yard"], None)) == [4]
    assert numbers(wants(None, None, [cat.id])) == [3, 5]
    assert numbers(wants({Kind.OPENED}, {"door"}, {dog.id})) == [1]
    assert numbers(wants((), None, None)) == []


def test_skipped_events_move_the_position_but_are_not_saved_one_by_one(server: Server, log: EventLog) -> None:
    with following(log, server.url, wants(None, ["yard"], None)) as webhook:
        key = Receiver(server.url).key
        assert log.position(key) == 0
        append(log, webhook, 1)
        until(webhook, lambda _: log.position(key) == 1)
        for seq in range(2, 52):
            append(log, webhook, seq)
        until(webhook, lambda state: state.lag == 0)
        assert log.position(key) == 1  # it was saved just before
        log.append([event(1, "yard")])
        webhook.wake()
        assert server.numbers(1) == [52]
        append(log, webhook, 52)
        until(webhook, lambda state: state.lag == 0)
    assert log.position(key) == 53  # close() saves


# ---- receivers in trouble --------------------------------------------------------------------------------------------


def test_what_fails_is_tried_again_later_and_later_and_the_rest_waits(server: Server, log: EventLog) -> None:
    server.answers = [204, 500, 429, 204]
    with following(log, server.url) as webhook:
        append(log, webhook, 1, 2, 3)
        until(webhook, lambda state: state.failures == 1)
        assert webhook.state.last_error == "answered 500" and webhook.state.lag == 2
        posts = server.wait_for(5)
        state = until(webhook, lambda state: state.delivered == 3)
    assert [post.number for post in posts] == [1, 2, 2, 2, 3]
    assert 0.8 <= posts[2].at_s - posts[1].at_s < 1.6
    assert 1.6 <= posts[3].at_s - posts[2].at_s < 4.0
    assert (state.refused, state.failures, state.failed, state.last_error, state.lag) == (0, 0, 2, None, 0)
    assert len({post.headers["webhook-id"] for post in posts[1:4]}) == 1
    assert posts[1].headers["webhook-timestamp"] < posts[3].headers["webhook-timestamp"]  # of the attempt


def test_delays_double_up_to_five_minutes() -> None:
    for failures, mean_s in ((1, 1), (2, 2), (5, 16), (9, 256), (10, 300), (100_000, 300)):
        delays = [retry_delay_s(failures) for _ in range(50)]
        assert 0.8 * mean_s <= min(delays) < mean_s < max(delays) <= 1.2 * mean_s


def test_an_event_that_is_refused_is_said_once_and_skipped(
    server: Server, log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [400, 410, 204, 404]
    with following(log, server.url) as webhook:
        append(log, webhook, 1, 2, 3, 4, 5)
        assert server.numbers(5) == [1, 2, 3, 4, 5]
        state = until(webhook, lambda state: state.delivered == 2)
        assert state.refused == 3
    warnings = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[2] for line in warnings] == [
        "refused event 1: answered 400",
        "refused event 2: answered 410",
        "refused event 4: answered 404",
    ]


def test_redirects_are_not_followed(server: Server, log: EventLog) -> None:
    elsewhere = Server()
    server.answers = [(code, {"Location": elsewhere.url}) for code in (301, 302, 307, 308)]
    with following(log, server.url) as webhook:
        append(log, webhook, 1, 2, 3, 4)
        state = until(webhook, lambda state: state.refused == 4)
        assert state.last_error == "answered 308: redirects are not followed, set the URL it moved to"
    elsewhere.stop()
    assert not elsewhere.posts


def test_a_receiver_may_ask_for_more_time(server: Server, log: EventLog) -> None:
    server.answers = [(503, {"Retry-After": "2"}), (503, {"Retry-After": "3000"})]
    with following(log, server.url) as webhook:
        append(log, webhook, 1)
        posts = server.wait_for(2)
        assert 2.0 <= posts[1].at_s - posts[0].at_s < 4.0
        until(webhook, lambda state: state.failures == 2)
        # And close() does not wait for it.


def test_retry_after() -> None:
    now = 1_777_863_721.0
    assert retry_after_s("120", now) == 120
    assert retry_after_s(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after_s(formatdate(now - 90, usegmt=True), now) == 0
    assert retry_after_s("86400", now) == retry_after_s(formatdate(now + 9999, usegmt=True), now) == 3600
    for nonsense in (None, "", " ", "soon", "-3", "1.5", "9" * 5000, "²", ",", "Mon", "Mon, 99 Foo 2026 99:99:99 GMT"):
        assert retry_after_s(nonsense, now) in (0.0, 3600.0)


def test_one_who_is_not_there_gets_everything_when_he_comes(log: EventLog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with following(log, f"http://127.0.0.1:{port}/hook") as webhook:
        append(log, webhook, 1, 2, 3)
        state = until(webhook, lambda state: state.failures == 1)
        assert state.last_error == "Connection refused" and state.lag == 3
        server = Server(port)
        assert server.numbers(3) == [1, 2, 3]
    server.stop()


def test_a_restart_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    log = EventLog(path)
    with following(log, server.url) as webhook:
        append(log, webhook, 1, 2)
        until(webhook, lambda state: state.delivered == 2)
    append(log, None, 3)
    log.close()
    log = EventLog(path)  # which closes the three moments that were open: numbers 4, 5 and 6
    with following(log, server.url) as webhook:
        append(log, webhook, 4)
        assert server.numbers(7) == [1, 2, 3, 4, 5, 6, 7]
        until(webhook, lambda state: state.delivered == 5)
    log.close()
    assert len({post.headers["webhook-id"] for post in server.posts}) == 7


def test_two_webhooks_do_not_hold_each_other_up(server: Server, log: EventLog) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        following(log, f"http://127.0.0.1:{silent.getsockname()[1]}/") as stuck,
        following(log, server.url) as webhook,
    ):
        for seq in range(1, 101):
            append(log, webhook, seq)
            stuck.wake()
        assert server.numbers(100) == list(range(1, 101))
        assert stuck.state.lag == 100


def drip(
    handler: BaseHTTPRequestHandler, begin: bytes = b"HTTP/1.1 200 OK\r\n", more: bytes = b"X-More: and more\r\n"
) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(begin)
        while True:
            handler.wfile.write(more)
            time.sleep(0.02)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    drip(handler, b"HTTP/1.1 200 OK\r\n\r\n", b"and more")


def go_on_for_ever(handler: BaseHTTPRequestHandler) -> None:
    drip(handler, b"", b"HTTP/1.1 100 Continue\r\n\r\n")


def hang(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read()  # until the other side goes


@pytest.mark.parametrize("answer", [drip, hang, go_on_for_ever])
def test_an_answer_that_takes_too_long_is_none(
    server: Server, answer: Callable[[BaseHTTPRequestHandler], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_post, "ANSWER_S", 0.5)
    server.answers = [answer]
    started = time.monotonic()
    with pytest.raises(PostError, match=r"no answer within 0\.5 s"):
        Request(Receiver(server.url)).post(b"{}", {})
    assert 0.4 < time.monotonic() - started < 1.0


def test_the_status_counts_even_if_the_rest_of_the_answer_never_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_post, "ANSWER_S", 0.5)
    server.answers = [drip_body]
    started = time.monotonic()
    assert Request(Receiver(server.url)).post(b"{}", {}) == (200, 0.0)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("answer", [drip, hang])
def test_close_does_not_wait_for_the_receiver_and_nothing_is_lost(
    server: Server, log: EventLog, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    server.answers = [204, answer]
    with following(log, server.url) as webhook:
        append(log, webhook, 1, 2)
        server.wait_for(2)
        time.sleep(QUIET_S)  # it has seen the status by then, but not the end of the headers
        started = time.monotonic()
        webhook.close()
        assert time.monotonic() - started < 0.5
        webhook.close()
        webhook.wake()
    with following(log, server.url):
        assert server.numbers(3) == [1, 2, 2]


@pytest.mark.parametrize("tls", [False, True])
def test_close_while_it_connects(log: EventLog, tls: bool) -> None:
    with contextlib.ExitStack() as links:
        full = links.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        if not tls:  # a queue of connections that is full: the next one gets no answer. With TLS: none to its hello.
            for _ in range(3):
                link = links.enter_context(socket.socket())
                link.setblocking(False)
                link.connect_ex(("127.0.0.1", port))
        with following(log, f"http{'s' if tls else ''}://127.0.0.1:{port}/") as webhook:
            append(log, webhook, 1)
            time.sleep(QUIET_S)
            started = time.monotonic()
            webhook.close()
            assert time.monotonic() - started < 0.5
            assert webhook.state.lag == 1


def test_answers_that_are_not_http_are_tried_again_whatever_they_are() -> None:
    rng = random.Random(5)
    pieces = [
        b"HTTP/1.1 ",
        b"200",
        b" OK",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Length: ",
        b"-1",
        b"99999999999",
        b"chunked",
    ]
    pieces += [b"Transfer-Encoding: ", b"Retry-After: ", b":", b"\0", b"x" * 70_000, b"HTTP/1.1 503 \r\n", b"\xff"]
    outcomes: dict[str, int] = {}

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with link, contextlib.suppress(OSError):
                    link.recv(4096)
                    begin = b"HTTP/1.1 200 OK\r\n" * rng.randrange(2)
                    link.sendall(begin + b"".join(rng.choices(pieces, k=rng.randrange(7))))  # at times nothing

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        receiver = Receiver(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        for _ in range(500):
            try:
                status, wait_s = Request(receiver).post(b"{}", {})
                assert 100 <= status <= 999 and 0 <= wait_s <= 3600
            except PostError as error:
                outcomes[str(error)] = outcomes.get(str(error), 0) + 1
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert outcomes.keys() == {"its answer is not HTTP", "hung up without an answer"}


def test_what_has_left_the_log_is_counted(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path / "events.sqlite", max_bytes=200_000)
    server.answers = [503]
    with following(log, server.url) as webhook:
        append(log, webhook, 1)
        until(webhook, lambda state: state.failures == 1)
        for start in range(2, 2002, 100):
            append(log, webhook, *range(start, start + 100))
        first = log.first
        assert first > 300
        numbers = server.numbers(2 + log.last - first + 1)
        # What was in its hands is delivered, and what the log still has.
        assert numbers == [1, 1, *range(first, 2002)]
        state = until(webhook, lambda state: state.lag == 0)
        assert (state.delivered, state.lost) == (len(numbers) - 1, first - 2)
    assert f"{first - 2} events had left the log before their turn" in caplog.text
    log.close()


# ---- what the user got wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hook",
        "ftp://example.com/",
        "http://",
        "https:///hook",
        "http://[::1",
        "http://a:b/",
        "http://a:99999/",
        "http://a b/",
        "http://a/\nx",
        "http://a/ b",
        f"http://{'a' * 70}.com/",
        "http://a/\ud800",
    ],
)
def test_urls_that_are_none(log: EventLog, url: str) -> None:
    with pytest.raises(InputError, match=r"must look like https://HOST/PATH") as caught:
        Webhook(log, url.replace("//", "//me:secret@", 1), secret=None, wanted=ALL)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_not base64!", "whsec_abc", "whsec_é"])
def test_secrets_that_are_none(log: EventLog, secret: str) -> None:
    with pytest.raises(InputError, match="the secret of a webhook") as caught:
        Webhook(log, "http://127.0.0.1/", secret=secret, wanted=ALL)
    assert "\n" not in str(caught.value) and "abc" not in str(caught.value)


def test_unusual_urls_are_sent_as_they_should_be(server: Server, log: EventLog) -> None:
    with following(log, server.url + "/küche/a%20b?q=é&r=%26#top") as webhook:
        append(log, webhook, 1)
        assert server.wait_for(1)[0].path == "/hook/k%C3%BCche/a%20b?q=%C3%A9&r=%26"
