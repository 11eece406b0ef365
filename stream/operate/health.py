"""Whether the service works, and whether it can serve. Nothing is done here but to look; any thread may."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stream.service.service import Service

STUCK_S = 30.0
"""A turn takes milliseconds; one that takes so long hangs, or fails each time."""


class Pulse:
    """The turns of the engine's thread, which counts them."""

    def __init__(self) -> None:
        self.turns = self.failed = 0
        self.turned_s = time.monotonic()  # when the newest that did not fail was over

    def turned(self) -> None:
        self.turns += 1
        self.turned_s = time.monotonic()


def healthy(service: "Service", stuck_s: float = STUCK_S) -> tuple[bool, list[str]]:
    """Whether its threads do their work. If not, only another start helps: that is what a supervisor asks for.

    A disk that is full and cameras that are away are none of this: a restart would help neither.
    """
    reasons = []
    if (silent_s := time.monotonic() - service.pulse.turned_s) > stuck_s:
        reasons.append(f"the engine has not finished a turn for {silent_s:.0f} s")
    if not service.sockets.alive:
        reasons.append("the delivery of events has stopped")
    return not reasons, reasons


def ready(service: "Service", stuck_s: float = STUCK_S) -> tuple[bool, list[str]]:
    """Whether it can serve: the engine turns, events are stored, the sockets are open. And all that is not as it
    should be, in words.

    A stream without pictures is among the reasons, so that whoever looks sees it, but does not make the service
    unready: others are served all the same, and a balancer that took this one away would help nobody.
    """
    _, reasons = healthy(service, stuck_s)
    if not service.pulse.turns:
        reasons.append("the engine has not made its first turn")
    if problem := service.sockets.problem:
        reasons.append(f"events cannot be stored: {problem}")
    ok = not reasons
    for name, stream in service.watched.items():
        state = stream.feed.state
        if state.state != "connected":
            reasons.append(f"stream {name}: {state.state}" + (f": {state.reason}" if state.reason else ""))
    return ok, reasons
