"""A query that comes later is told what it would have been told had it been there: real frames, the real engine."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.camera import clips_folder
from bench.demo import BICYCLE, MAN
from kernels.engine import Engine
from stream.detector import make_query
from stream.history import History, Scores
from stream.moments import MomentOptions
from stream.session import Session, push_all
from stream.types import NS, Event, Features, Frame, Kind, Query, Saliency, Window
from tests.media import frames_of
from trainer.render import FPS, Segment, render
from trainer.render import Kind as Filler

LATER = 25  # frames into the stream at which the late query comes


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Frame]:
    """One a second: an empty room and a man in turn."""
    path = tmp_path_factory.mktemp("backfill") / "phone.mp4"
    man, room = Segment(Filler.CLIP, 5 * FPS, clips_folder() / "carphone_pristine.mp4"), Segment(Filler.ROOM, 4 * FPS)
    render([room, man] * 4 + [room], path)
    found = list(frames_of(path))
    assert len(found) == 40
    return found


@pytest.fixture(scope="module", params=["zero-shot", "head"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(zero_shot=request.param == "zero-shot")


def new_session(engine: Engine, told: list[Event], *, kept: int = 600) -> Session:
    return Session(
        engine, "cam", NS, MomentOptions(update_s=2.0), recorded=True, tell=told.append, history=History(kept)
    )


def backfill(session: Session, queries: Sequence[Query]) -> list[Event]:
    """In the smallest slices."""
    joining = session.backfill(queries)
    while not joining.advance(0):
        pass
    return session.adopt(joining)


def scores_of(session: Session, query: Query) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    scores = session.scores(query.id)
    assert scores is not None
    return scores.values()


def essence(events: Sequence[Event], query: Query) -> list[tuple[object, ...]]:
    """What an event says of the stream, whenever it was told."""
    return [
        (event.kind, event.epoch_ns, event.threshold, replace(event.moment, score=round(event.moment.score, 4)))
        for event in events
        if event.query is query and event.moment
    ]


def test_a_late_query_is_told_what_it_would_have_been_told(engine: Engine, frames: list[Frame]) -> None:
    man, bicycle = make_query(engine, MAN), make_query(engine, BICYCLE)
    expected: list[Event] = []
    always = new_session(engine, expected)
    for query in (man, bicycle):
        always.add(query)
    told: list[Event] = []
    late = new_session(engine, told)
    late.add(bicycle)
    for index, frame in enumerate(frames):
        if index == LATER:
            found = backfill(late, [man])
            assert found == told[-len(found) :]
            assert [event.seq for event in found] == list(range(1, len(found) + 1))
            over = {event.moment.id for event in found if event.kind is Kind.CLOSED and event.moment}
            assert over and all(event.backfill == (event.moment.id in over) for event in found if event.moment)
            assert any(not event.backfill for event in found), "one lasts"
        always.push(frame)
        late.push(frame)
    always.drain()
    late.drain()
    assert len(essence(expected, man)) > 10
    assert essence(told, man) == essence(expected, man)
    assert essence(told, bicycle) == essence(expected, bicycle)
    numbers = [event.seq for event in told if event.query is man]
    assert numbers == list(range(1, len(numbers) + 1))
    for query in (man, bicycle):
        (windows, scores), (whole, every) = scores_of(late, query), scores_of(always, query)
        np.testing.assert_array_equal(windows, whole)
        np.testing.assert_allclose(scores, every, atol=1e-5)


def test_what_is_not_kept_any_more_was_never_seen(engine: Engine, frames: list[Frame]) -> None:
    """The same as the query subscribed when the oldest window that is kept arrived."""
    man, kept = make_query(engine, MAN), 12
    expected: list[Event] = []
    told: list[Event] = []
    early, late = new_session(engine, expected), new_session(engine, told, kept=kept)
    for index, frame in enumerate(frames):
        if index == LATER - kept:
            early.add(man)
        if index == LATER:
            assert late.history is not None and late.history.stop - late.history.start == kept
            backfill(late, [man])
        early.push(frame)
        late.push(frame)
    assert essence(told, man) == essence(expected, man)


def test_a_query_that_went_and_comes_back_is_told_nothing_twice(engine: Engine, frames: list[Frame]) -> None:
    man = make_query(engine, MAN)
    told: list[Event] = []
    session = new_session(engine, told)
    session.add(man)
    for index, frame in enumerate(frames):
        if index == 7:
            session.remove(man.id)  # in the middle of a moment, which closes
            assert told[-1].kind is Kind.CLOSED
        if index == LATER:
            backfill(session, [man])
        session.push(frame)
    session.drain()
    moments = [event.moment for event in told if event.kind is Kind.CLOSED and event.moment]
    opened = [event.moment.id for event in told if event.kind is Kind.OPENED and event.moment]
    assert opened == [moment.id for moment in moments] and len(set(opened)) == len(opened) >= 4
    for before, after in pairwise(moments):
        assert before.end_ns is not None and before.end_ns <= after.start_ns
    numbers = [event.seq for event in told]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_query_that_goes_during_its_backfill_leaves_nothing(engine: Engine, frames: list[Frame]) -> None:
    man, bicycle = make_query(engine, MAN), make_query(engine, BICYCLE)
    told: list[Event] = []
    session = new_session(engine, told)
    for frame in frames[:LATER]:
        session.push(frame)
    joining = session.backfill([man, bicycle])
    joining.advance(0)
    joining.drop(man.id)
    with pytest.raises(ValueError, match="left out"):
        session.adopt(joining)
    while not joining.advance(time.monotonic_ns() + NS):
        pass
    session.adopt(joining)
    assert [query.id for query in session.queries] == [bicycle.id]
    assert essence(told, man) == []
    session.push(frames[LATER])


def test_a_moment_that_lasts_when_the_source_has_gone_closes(engine: Engine, frames: list[Frame]) -> None:
    man = make_query(engine, MAN)
    told: list[Event] = []
    session = new_session(engine, told)
    for frame in frames[:LATER]:
        session.push(frame)
    session.interrupt()
    backfill(session, [man])
    assert told[-1].kind is Kind.CLOSED and session.open_moment(man.id) is None


def test_one_text_at_two_thresholds_shares_a_row(engine: Engine, frames: list[Frame]) -> None:
    low, high = make_query(engine, MAN, 0.3), make_query(engine, f"  {MAN.upper()} ", 0.9)
    assert low.id != high.id
    told: list[Event] = []
    session = new_session(engine, told)
    session.add(low)
    for frame in frames[:10]:
        session.push(frame)
    backfill(session, [high])
    for frame in frames[10:]:
        session.push(frame)
    (windows, scores), (others, same) = scores_of(session, low), scores_of(session, high)
    np.testing.assert_array_equal(windows, others)
    np.testing.assert_allclose(scores, same, atol=1e-6)
    assert {event.threshold for event in told} <= {0.3, 0.9} and 0.3 in {event.threshold for event in told}
    session.remove(low.id)
    session.push(replace(frames[-1], pts_ns=frames[-1].pts_ns + NS))
    assert [query.id for query in session.queries] == [high.id]


def test_streams_looked_at_together_are_looked_at_alone(engine: Engine, frames: list[Frame]) -> None:
    man = make_query(engine, MAN)
    alone: list[Event] = []
    together: list[Event] = []
    single = new_session(engine, alone)
    others = [new_session(engine, told) for told in (together, [])]
    for session in (single, *others):
        session.add(man)
    for index, frame in enumerate(frames):
        single.push(frame)
        push_all([(others[0], frame), *([(others[1], frame)] if index % 3 else [])])
    assert essence(together, man) == essence(alone, man) != []


# ---- what is kept ----------------------------------------------------------------------------------------------------


def features(index: int) -> Features:
    rng = np.random.default_rng(index)
    window = Window("cam", index, index * NS, (index + 2) * NS, (), 0, 0)
    tokens = {"video_tokens": rng.normal(size=(1, 3, 4)).astype(np.float32)}
    return Features(window, rng.normal(size=5).astype(np.float32), tokens)


def test_the_newest_windows_are_kept_as_they_were_judged_and_take_no_more_room() -> None:
    history, kept = History(4), list[Features]()
    for index in range(11):
        kept.append(history.keep(features(index)))
        if index == 0:
            nbytes = history.nbytes
        assert history.nbytes == nbytes == 4 * 2 * (5 + 12)
        assert (history.start, history.stop) == (max(0, index - 3), index + 1)
    for ordinal in range(history.start, history.stop):
        found = history.at(ordinal)
        assert found.window.index == ordinal and found.mapped is not None and kept[ordinal].mapped is not None
        np.testing.assert_array_equal(found.pooled, kept[ordinal].pooled)
        np.testing.assert_array_equal(found.mapped["video_tokens"], kept[ordinal].mapped["video_tokens"])  # type: ignore[index]
        np.testing.assert_allclose(found.pooled, features(ordinal).pooled, rtol=1e-3)
    for ordinal in (history.start - 1, history.stop):
        with pytest.raises(IndexError):
            history.at(ordinal)


def test_scores_go_round() -> None:
    scores = Scores(3)
    assert [len(each) for each in scores.values()] == [0, 0]
    for index in range(5):
        scores.append(Saliency("cam", "q", index, index / 10, 0.0))
    windows, values = scores.values()
    assert windows.tolist() == [2, 3, 4]
    np.testing.assert_allclose(values, [0.2, 0.3, 0.4])
