"""One client, from when it is let in until it has gone: its questions answered, the event log followed for it.

The rules are those of `switchboard.py`; what it is connected by is a `Link`, of WebSocket servers of two kinds.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

from kernels.errors import LogError
from stream.deliver.log import EventLog
from stream.deliver.peer import Join, Peer
from stream.deliver.switchboard import Switchboard
from stream.events import to_json

log = logging.getLogger(__name__)

RETRY_S = 1.0


class Gone(Exception):  # noqa: N818 - nothing is wrong: it is how a conversation ends
    """The client has left."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        """too_large: it was shown the door, for the length of a message."""
        super().__init__(reason)
        self.too_large = too_large


class Link(Protocol):
    """A connected client. Both raise `Gone` once it has left."""

    def messages(self) -> AsyncIterator[str | bytes]:
        """What it sends, until it leaves."""

    async def send(self, payload: bytes) -> None:
        """A text message; returns when the client has taken most of what it was sent."""

    async def give_up(self) -> None:
        """Close it: something went wrong here."""


async def converse(link: Link, board: Switchboard, events: EventLog) -> None:
    """Until the client has gone."""
    peer = board.enter()
    writer = asyncio.create_task(_write(link, peer, board, events))
    try:
        async for message in link.messages():
            # A client that does not read its answers is not read either. The answer is written before anything
            # that it leads to, since nothing is awaited in between.
            await link.send(await board.answer(peer, message))
    except Gone as error:
        board.tally.messages["too_large"] += error.too_large
        log.debug("a client has gone: %s", error)
    finally:
        writer.cancel()
        board.leave(peer)


async def _write(link: Link, peer: Peer, board: Switchboard, events: EventLog) -> None:
    """Follow the log for one client, and the curves if it asked for them."""
    try:
        while True:
            await peer.wake.wait()
            peer.wake.clear()
            while (join := peer.due()) or peer.position < events.last:
                try:
                    await (_tell_past(link, peer, join, events) if join else _tell_next(link, peer, events))
                except LogError as error:  # the disk fails: try again, later
                    log.warning("%s", error)
                    await asyncio.sleep(RETRY_S)
            for curve in board.curves(peer):
                await link.send(curve)
    except Gone:
        pass  # `converse` hears of it too
    except Exception:  # without its writer a client would wait for ever
        log.exception("a client is given up")
        await link.give_up()


async def _tell_next(link: Link, peer: Peer, events: EventLog) -> None:
    position = peer.position
    if events.remembers(position):
        entries = events.read(position)
    else:
        entries = await asyncio.to_thread(events.read, position)
    if entries and position == peer.position:  # while the disk was read it may have had to go back
        for payload in peer.passed(entries):
            await link.send(payload)
    await asyncio.sleep(0)  # `send` to who reads fast does not wait: the others have their turn, too


async def _tell_past(link: Link, peer: Peer, join: Join, events: EventLog) -> None:
    want, number = join.want, join.number
    if want.since_ns is None:
        number = peer.position
    else:
        query = join.stream, want.query_id
        past = await asyncio.to_thread(events.of_query, *query, want.since_ns, number + 1)
        for entry in past:
            if want.over:
                return
            if want.lets_through(entry):
                await link.send(entry.payload)
    if not want.over:
        peer.joins.remove(join)
        caught_up = {"op": "caught_up", "query_id": want.query_id, "stream": join.stream, "lognumber": number}
        await link.send(to_json(caught_up))
