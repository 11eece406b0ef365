"""What a client is told of the past: from a number of the log on, or by backfill, and where the present begins."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stream.deliver.log import KEPT, EventLog
from stream.deliver.peer import Join, Peer, Want
from stream.deliver.websocket import Client
from stream.events import LOST_TYPE
from stream.types import NS, Clip, Event, Kind, Moment
from tests.sockets import QUIET_S, WAIT_S, Program, ask, next_event, next_message, quiet, wait_for
from tests.test_events import DOG, event, query, status

CAT = query("a cat sleeps")


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


def moment(number: int, kind: Kind, start_s: float, end_s: float | None = None, stream: str = "door") -> Event:
    """An event of the dog's moment `number`; UTC is such that stream time 1000 s is now."""
    found = Moment(
        f"m{number}", stream, DOG.id, round(start_s * NS), None if end_s is None else round(end_s * NS), 0, 0.75
    )
    now_ns = time.time_ns()
    seq = 2 * number + (kind is Kind.CLOSED)
    return Event(kind, stream, seq, now_ns - 1000 * NS, now_ns, DOG, found, 0.5)


def numbers_until(client: Client, last: int) -> list[int]:
    numbers = [0]
    while numbers[-1] != last:
        numbers.append(next_event(client)["lognumber"])
    return numbers[1:]


# ---- since -----------------------------------------------------------------------------------------------------------


def test_since_tells_all_that_came_after_a_number_in_order_and_then_goes_on(program: Program) -> None:
    entries = program.tell(
        *(each for seq in range(1, 101) for each in (event(seq), event(seq, asked=CAT), status(seq)))
    )
    with Client(program.url, WAIT_S) as client:
        assert ask(client, op="subscribe", query=DOG.text, since=150)["lognumber"] == 300
        messages = [next_message(client) for _ in range(100)]
        assert [m["lognumber"] for m in messages] == [e.number for e in entries[150:] if e.query_id in (DOG.id, None)]
        assert {json.dumps(next_message(client), sort_keys=True) for _ in program.names} == {
            json.dumps({"op": "caught_up", "query_id": DOG.id, "stream": name, "lognumber": 300}, sort_keys=True)
            for name in program.names
        }
        (entry,) = program.tell(event(101))
        assert client.receive(WAIT_S) == entry.payload
        assert quiet(client)
    with Client(program.url, WAIT_S) as client:
        ask(client, op="subscribe", query="*", since=299, stream="door")
        assert [next_message(client).get("lognumber") for _ in range(3)] == [300, 301, 301]
        assert quiet(client)
        with_nothing_new = ask(client, op="subscribe", query="*", since=10**9)  # a number of another log
        assert with_nothing_new["lognumber"] == 301
        program.tell(event(102))
        assert next_event(client)["lognumber"] == 302
        assert quiet(client)  # once, though it has two subscriptions to it


def test_a_client_that_comes_back_again_and_again_gets_each_event_once_and_in_order(tmp_path: Path) -> None:
    """While events come, from memory and from the disk."""
    total, done = KEPT + 1904, threading.Event()
    with Program(EventLog(tmp_path / "events.db")) as program:

        def tell() -> None:
            for first in range(1, total, 100):
                program.tell(*(event(seq) for seq in range(first, first + 100)))
            done.set()

        teller = threading.Thread(target=tell)
        teller.start()
        got: list[int] = []
        while len(got) < total:
            text, until = ("*", DOG.text)[len(got) % 2], min(total, len(got) + 2001)
            with Client(program.url, WAIT_S) as client:
                client.send({"op": "subscribe", "query": text, "since": got[-1] if got else 0})
                while len(got) < until:
                    message = next_message(client)
                    got += [] if "op" in message else [message["lognumber"]]
        teller.join(WAIT_S)
        assert done.is_set() and got == list(range(1, total + 1))


def test_several_subscriptions_since_one_number_tell_each_event_once(program: Program) -> None:
    for _ in range(20):  # how far the first has come when the second is asked for is a race
        last = program.log.last
        seqs = range(last // 3 + 1, last // 3 + 41)
        program.tell(*(each for seq in seqs for each in (event(seq), event(seq, asked=CAT), status(seq))))
        with Client(program.url, WAIT_S) as client:
            for text in (DOG.text, CAT.text, "*"):
                client.send({"op": "subscribe", "query": text, "since": last})
            got: list[dict[str, Any]] = []
            while len(got) < 120:
                message = next_message(client)
                assert message.get("op") in (None, "subscribed", "caught_up")
                got += [] if "op" in message else [message]
            assert sorted(m["lognumber"] for m in got) == list(range(last + 1, last + 121))
            for subject in (DOG.id, CAT.id, None):
                numbers = [m["lognumber"] for m in got if m.get("subject") == subject]
                assert numbers == sorted(numbers)


def test_since_a_number_that_the_log_holds_no_more_says_how_much_is_lost() -> None:
    with Program(EventLog(None, max_bytes=300_000)) as program:
        for seq in range(1, 2001):
            program.tell(event(seq))
        first = program.log.first
        assert first > 1000
        with Client(program.url, WAIT_S) as client:
            ask(client, op="subscribe", query=DOG.text, since=7)
            notice = next_message(client)
            assert notice["type"] == LOST_TYPE and notice["data"]["lost"] == first - 8
            assert program.server.board.tally.lost == first - 8
            assert numbers_until(client, 2000) == list(range(first, 2001))


def test_going_back_does_not_repeat_what_another_subscription_has_told(program: Program) -> None:
    program.tell(*(event(seq) for seq in range(1, 11)), *(event(seq, asked=CAT) for seq in range(1, 11)))
    with Client(program.url, WAIT_S) as client:
        ask(client, op="subscribe", query=DOG.text, since=0)
        assert numbers_until(client, 10) == list(range(1, 11))
        ask(client, op="subscribe", query="*", since=5)
        assert numbers_until(client, 20) == list(range(11, 21))  # the dogs from 6 to 10 were told
        ask(client, op="unsubscribe", query=DOG.text)
        program.tell(event(11))
        assert next_event(client)["lognumber"] == 21
        ask(client, op="subscribe", query="*", since=18)  # asked again in these words: told again
        assert numbers_until(client, 21) == [19, 20, 21]
        assert quiet(client)


# ---- backfill --------------------------------------------------------------------------------------------------------


def test_the_past_of_a_query_is_told_before_what_comes() -> None:
    with (
        Program(waits=True, history_s=600) as program,
        Client(program.url, WAIT_S) as client,
        Client(program.url, WAIT_S) as all_,
    ):
        ask(all_, op="subscribe", query="*")
        old = [moment(1, Kind.OPENED, 100), moment(1, Kind.CLOSED, 100, 110)]
        recent = [moment(2, Kind.OPENED, 900), moment(2, Kind.CLOSED, 900, 910)]
        program.tell(*old, *recent)
        assert ask(client, op="subscribe", query=DOG.text)["lognumber"] == 4
        assert quiet(client)  # the query does not run yet
        found = [
            replace(each, backfill=True) for each in (moment(3, Kind.OPENED, 950), moment(3, Kind.CLOSED, 950, 960))
        ]
        lasts = moment(4, Kind.OPENED, 990)
        program.tell(*found, lasts)
        assert quiet(client)  # found, but the past is not complete
        program.run_queries()
        program.tell(moment(4, Kind.CLOSED, 990, 999))
        messages = [next_message(client) for _ in range(8)]
        assert [m.get("lognumber") for m in messages[:5]] == [3, 4, 5, 6, 7]  # 100 to 110 s is too long ago
        assert [m["data"].get("backfill", False) for m in messages[:5]] == [False, False, True, True, False]
        # What is new on a stream comes after its own past; no stream waits for the past of another.
        rest = [m["stream"] if m.get("op") == "caught_up" else m["lognumber"] for m in messages[5:]]
        assert sorted(rest, key=str) == [8, "door", "yard"] and rest.index("door") < rest.index(8) and quiet(client)
        # Who listens to everything is not told what was over before anybody asked.
        assert [next_event(all_)["lognumber"] for _ in range(6)] == [1, 2, 3, 4, 7, 8]
        assert quiet(all_)


def test_each_asks_for_as_much_of_the_past_as_it_wants() -> None:
    with Program(history_s=600) as program:
        for number, end_s in enumerate((390, 700, 960, 995)):
            program.tell(moment(number, Kind.OPENED, end_s - 10), moment(number, Kind.CLOSED, end_s - 10, end_s))
        program.tell(moment(9, Kind.OPENED, 999))
        for seconds, expected in [
            (0, [9]),
            (100, [5, 6, 7, 8, 9]),
            (1e9, [3, 4, 5, 6, 7, 8, 9]),
            (None, [3, 4, 5, 6, 7, 8, 9]),
        ]:
            with Client(program.url, WAIT_S) as client:
                ask(client, op="subscribe", query=DOG.text, stream="door", backfill=seconds)
                assert numbers_until(client, 9) == expected
                assert next_message(client) == {"op": "caught_up", "query_id": DOG.id, "stream": "door", "lognumber": 9}
        with Client(program.url, WAIT_S) as client:  # on a stream that comes later, too
            ask(client, op="subscribe", query=DOG.text, stream="hall")
            assert quiet(client)
            program.tell(status(1, "hall"))
            assert next_event(client)["lognumber"] == 10
            program.server.join("hall", DOG.id, program.log.last)
            assert next_message(client)["op"] == "caught_up"


def test_what_is_told_while_a_query_joins_is_told_once() -> None:
    """A client may have been sent more of the log than was in it when its query began to run."""
    with Program(waits=True, history_s=600) as program, Client(program.url, WAIT_S) as client:
        ask(client, op="subscribe", query=DOG.text, stream="door")
        program.tell(*(event(seq) for seq in range(1, 11)))
        wait_for(lambda: all(peer.position == 10 for peer in program.server.board.peers))
        program.server.join("door", DOG.id, 6)
        assert numbers_until(client, 10) == list(range(1, 11))
        assert next_message(client)["lognumber"] == 10  # caught up
        program.tell(event(11))
        assert next_event(client)["lognumber"] == 11


def test_past_and_present_meet_without_a_seam_while_events_come(program: Program) -> None:
    done = threading.Event()

    def tell() -> None:
        for seq in range(1, 501):
            program.tell(event(seq))  # a moment that stays open, and so belongs to the past of each that asks
            time.sleep(0.001)
        done.set()

    teller = threading.Thread(target=tell)
    teller.start()
    while not done.is_set():
        with Client(program.url, WAIT_S) as client:
            ask(client, op="subscribe", query=DOG.text)
            count = program.log.last
            assert [next_event(client)["lognumber"] for _ in range(count)] == list(range(1, count + 1))
    teller.join(WAIT_S)


def test_unsubscribing_ends_the_past_too() -> None:
    with Program(waits=True, history_s=600) as program, Client(program.url, WAIT_S) as client:
        program.tell(moment(1, Kind.OPENED, 900))
        ask(client, op="subscribe", query=DOG.text)
        ask(client, op="unsubscribe", query=DOG.text)
        assert program.interest.asked() == []
        program.server.join("door", DOG.id, program.log.last)
        program.tell(moment(2, Kind.OPENED, 950))
        assert ask(client, op="list")["subscriptions"] == []
        assert client.receive(QUIET_S) is None


def test_what_is_due_to_a_client_goes_with_the_subscription() -> None:
    peer, key = Peer(0), ("door", DOG.text, None)
    want = Want("door", DOG.id, DOG.text, None, 0, None, 0)
    peer.wants[key] = want
    peer.joins.append(Join(want, "door", 5))
    assert peer.due() is None  # it follows the log, and is not there yet
    peer.position = 5
    assert peer.due() is peer.joins[0]
    assert peer.drop(key) is want and want.over and peer.due() is None


# ---- cooldown --------------------------------------------------------------------------------------------------------


def test_a_cooldown_keeps_quiet_about_moments_that_follow_too_soon(program: Program) -> None:
    def told(number: int, start_s: float, stream: str = "door") -> list[Event]:
        return [
            moment(number, Kind.OPENED, start_s, None, stream),
            moment(number, Kind.CLOSED, start_s, start_s + 2, stream),
        ]

    with Client(program.url, WAIT_S) as calm, Client(program.url, WAIT_S) as other:
        answer = ask(calm, op="subscribe", query=DOG.text, cooldown=30, since=0)
        assert answer["cooldown"] == 30
        ask(other, op="subscribe", query=DOG.text)
        for number, start_s in enumerate((100, 110, 129.9, 130, 150, 161)):
            program.tell(*told(number, start_s))
        opened, closed = told(6, 170)
        program.tell(opened, *told(6, 170, "yard"), closed)  # another stream has its own, even for one of that name
        expected = [("door", "m0"), ("door", "m3"), ("door", "m5"), ("yard", "m6")]
        got = [next_event(calm)["data"] for _ in range(8)]
        assert [(data["stream"], data["moment_id"]) for data in got] == [each for each in expected for _ in range(2)]
        assert [data["end_s"] is None for data in got] == [True, False] * 4
        assert quiet(calm)
        assert numbers_until(other, 14) == list(range(1, 15))
    with Client(program.url, WAIT_S) as again:  # the past is thinned out in the same way
        ask(again, op="subscribe", query=DOG.text, cooldown=30, since=0)
        assert [next_event(again)["data"]["moment_id"] for _ in range(8)] == [
            name for _, name in expected for _ in "oc"
        ]
        assert quiet(again)
        # Clips come later, and those of moments that were kept quiet are, too.
        for number, start_s in enumerate((100, 110)):
            closed = moment(number, Kind.CLOSED, start_s, start_s + 2, "door")
            clip = Clip(f"clip{number}", 0, NS, 1, thumbnail=False)
            program.tell(replace(closed, kind=Kind.CLIP, seq=100 + number, clip=clip))
        assert next_event(again)["data"]["clip"]["url"] == "/clips/clip0.mp4"
        assert quiet(again)


def test_a_client_that_leaves_takes_its_subscriptions_with_it(program: Program) -> None:
    with Client(program.url, WAIT_S) as client:
        for text in (DOG.text, CAT.text):
            ask(client, op="subscribe", query=text, stream="door", since=0)
        assert program.wanted("door") == {DOG.text, CAT.text}
    wait_for(lambda: program.server.clients == 0 and not program.wanted("door"))
