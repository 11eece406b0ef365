"""Events over HTTP: each webhook follows the event log at its receiver's pace and signs what it sends.

Headers and signature are those of Standard Webhooks 1.0, the body is the CloudEvent as it is stored.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib import metadata

from kernels.errors import InputError, LogError
from stream.deliver.http_post import PostError, Receiver, Request
from stream.deliver.log import Entry, EventLog
from stream.types import Kind

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 300.0
SAVE_S = 1.0
"""How often a position is saved that moved over skipped events alone."""
CLOSE_S = 1.0
RETRIED = {408, 425, 429}  # and 5xx


def wants(
    kinds: Collection[Kind] | None, streams: Collection[str] | None, query_ids: Collection[str] | None
) -> Callable[[Entry], bool]:
    """Which entries a webhook sends; None: all. A status belongs to no query, so `query_ids` lets it pass.

    Moments that were over before their query was asked are old news, and never sent.
    """

    def wanted(entry: Entry) -> bool:
        return (
            not entry.backfill
            and (kinds is None or entry.kind in kinds)
            and (streams is None or entry.stream in streams)
            and (query_ids is None or entry.query_id is None or entry.query_id in query_ids)
        )

    return wanted


@dataclass(frozen=True)
class WebhookState:
    """How a webhook is doing since it was started."""

    name: str  # of the receiver, without what may be secret in its URL
    delivered: int = 0
    refused: int = 0  # events that the receiver does not want, by its answer
    lost: int = 0  # events that left the log before their turn, wanted or not
    failures: int = 0  # in a row, of the event that is tried
    failed: int = 0  # attempts in all
    last_error: str | None = None  # of the newest attempt; None if that went well
    lag: int = 0  # entries of the log that are still to be looked at


class Webhook:
    """One receiver of events over HTTP, with a thread of its own that follows the log.

    Each wanted event is sent at least once, in order: one that fails is tried until the receiver takes or refuses it,
    and the others wait in the log. A receiver that is away for so long that the log overflows loses the oldest. An
    answer that is lost on its way, or a crash before the position is saved, makes the same event come twice, with the
    same `webhook-id`.

    The position is kept under the receiver's URL without user and password: two webhooks with one URL would share it,
    and one whose URL changes begins anew.
    """

    def __init__(self, log: EventLog, url: str, *, secret: str | None, wanted: Callable[[Entry], bool]) -> None:
        """`secret` signs; with the prefix whsec_ it is base64. InputError for a URL or a secret that is none."""
        self._log = log
        self._receiver = Receiver(url)
        self._key = None if secret is None else signing_key(secret)
        self._wanted = wanted
        self._agent = f"livemoments/{metadata.version('livemoments')}"
        self._state = WebhookState(self._receiver.name)
        self._position: int | None = None  # the last entry that was dealt with; None before the start
        self._unsaved, self._saved_s = False, -math.inf
        self._woken, self._closing = threading.Event(), threading.Event()
        self._request: Request | None = None
        # A name that is looked up cannot be interrupted: then close() leaves the thread behind.
        self._thread = threading.Thread(target=self._follow, name=self._receiver.name, daemon=True)

    @property
    def state(self) -> WebhookState:
        """For any thread."""
        lag = 0 if self._position is None else max(0, self._log.last - self._position)
        return replace(self._state, lag=lag)

    def start(self) -> None:
        """Goes on where it was; the first time, with what is appended from now on. LogError if the log fails."""
        position = self._log.position(self._receiver.key)
        if position is None:
            position = self._log.last
            self._log.keep_position(self._receiver.key, position)
        self._position = position
        self._thread.start()

    def wake(self) -> None:
        """Something was appended. Any thread, never blocks."""
        self._woken.set()

    def close(self) -> None:
        """Back within CLOSE_S, whatever the receiver does. Close it before the log.

        What was not delivered is delivered by the next webhook to this URL; so is an event whose answer did not come
        in time.
        """
        self._closing.set()
        self._woken.set()
        if request := self._request:
            request.cut()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _follow(self) -> None:
        assert self._position is not None
        while not self._closing.is_set():
            self._woken.clear()
            try:
                entries = self._log.read(self._position)
            except LogError as error:
                if self._state.last_error != str(error):
                    log.warning("webhook %s: %s", self._state.name, error)
                self._state = replace(self._state, last_error=str(error))
                self._closing.wait(FIRST_RETRY_S)
                continue
            for entry in entries:
                lost = entry.number - self._position - 1
                if lost:
                    log.warning("webhook %s: %d events had left the log before their turn", self._state.name, lost)
                    self._state = replace(self._state, lost=self._state.lost + lost)
                is_wanted = self._wanted(entry)
                if is_wanted and not self._deliver(entry):
                    break
                self._position, self._unsaved = entry.number, True
                if is_wanted:
                    self._save()
            if not entries:
                due_s = self._saved_s + SAVE_S - time.monotonic()
                if self._unsaved and due_s <= 0:
                    self._save()
                else:
                    self._woken.wait(due_s if self._unsaved else None)
        if self._unsaved:
            self._save()

    def _save(self) -> None:
        assert self._position is not None
        self._saved_s = time.monotonic()
        try:
            self._log.keep_position(self._receiver.key, self._position)
            self._unsaved = False
        except (LogError, ValueError) as error:  # ValueError: closed. Some events come twice then, which they may
            log.warning("webhook %s: its position is not saved: %s", self._state.name, error)

    def _deliver(self, entry: Entry) -> bool:
        """Sends an entry until the receiver takes or refuses it. False if close() came first."""
        while not self._closing.is_set():
            state, retry_after_s = self._state, 0.0
            self._request = request = Request(self._receiver)
            if self._closing.is_set():  # close() may have looked for a request just before there was one
                return False
            try:
                status, retry_after_s = request.post(entry.payload, self._headers(entry))
                error = f"answered {status}"
            except PostError as failure:
                status, error = None, str(failure)
            if status is not None and 200 <= status < 300:
                if state.failures:
                    log.info("webhook %s: takes events again after %d failures", state.name, state.failures)
                self._state = replace(state, delivered=state.delivered + 1, failures=0, last_error=None)
                return True
            if status is not None and status not in RETRIED and not 500 <= status < 600:
                hint = ": redirects are not followed, set the URL it moved to" if 300 <= status < 400 else ""
                log.warning("webhook %s: refused event %d: %s%s", state.name, entry.number, error, hint)
                self._state = replace(state, refused=state.refused + 1, failures=0, last_error=error + hint)
                return True
            if self._closing.is_set():
                return False
            failures = state.failures + 1
            delay_s = max(retry_delay_s(failures), retry_after_s)
            level = logging.WARNING if failures == 1 else logging.DEBUG
            log.log(level, "webhook %s: %s: tried again in %.0f s, until it works", state.name, error, delay_s)
            self._state = replace(state, failures=failures, failed=state.failed + 1, last_error=error)
            self._closing.wait(delay_s)
        return False

    def _headers(self, entry: Entry) -> dict[str, str]:
        # Not the CloudEvent's id, which is unique within one source only and may hold full stops, a danger in what is
        # signed: its first part names the run of the program, and the number never repeats in one log.
        run = json.loads(entry.payload)["id"].partition("/")[0]
        message_id, now = f"{run}-{entry.number}", str(int(time.time()))
        headers = {
            "Content-Type": "application/cloudevents+json",
            "User-Agent": self._agent,
            "webhook-id": message_id,
            "webhook-timestamp": now,
        }
        if self._key is not None:
            headers["webhook-signature"] = sign(self._key, message_id, now, entry.payload)
        return headers


def retry_delay_s(failures: int) -> float:
    """How long to wait after so many failures in a row. Jittered: what failed together is not tried together."""
    doublings = min(failures - 1, 20)  # a power of 2 that grew for days would not fit a float
    return min(FIRST_RETRY_S * 2.0**doublings, LAST_RETRY_S) * random.uniform(0.8, 1.2)


def sign(key: bytes, message_id: str, timestamp: str, payload: bytes) -> str:
    """The header `webhook-signature` of Standard Webhooks, version 1."""
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + payload, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def signing_key(secret: str) -> bytes:
    """The key that a secret stands for: the bytes after whsec_, which are base64, or those of the text itself.

    InputError for one that is empty or broken; the text does not show it.
    """
    try:
        is_coded = secret.startswith("whsec_")
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True) if is_coded else secret.encode()
    except (binascii.Error, ValueError):
        raise InputError("the secret of a webhook begins with whsec_, but what follows is not base64") from None
    if not key:
        raise InputError("the secret of a webhook is empty: give one, or none at all")
    return key
