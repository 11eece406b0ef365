"""One HTTP POST in a bounded time, which another thread may cut off.

http.client is all it takes: what a larger library adds (pools, redirects, retries of its own) would have to be
switched off, and none of them bounds the time of a whole answer. Here a timer cuts the connection. Proxies that the
environment names are not used.
"""

import base64
import contextlib
import hashlib
import http.client
import socket
import ssl
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote, urlsplit

from kernels.errors import InputError

ANSWER_S = 10.0
"""Time for one request, from the connection to the end of the answer."""
MAX_RETRY_AFTER_S = 3600.0
"""A receiver may ask for a longer break, but for no more than this."""
_MAX_ANSWER_BYTES = 1 << 16


class PostError(Exception):
    """There was no answer. Its text shows nothing of the URL but the host."""


class Receiver:
    """Where a URL leads. User and password in it are sent as HTTP asks for."""

    def __init__(self, url: str) -> None:
        """InputError, which does not show it, for a URL that is none."""
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            self.host.encode("idna")
        except ValueError:
            parts, self.host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self.host or not url.isprintable() or " " in url:
            raise InputError("a webhook's URL must look like https://HOST/PATH")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        # "%" stays: what is quoted already is not quoted twice.
        self.path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="%/:=&?~+!$,;'@()*[]")
        user, _, address = parts.netloc.rpartition("@")
        digest = hashlib.sha256(f"{parts.scheme}://{address}{self.path}".encode()).hexdigest()[:16]
        # Many services put their secret into the path.
        self.name = f"{parts.scheme}://{address} ({digest[:6]})"
        self.key = f"webhook {address} {digest}"
        login = unquote(user if ":" in user else f"{user}:").encode()
        self.login = base64.b64encode(login).decode() if user else None


class Request:
    """One POST, that may be cut off from another thread."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._lock = threading.Lock()  # of the two below
        self._link: socket.socket | None = None
        self._is_cut = False

    def cut(self) -> None:
        """Makes `post` fail at once."""
        with self._lock:
            self._is_cut = True
            if self._link:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's: that one drops the encryption first, while `post` may be writing.
                    socket.socket.shutdown(self._link, socket.SHUT_RDWR)

    def post(self, payload: bytes, headers: dict[str, str]) -> tuple[int, float]:
        """The status of the answer, and the seconds of its Retry-After, 0 for none.

        PostError if there was no answer within ANSWER_S, though the look-up of a name may take longer.
        """
        timer = threading.Timer(ANSWER_S, self.cut)
        timer.daemon = True
        timer.start()
        try:
            return self._post(payload, headers)
        except (OSError, http.client.HTTPException) as error:
            raise PostError(self._explain(error)) from error
        finally:
            timer.cancel()
            with self._lock:
                if self._link:
                    self._link.close()

    def _post(self, payload: bytes, headers: dict[str, str]) -> tuple[int, float]:
        receiver = self._receiver
        connection = http.client.HTTPConnection(receiver.host, receiver.port)
        connection.default_port = 443 if receiver.tls else 80  # it is left out of the Host header
        connection.sock = self._connect(time.monotonic() + ANSWER_S)
        if receiver.login:
            headers = {**headers, "Authorization": f"Basic {receiver.login}"}
        try:
            connection.request("POST", receiver.path, payload, {**headers, "Connection": "close"})
            with connection.getresponse() as answer:
                if self._is_cut:  # http.client takes headers that break off for complete
                    raise TimeoutError
                with contextlib.suppress(OSError, http.client.HTTPException):  # the status is all that counts
                    answer.read(_MAX_ANSWER_BYTES)  # who hangs up before the end looks like an accident over there
                return answer.status, retry_after_s(answer.headers.get("Retry-After"), time.time())
        finally:
            connection.close()

    def _explain(self, error: Exception) -> str:
        if self._is_cut or isinstance(error, TimeoutError):
            return f"no answer within {ANSWER_S:g} s"
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            return "hung up without an answer"
        if isinstance(error, http.client.HTTPException):
            return "its answer is not HTTP"
        return str(getattr(error, "strerror", None) or error or type(error).__name__)

    def _connect(self, deadline_s: float) -> socket.socket:
        receiver = self._receiver
        places = socket.getaddrinfo(receiver.host, receiver.port, type=socket.SOCK_STREAM)
        for left, (family, kind, protocol, _, address) in zip(range(len(places), 0, -1), places, strict=True):
            link = self._hold(socket.socket(family, kind, protocol))
            try:
                link.settimeout(max(0.01, (deadline_s - time.monotonic()) / left))
                link.connect(address)
                break
            except OSError:
                link.close()
                if left == 1:
                    raise
        link.settimeout(max(0.01, deadline_s - time.monotonic()))
        if receiver.tls:
            tls = receiver.tls.wrap_socket(link, server_hostname=receiver.host, do_handshake_on_connect=False)
            link = self._hold(tls)
            tls.do_handshake()
        return link

    def _hold(self, link: socket.socket) -> socket.socket:
        """Makes it the socket that `cut` cuts."""
        with self._lock:
            self._link = link
            if self._is_cut:
                raise TimeoutError
        return link


def retry_after_s(value: str | None, now_s: float) -> float:
    """Seconds from a Retry-After header, which holds seconds or a date. What cannot be read counts as none."""
    if not value:
        return 0.0
    try:
        seconds = float(int(value)) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - now_s
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
