"""What to ask a server for, at first and after each break, so that nothing is missed and nothing told twice. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stream.deliver.interest import ANY
from stream.types import normalise

Message = Mapping[str, Any]


@dataclass(eq=False)
class _Place:
    """How far one subscription is."""

    text: str
    number: int | None  # all that it is told up to this number of the log has come; None: its past has not
    query_id: str = ""
    answered: int = 0  # the last number of the log when the server took the subscription
    caught_up: bool = False  # on this connection
    seen: set[int] = field(default_factory=set)  # what has come of the past, as long as `number` is None


class Resume:
    """The subscriptions of one client, over any number of connections to one server."""

    def __init__(self, queries: Sequence[str], options: Message, since: int | None) -> None:
        """
        Args:
            queries: texts; none: every event.
            options: what else to ask for with each.
            since: begin after this number of the log.
        """
        texts = {normalise(text): text for text in reversed(queries or [ANY])}
        self._places = [_Place(text, since) for text in reversed(texts.values())]
        self._options = dict(options)
        self._answers: deque[_Place] = deque()
        self._status = 0  # the newest of all streams' status

    def requests(self) -> list[dict[str, Any]]:
        """What to send over a new connection."""
        self._answers = deque(self._places)
        for place in self._places:
            place.caught_up = False
        return [self._request(place) for place in self._places]

    def is_news(self, message: Message) -> bool:
        """Takes note of what came: whether it is an event to be shown."""
        match message.get("op"):
            case None:
                return self._is_new(message)
            case "subscribed" if self._answers:
                self._subscribed(self._answers.popleft(), message)
            case "caught_up":
                for place in self._places:
                    if place.query_id == message.get("query_id"):
                        place.caught_up = True
                        # By backfill other streams may be behind: from the subscription on, nothing is missed.
                        reached = place.answered if place.number is None else message["lognumber"]
                        place.number = max(place.number or 0, reached)
                        place.seen.clear()
        return False

    def _request(self, place: _Place) -> dict[str, Any]:
        request = {"op": "subscribe", "query": place.text, **self._options}
        if place.number is None:
            return request
        request.pop("backfill", None)
        return request | {"since": place.number}

    def _subscribed(self, place: _Place, message: Message) -> None:
        place.query_id, place.answered = message["query_id"], message["lognumber"]
        if place.number is not None and place.answered < place.number:  # another log: it counts from 1 again
            place.number, self._status = place.answered, 0
        if place.text == ANY and place.number is None:  # nothing is told of its past
            place.number, place.caught_up = place.answered, True

    def _is_new(self, message: Message) -> bool:
        number, query_id = message.get("lognumber"), message.get("subject")
        if number is None:  # what has no place in the log: that something was lost
            return True
        own = [place for place in self._places if len(self._places) == 1 or place.query_id == query_id]
        if query_id is None:
            if number <= self._status:
                return False
            self._status = number
        for place in own:
            if place.number is None:
                if number in place.seen:
                    return False
                place.seen.add(number)
        # As long as one is not caught up, the log is not told in order.
        for place in self._places if all(place.caught_up for place in self._places) else own:
            if place.number is not None:
                place.number = max(place.number, number)
        return True
