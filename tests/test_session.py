"""One stream through the real engine, frame by frame: features, saliency, queries that come and go, the jsonl."""

from collections.abc import Sequence

import numpy as np
import pytest

from kernels.engine import Engine, Images
from kernels.preprocess import Pixels
from kernels.saliency import Calibration, saliency
from stream.detector import Detector, make_query
from stream.moments import MomentOptions
from stream.predictions import Predictions
from stream.session import Session, Step
from stream.types import NS, Event, Frame, Kind, Moment, Query, Saliency, Window
from stream.window import Windower

WALL = 1_700_000_000 * NS


class Counting(Engine):
    """The real engine, which notes how many frames it was given."""

    seen = 0

    def embed_frames(self, frames: Sequence[Pixels]) -> Images:
        self.seen += len(frames)
        return super().embed_frames(frames)


@pytest.fixture(scope="module")
def engine() -> Counting:
    return Counting(zero_shot=True)


def frame(hop: int, *, hop_s: float = 1.0, discontinuity: bool = False) -> Frame:
    """A picture of its own for every hop."""
    pts = round((hop + 0.5) * hop_s * NS)
    pixels = np.random.default_rng(hop).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return Frame("cam", hop, pts, 0, WALL + pts, pixels, discontinuity)


@pytest.mark.parametrize("hop_s", [2.0, 1.0, 0.5])
def test_a_window_is_the_mean_of_its_frames_and_each_frame_is_embedded_once(engine: Counting, hop_s: float) -> None:
    engine.seen, hop_ns = 0, int(hop_s * NS)
    windower, detector = Windower("cam", hop_ns), Detector(engine, "cam", hop_ns)
    frames = [frame(hop, hop_s=hop_s) for hop in range(9)]
    pooled = [detector.features(window).pooled for f in frames for window in windower.push(f)]
    assert engine.seen == len(frames)
    alone = engine.embed_frames([f.pixels for f in frames]).pooled
    each = round(2 / hop_s)
    expected = [alone[i : i + each].mean(0) for i in range(len(frames) - each + 1)]
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_a_gap_and_a_break_leave_no_stale_frame_in_a_window(engine: Counting) -> None:
    windower, detector = Windower("cam", NS), Detector(engine, "cam", NS)
    frames = [frame(0), frame(1), frame(3), frame(4, discontinuity=True), frame(5)]
    pooled = {w.index: detector.features(w).pooled for f in frames for w in windower.push(f)}
    alone = dict(zip((0, 1, 3, 4, 5), engine.embed_frames([f.pixels for f in frames]).pooled, strict=True))
    held = {0: (0, 1), 1: (1,), 2: (3,), 4: (4, 5)}
    assert pooled.keys() == held.keys()
    for index, hops in held.items():
        np.testing.assert_allclose(pooled[index], np.mean([alone[hop] for hop in hops], axis=0), atol=1e-5)


def test_saliency_equals_its_plain_form_and_never_depends_on_the_other_queries() -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(7, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    level, spread = rng.normal(size=7).astype(np.float32) * 0.1, rng.random(7).astype(np.float32) * 0.1 + 0.05
    window = rng.normal(size=16).astype(np.float32)
    calibration = Calibration(floor=0.5, centre=3.0, slope=1.5)
    raw, score = saliency(window, queries, level, spread, calibration)
    for i in range(7):
        cosine = float(queries[i] @ window) / (float(window @ window) + 0.25) ** 0.5
        plain = 1 / (1 + np.exp(-1.5 * ((cosine - level[i]) / spread[i] - 3)))
        assert raw[i] == pytest.approx(cosine, abs=1e-5) and score[i] == pytest.approx(plain, abs=1e-5)
        one = slice(i, i + 1)
        assert saliency(window, queries[one], level[one], spread[one], calibration)[1][0] == pytest.approx(score[i])
    # Nothing to see is no answer to anything that is not close by nature.
    assert saliency(window * 0, queries, level * 0, spread, calibration)[1].max() < 0.02


def test_queries_come_and_go_without_touching_the_others(engine: Counting) -> None:
    dog, cat = make_query(engine, "a dog"), make_query(engine, "a cat")
    alone, shared = (Session(engine, "cam", NS, MomentOptions(), recorded=True) for _ in range(2))
    for session in (alone, shared):
        session.add(dog)
    expected: list[float] = []
    found: list[float] = []
    for hop in range(8):
        if hop == 3:
            shared.add(cat)
            shared.add(cat)  # twice is once
        if hop == 6:
            shared.remove(cat.id)
        expected += [s.score for _, scores in alone.push(frame(hop)).scores for s in scores]
        step = shared.push(frame(hop))
        assert [s.query for _, scores in step.scores for s in scores] in ([], [dog.id], [dog.id, cat.id])
        assert len(step.scores) == (hop > 0) and len(shared.queries) == (2 if 3 <= hop < 6 else 1)
        found += [s.score for _, scores in step.scores for s in scores if s.query == dog.id]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_removing_a_query_closes_what_is_open_and_numbers_go_on(engine: Counting) -> None:
    told: list[Event] = []
    options = MomentOptions(threshold=1e-9, hysteresis=0.0)  # everything opens
    session = Session(engine, "cam", NS, options, recorded=True, tell=told.append)
    query = make_query(engine, "a dog")
    session.add(query)
    for hop in range(3):
        session.push(frame(hop))
    assert [event.kind for event in told] == [Kind.OPENED]
    session.remove(query.id)
    assert [event.kind for event in told][-1] is Kind.CLOSED
    session.add(query)
    for hop in range(3, 5):
        session.push(frame(hop))
    session.drain()
    assert [event.kind for event in told].count(Kind.OPENED) == 2
    assert [event.seq for event in told] == list(range(1, len(told) + 1))
    assert len({event.moment.id for event in told if event.moment}) == 2


def test_a_break_closes_and_wall_times_follow_the_stream(engine: Counting) -> None:
    told: list[Event] = []
    session = Session(engine, "cam", NS, MomentOptions(threshold=1e-9, hysteresis=0.0), recorded=True, tell=told.append)
    session.add(make_query(engine, "a dog"))
    for hop in range(4):
        session.push(frame(hop))
    for hop in range(4, 6):
        session.push(frame(hop, discontinuity=hop == 4))
    kinds = [event.kind for event in told if event.kind is not Kind.HIGHLIGHT]
    assert kinds == [Kind.OPENED, Kind.CLOSED, Kind.OPENED]
    assert all(event.epoch_ns == WALL for event in told)


def test_a_source_that_goes_away_closes_what_is_open_at_once(engine: Counting) -> None:
    told: list[Event] = []
    options = MomentOptions(threshold=1e-9, hysteresis=0.0)
    session = Session(engine, "cam", NS, options, recorded=True, tell=told.append)
    session.add(make_query(engine, "a dog"))
    for hop in range(4):
        session.push(frame(hop))
    assert [event.kind for event in session.interrupt().events] == [Kind.HIGHLIGHT, Kind.CLOSED]
    assert told[-1].moment is not None and told[-1].moment.end_ns == 4 * NS
    assert session.interrupt().events == []
    for hop in range(7, 9):
        session.push(frame(hop, discontinuity=hop == 7))
    assert [event.kind for event in told].count(Kind.CLOSED) == 1
    assert told[-1].kind is Kind.OPENED and told[-1].moment is not None and told[-1].moment.start_ns == 7 * NS


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A  dog\n", "a dog", True),
        ("a\x1b[2J dog", "a [2J dog", True),
        ("a dog", "a dog runs", False),
        ("日本", "中国", False),
        ("x" * 50, "x" * 51, False),
    ],
)
def test_a_query_id_comes_from_the_text_alone(engine: Counting, one: str, other: str, same: bool) -> None:
    ids = {make_query(engine, text).id for text in (one, other)}
    assert len(ids) == (1 if same else 2)
    assert all(identifier and set(identifier) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for identifier in ids)


def test_the_jsonl_has_a_score_for_every_two_seconds() -> None:
    query = Query("q", "a dog", np.ones(4, np.float32))
    predictions = Predictions("cam", [query])

    def scored(index: int, score: float) -> tuple[Window, list[Saliency]]:
        window = Window("cam", index, index * NS, (index + 2) * NS, (), WALL, WALL)
        return window, [Saliency("cam", "q", index, score, score), Saliency("cam", "late", index, 0.9, 0.9)]

    # Windows of hop 1 s; those at 4 and 6 s are missing. Clips are [0, 2), [2, 4) ...
    predictions.add(Step(0, [scored(0, 0.1), scored(1, 0.9), scored(2, 0.2), scored(3, 0.8)], []))
    moment = Moment("m", "cam", "q", 2 * NS, 5 * NS + NS // 2, 3 * NS, 0.75)
    other = Moment("n", "cam", "q", 7 * NS, 8 * NS, 7 * NS, 0.95)
    closed = [Event(Kind.CLOSED, "cam", i, WALL, WALL, query, m) for i, m in enumerate((moment, other))]
    predictions.add(Step(0, [scored(8, 0.4)], closed))
    (row,) = predictions.rows([3])
    assert row["pred_saliency_scores"] == [0.1, 0.2, 0.2, 0.2, 0.4]
    assert row["pred_relevant_windows"] == [[7.0, 8.0, 0.95], [2.0, 5.5, 0.75]]
    assert (row["qid"], row["query"], row["vid"]) == (3, "a dog", "cam")
