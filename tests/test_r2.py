"""The causal R2: `forward`, `prefill` and `step` say the same, which is what a plain slow reference says."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.r2 import R2
from models.r2_types import CausalOutputs, ClipOutputs, QueryMaps, R2Config, VideoMaps, WordMaps
from models.temporal import Columns, TemporalState
from tests.r2_naive import naive

VIDEO, TEXT = 24, 20
MILLION = 10**6


pytestmark = pytest.mark.usefixtures("one_thread")


def build(mode: Any = "causal", *, seed: int = 0, **shape: Any) -> R2:
    """A small model whose every weight matters: sharp attention, no gate or scale that is 0 or 1."""
    torch.manual_seed(seed)
    shape = {"embedding": 6, "depth": 4, "width": 32, "heads": 2, "window": 8} | shape
    model = R2(R2Config(mode, VIDEO, TEXT, **shape)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "project_query.weight", "map_query.6.weight")):
                weight.mul_(3)
            elif name.endswith(("pooling", "gate")) or "norm" in name:
                weight.add_(torch.randn(weight.shape), alpha=0.5)
            elif name.endswith(("scales", "zero_shot")):
                weight.mul_(0.5 + torch.rand(weight.shape))
    return model


@dataclass
class Recording:
    """Backbone features of one stream or of a batch of them."""

    layers: Tensor  # (.., T, K, 1+P, width)
    embedding: Tensor  # (.., T, D)

    def __getitem__(self, windows: Any) -> "Recording":
        """Of a batch of one: some windows."""
        return Recording(self.layers[:, windows], self.embedding[:, windows])


def record(model: R2, length: int, *, patches: int = 3, batch: int = 1, seed: int = 1) -> Recording:
    torch.manual_seed(seed)
    c = model.config
    return Recording(
        torch.randn(batch, length, c.depth, 1 + patches, c.video_width), torch.randn(batch, length, c.embedding)
    )


@dataclass
class Texts:
    """Backbone features of some queries, padded with what must not be read."""

    layers: Tensor  # (B, K, L, width)
    embedding: Tensor  # (B, D + 1)
    lengths: list[int]

    def maps(self, model: R2) -> QueryMaps:
        mask = torch.arange(self.layers.shape[2]) < torch.tensor(self.lengths)[:, None]
        with torch.no_grad():
            return model.query_maps(self.layers, self.embedding, mask)

    def alone(self, i: int) -> "Texts":
        """One of them, without padding."""
        return Texts(self.layers[i : i + 1, :, : self.lengths[i]], self.embedding[i : i + 1], [self.lengths[i]])


def ask(model: R2, *lengths: int, seed: int = 2) -> Texts:
    torch.manual_seed(seed)
    c = model.config
    layers = torch.randn(len(lengths), c.depth, max(lengths), c.text_width)
    for each, length in zip(layers, lengths, strict=True):
        each[:, length:] *= 100
    return Texts(layers, torch.randn(len(lengths), c.embedding + 1), list(lengths))


def picked(query: QueryMaps, rows: Any) -> QueryMaps:
    words = (WordMaps(*(each[rows] for each in words)) for words in query.words)
    return QueryMaps(tuple(words), query.bias[rows], query.pooled[rows], query.embedding[rows])


@torch.no_grad()
def forward(model: R2, recording: Recording, texts: Texts) -> CausalOutputs:
    outputs = model(recording.layers, recording.embedding, texts.maps(model))
    assert isinstance(outputs, CausalOutputs)
    return outputs


def agree(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Every output, hidden state included, and the class probability with the boundaries that are reported with it."""
    ours, theirs = (CausalOutputs(*(each.double() for each in outputs)) for outputs in (ours, theirs))
    for name, a, b in zip(CausalOutputs._fields, ours, theirs, strict=True):
        relative = tolerance if name == "distances" else 0.0
        torch.testing.assert_close(a, b, rtol=relative, atol=tolerance, msg=partial("{}: {}".format, name))
    torch.testing.assert_close(ours.foreground()[0], theirs.foreground()[0], rtol=0, atol=tolerance)


def stacked(outputs: list[CausalOutputs]) -> CausalOutputs:
    """Of one row, window after window -> as `forward` gives them for a batch of one."""
    return CausalOutputs(*(torch.stack(each)[None] for each in zip(*outputs, strict=True)))


def row_of(outputs: CausalOutputs, row: int) -> CausalOutputs:
    return CausalOutputs(*(each[row] for each in outputs))


# -- against the plain reference


@pytest.mark.parametrize(
    ("shape", "patches", "length", "words"),
    [
        ({}, 3, 60, (5,)),  # some bands long, and longer than what level 8 sees of one window
        ({}, 3, 29, (4, 1, 6)),  # no multiple of the band, padded queries
        ({"strides": (1, 2)}, 2, 3, (5, 2)),  # shorter than the band
        ({"depth": 1, "embedding": 0}, 0, 21, (1,)),  # CLS alone, one word
        ({"window": 1, "strides": (4,), "depth": 2}, 1, 20, (3,)),  # no memory
        ({"window": 5, "strides": (1, 4, 16), "depth": 2, "heads": 4, "ratio": 2}, 2, 70, (3,)),
        ({}, 3, 1, (3,)),
        ({"depth": 1, "floor": 2.0}, 1, 9, (3, 2)),  # embeddings about as long as the floor
    ],
)
def test_forward_is_what_the_plain_reference_says(
    shape: dict[str, Any], patches: int, length: int, words: tuple[int, ...]
) -> None:
    model = build(**shape)
    recording = record(model, length, patches=patches, batch=len(words))
    texts = ask(model, *words)
    outputs = forward(model, recording, texts)
    for i, count in enumerate(words):
        mask = torch.arange(max(words)) < count
        features = recording.layers[i], recording.embedding[i], texts.layers[i], texts.embedding[i]
        agree(row_of(outputs, i), naive(model, *features, mask), 1e-5)


def test_what_a_moment_is_reported_with_comes_from_the_surest_level() -> None:
    model = build()
    outputs = forward(model, record(model, 50), ask(model, 4))
    probability, distances = (each[0] for each in outputs.foreground())
    surest = outputs.logits[0].argmax(-1)
    assert len(set(surest.tolist())) > 1, "or the choice shows nothing"
    for t, level in enumerate(surest):
        torch.testing.assert_close(probability[t], outputs.logits[0, t, level].sigmoid())
        torch.testing.assert_close(distances[t], outputs.distances[0, t, level])


# -- step by step: rows that come and go


@dataclass
class Life:
    """What one query saw of one stream, from the opening of its row to the closing."""

    stream: int
    text: int
    ticks: list[int] = field(default_factory=list)
    outputs: list[CausalOutputs] = field(default_factory=list)


def shift(state: TemporalState, rows: Tensor, by: int) -> None:
    """Let rows that have their rings full be `by` windows older, with the same past."""
    band, size = state.keys[0].shape[2:]
    rates = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turned = torch.polar(torch.ones(()).double(), torch.arange(band)[:, None] * rates)  # keys are turned by their slot
    for rings in (state.keys, state.values):
        for ring in rings:
            held = torch.complex(*ring[rows].double().chunk(2, -1))
            held = (held / turned).roll(by, 2) * turned if rings is state.keys else held.roll(by, 2)
            ring[rows] = torch.cat([held.real, held.imag], -1).float()
    state.history[rows] = state.history[rows].roll(by, 1)
    state.count[rows] += by


@torch.no_grad()
def live(model: R2, streams: Recording, texts: Texts, *, older: int = 0, seed: int = 0) -> list[Life]:
    """Step through all windows of `streams` with rows that open, close, rest and are reset at random.

    Rows 0 and 1 live all the time, row 0 on stream 0, which never rests. The slots are full of rubbish at first, and
    the features of a stream that has no window are NaN. At tick 300 all rows that have their rings full are made
    `older`.
    """
    random, rows = np.random.default_rng(seed), 6
    maps, query = model.video_maps(streams.layers, streams.embedding), texts.maps(model)
    count, length = streams.layers.shape[:2]
    state = model.new_state(rows)
    for tensor in state.tensors:
        tensor.fill_(MILLION)
    lives: list[Life | None] = [None] * rows
    told: list[Life] = []
    full = max(model.config.window, state.history.shape[1])
    for tick in range(length):
        for row, life in enumerate(lives):
            if life is not None and row > 1 and random.random() < 0.01:
                lives[row] = life = None
            if life is None and (row < 2 or random.random() < 0.1):
                lives[row] = opened = Life(row if row < 2 else int(random.integers(count)), int(random.integers(4)))
                told.append(opened)
                state.reset(torch.tensor([row]))
        if tick == 300 and older:
            grown = torch.tensor([life is not None for life in lives]) & (state.count >= full)
            assert grown[:2].all()
            shift(state, grown.nonzero()[:, 0], older)
        window = random.random(count) < 0.8
        window[0] = True
        seen = torch.where(torch.tensor(window)[:, None, None, None], maps.tokens[:, tick], torch.nan)
        watched = torch.tensor([0 if life is None else life.stream for life in lives])
        asked = picked(query, torch.tensor([0 if life is None else life.text for life in lives]))
        outputs, columns = model.step(VideoMaps(seen, maps.embedding[:, tick]), watched, asked, state)
        active = [life is not None and bool(window[life.stream]) for life in lives]
        state.append(columns, torch.tensor(active))
        for row, life in enumerate(lives):
            if life is not None and active[row]:
                life.ticks.append(tick)
                life.outputs.append(row_of(outputs, row))
    return [life for life in told if life.ticks]


@pytest.mark.parametrize(("window", "older"), [(8, MILLION), (12, MILLION + 3)])
def test_stepping_is_forward_for_rows_that_come_and_go(window: int, older: int) -> None:
    """1,000 windows and more of several streams, several queries to a stream, each in its own row."""
    model = build(window=window)
    streams, texts = record(model, 1000, batch=3), ask(model, 6, 1, 4, 2)
    lives = live(model, streams, texts, older=older)
    assert len(lives[0].ticks) == 1000 and len(lives) > 12
    assert {(life.stream, life.text) for life in lives} >= {(s, t) for s in range(3) for t in range(2)}
    for life in lives:
        stream = slice(life.stream, life.stream + 1)
        recording = Recording(streams.layers[stream], streams.embedding[stream])[life.ticks]
        agree(stacked(life.outputs), forward(model, recording, texts.alone(life.text)))


@pytest.mark.parametrize("strides", [(1,), (4,), (1, 16), (4, 8)])
def test_a_step_reaches_back_as_far_as_any_pyramid(strides: tuple[int, ...]) -> None:
    model = build(depth=2, window=4, strides=strides, width=16, heads=2)
    stream, texts = record(model, 50), ask(model, 3)
    agree(stepped(model, stream, texts, model.new_state(1)), forward(model, stream, texts))


def test_the_number_of_windows_seen_changes_nothing_else() -> None:
    """A state holds as much after 1,000 windows as before the first, in the same place."""
    model = build(depth=2, window=4, strides=(1, 2), width=8)
    stream, query = record(model, 10), ask(model, 2).maps(model)
    state = model.new_state(1)
    before = [(tensor.shape, tensor.data_ptr()) for tensor in state.tensors]
    with torch.no_grad():
        maps = model.video_maps(stream.layers[0], stream.embedding[0])
        for i in range(1000):
            now = VideoMaps(maps.tokens[i % 10, None], maps.embedding[i % 10, None])
            outputs, columns = model.step(now, torch.zeros(1, dtype=torch.int64), query, state)
            state.append(columns)
    assert [(tensor.shape, tensor.data_ptr()) for tensor in state.tensors] == before
    assert state.count.tolist() == [1000]
    assert columns.history.shape == state.history[:, 0].shape and outputs.logits.shape == (1, 2)


@torch.no_grad()
def stepped(model: R2, stream: Recording, texts: Texts, state: TemporalState) -> CausalOutputs:
    """All windows of one stream for one query, from `state` on, which goes along."""
    maps, query, first = model.video_maps(stream.layers, stream.embedding), texts.maps(model), torch.tensor([0])
    told = []
    for t in range(maps.tokens.shape[1]):
        outputs, columns = model.step(VideoMaps(maps.tokens[:, t], maps.embedding[:, t]), first, query, state)
        state.append(columns)
        told.append(row_of(outputs, 0))
    return stacked(told)


# -- prefill


@torch.no_grad()
def prefilled(
    model: R2, stream: Recording, query: QueryMaps, state: TemporalState | None
) -> tuple[CausalOutputs, TemporalState]:
    return model.prefill(model.video_maps(stream.layers, stream.embedding), query, state)


@pytest.mark.parametrize("window", [1, 8, 11])
def test_chunks_that_hand_on_the_state_are_one_long_prefill(window: int) -> None:
    """Chunks of any length, one window included, and the state at the end is the one that steps leave."""
    model = build(window=window, depth=3)
    stream, texts = record(model, 200), ask(model, 3)
    whole = forward(model, stream, texts)
    cuts = np.cumsum(np.random.default_rng(0).choice([1, 2, 5, window, 3 * window, 40], 100)).tolist()
    cuts = [0, *(cut for cut in cuts if cut < 200), 200]
    assert len(cuts) > 8
    parts, state = [], None
    for begin, end in pairwise(cuts):
        outputs, state = prefilled(model, stream[begin:end], texts.maps(model), state)
        parts.append(outputs)
    assert state is not None
    agree(CausalOutputs(*(torch.cat(each, 1) for each in zip(*parts, strict=True))), whole)
    steps = model.new_state(1)
    agree(stepped(model, stream, texts, steps), whole)
    same_state(state, steps)


def test_rows_of_different_age_go_on_together_through_prefill() -> None:
    """One state, rows of 0, 3, 30 and a million windows."""
    model = build()
    stream, texts = record(model, 80, batch=4), ask(model, 3, 5, 1, 2)
    query, ages, state = texts.maps(model), [0, 3, 30, 50], model.new_state(4)
    for row, age in enumerate(ages):
        alone = Recording(stream.layers[row : row + 1, :age], stream.embedding[row : row + 1, :age])
        if age:
            state.put(row, prefilled(model, alone, picked(query, [row]), None)[1])
    shift(state, torch.tensor([3]), MILLION + 1)
    rest = [torch.arange(age, age + 30) for age in ages]
    late = Recording(
        torch.stack([stream.layers[row, these] for row, these in enumerate(rest)]),
        torch.stack([stream.embedding[row, these] for row, these in enumerate(rest)]),
    )
    before = [tensor.clone() for tensor in state.tensors]
    outputs, after = prefilled(model, late, query, state)
    assert all(map(torch.equal, before, state.tensors)), "prefill changes no state"
    assert after.count.tolist() == [30, 33, 60, MILLION + 81]
    whole = forward(model, stream, texts)
    for row, these in enumerate(rest):
        agree(row_of(outputs, row), CausalOutputs(*(each[row, these] for each in whole)))


@pytest.mark.parametrize("past", [1, 7, 8, 50])
def test_a_query_that_joins_with_its_past_goes_on_without_a_break(past: int) -> None:
    """Backfill: `prefill`, then `put` into a slot among others, then `step`."""
    model = build()
    stream, texts = record(model, 100), ask(model, 4, 2)
    query = texts.maps(model)
    state = model.new_state(3)
    for tensor in state.tensors:
        tensor.fill_(MILLION)
    state.reset(torch.tensor([True, False, True]))
    others = [tensor[[0, 2]].clone() for tensor in state.tensors]
    backfill, filled = prefilled(model, stream[:past], texts.alone(1).maps(model), None)
    state.put(1, filled)
    assert all(torch.equal(tensor[[0, 2]], other) for tensor, other in zip(state.tensors, others, strict=True))
    told = []
    with torch.no_grad():
        maps = model.video_maps(stream.layers[0], stream.embedding[0])
        for t in range(past, 100):
            now = VideoMaps(maps.tokens[t, None], maps.embedding[t, None])
            outputs, columns = model.step(now, torch.tensor([0, 0, 0]), picked(query, [0, 1, 0]), state)
            state.append(columns)
            told.append(outputs)
    whole = forward(model, stream, texts.alone(1))
    agree(backfill, CausalOutputs(*(each[:, :past] for each in whole)))
    agree(stacked([row_of(each, 1) for each in told]), CausalOutputs(*(each[:, past:] for each in whole)))
    late = forward(model, stream[past:], texts.alone(0))  # the others opened when it joined
    agree(stacked([row_of(each, 0) for each in told]), late)


def same_state(ours: TemporalState, theirs: TemporalState) -> None:
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- causality


def changed(before: Any, after: Any) -> Tensor:
    """Largest change of each window, (T,)."""
    return torch.stack(
        [
            (a - b).abs().flatten(2).amax(-1)[0] if a.ndim > 2 else (a - b).abs()[0]
            for a, b in zip(before, after, strict=True)
        ]
    ).amax(0)


@pytest.mark.parametrize("t", [0, 7, 8, 30, 49])
def test_no_window_knows_what_comes_after_it(t: int) -> None:
    model = build()
    stream, texts = record(model, 60), ask(model, 4)
    other = Recording(stream.layers.clone(), stream.embedding.clone())
    other.layers[:, t + 1 :] = 30 * torch.randn_like(other.layers[:, t + 1 :])
    other.embedding[:, t + 1 :] = torch.randn_like(other.embedding[:, t + 1 :])
    change = changed(forward(model, stream, texts), forward(model, other, texts))
    assert change[: t + 1].max() <= 1e-6
    assert change[t + 1 :].min() > 1e-3, "or nothing was changed"


def test_the_published_mode_does_look_ahead() -> None:
    """The same perturbation shows in mode `clip`: the test above can fail."""
    model = build("clip")
    stream, query = record(model, 60), ask(model, 4).maps(model)
    other = stream.layers.clone()
    other[:, 31:] = 30 * torch.randn_like(other[:, 31:])
    with torch.no_grad():
        before, after = (model(layers, stream.embedding, query) for layers in (stream.layers, other))
    assert isinstance(before, ClipOutputs) and isinstance(after, ClipOutputs)
    assert (before.hidden - after.hidden)[0, :31].abs().amax(-1).min() > 1e-3
    assert (before.saliency - after.saliency)[0, :31].abs().max() > 1e-3


def test_a_window_is_forgotten_after_the_receptive_field() -> None:
    """K (W - 1) windows by attention, and 39 more by the convolutions of level 8."""
    model = build(depth=2, window=4)
    stream, texts = record(model, 70), ask(model, 4)
    other = Recording(stream.layers.clone(), stream.embedding.clone())
    other.layers[:, 0] *= -3
    change = changed(forward(model, stream, texts), forward(model, other, texts))
    last = 2 * 3 + 39
    assert change[last] > 0 and change[last + 1 :].max() <= 1e-6


def test_a_recording_is_read_whatever_is_padded_behind_it() -> None:
    """Mode `clip` with recordings of several lengths: what the mask hides is not attended to."""
    model = build("clip")
    stream, query = record(model, 20), ask(model, 4).maps(model)
    other = stream.layers.clone()
    other[:, 15:] = 30 * torch.randn_like(other[:, 15:])
    mask = torch.arange(20)[None] < 15
    with torch.no_grad():
        before, after = (model(layers, stream.embedding, query, mask) for layers in (stream.layers, other))
    torch.testing.assert_close(before.hidden[:, :15], after.hidden[:, :15], rtol=0, atol=1e-5)


# -- hidden states alone


@torch.no_grad()
def encoded(model: R2, stream: Recording, query: QueryMaps, visible: Tensor) -> Tensor:
    return model.encode(stream.layers, query, visible)


@pytest.mark.parametrize("mode", ["clip", "causal"])
def test_encode_gives_the_hidden_states_of_forward_when_all_is_visible(mode: str) -> None:
    model = build(mode)
    stream, query = record(model, 29, batch=2), ask(model, 4, 2).maps(model)
    with torch.no_grad():
        hidden = model(stream.layers, stream.embedding, query).hidden
    again = encoded(model, stream, query, torch.ones(2, 29, dtype=torch.bool))
    torch.testing.assert_close(again, hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["clip", "causal"])
def test_what_is_invisible_is_read_by_no_other_window(mode: str) -> None:
    """Whatever stands there; and it is not by chance that nothing changes, for shown it changes most of the others."""
    model = build(mode)
    stream, query = record(model, 40), ask(model, 4).maps(model)
    visible = torch.ones(1, 40, dtype=torch.bool)
    visible[0, [0, 5, 6, 7, 20, 33]] = False
    other = Recording(stream.layers.clone(), stream.embedding)
    other.layers[:, ~visible[0]] = 30 * torch.randn_like(other.layers[:, ~visible[0]])
    hidden, again = (encoded(model, each, query, visible) for each in (stream, other))
    torch.testing.assert_close(hidden[visible], again[visible], rtol=0, atol=1e-5)
    assert (hidden - again)[~visible].abs().amax(-1).min() > 1e-3
    shown, leaking = (encoded(model, each, query, torch.ones_like(visible)) for each in (stream, other))
    assert ((shown - leaking)[visible].abs().amax(-1) > 1e-3).sum() > 25


def test_encode_of_a_causal_model_knows_nothing_of_what_comes() -> None:
    model = build()
    stream, query = record(model, 40), ask(model, 4).maps(model)
    visible = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    visible[0, 20:] = True  # what is changed is shown
    other = Recording(stream.layers.clone(), stream.embedding)
    other.layers[:, 21:] = 30 * torch.randn_like(other.layers[:, 21:])
    change = (encoded(model, stream, query, visible) - encoded(model, other, query, visible)).abs().amax(-1)[0]
    assert change[:21].max() <= 1e-6 and change[21:].min() > 1e-3


@pytest.mark.parametrize("mode", ["clip", "causal"])
@pytest.mark.parametrize("only", [0, 11, 19])
def test_a_single_visible_window_is_enough(mode: str, only: int) -> None:
    model = build(mode)
    visible = torch.arange(20)[None] == only
    assert encoded(model, record(model, 20), ask(model, 4).maps(model), visible).isfinite().all()


def test_the_words_of_each_layer_are_pooled_as_the_heads_pool_those_of_the_last_step() -> None:
    model = build()
    texts = ask(model, 5, 2, 1)
    with torch.no_grad():
        query = texts.maps(model)
        pooled = model.pooled_layers(query)
        torch.testing.assert_close(pooled[:, 0], query.pooled)
        for row in range(3):  # padding counts in no layer
            alone = model.pooled_layers(texts.alone(row).maps(model))[0]
            torch.testing.assert_close(pooled[row], alone, rtol=1e-4, atol=1e-4)
    assert pooled.shape == (3, 4, 32) and (pooled[:, 0] - pooled[:, 1]).abs().max() > 1e-2


# -- rows that rest, and rows that forget


def test_rows_that_rest_stay_as_they_were_bit_for_bit() -> None:
    model = build(depth=2)
    state, random = model.new_state(5), np.random.default_rng(0)
    for tensor in state.tensors[:-1]:
        tensor.normal_()
    state.count[:] = torch.tensor([0, 3, 8, 100, MILLION])
    for _ in range(20):
        before = [tensor.clone() for tensor in state.tensors]
        active = torch.tensor(random.random(5) < 0.5)
        state.append(random_columns(state), active)
        for old, new in zip(before, state.tensors, strict=True):
            assert torch.equal(old[~active], new[~active])
            assert not active.any() or not torch.equal(old[active], new[active])
    assert torch.equal(before[-1] + active, state.count)


def test_a_new_column_goes_to_its_slot_and_nowhere_else() -> None:
    model = build(depth=2)  # rings of 8, history of 16
    state = model.new_state(2)
    state.count[:] = torch.tensor([13, MILLION + 31])
    columns = random_columns(state)
    state.append(columns)
    slots = [(0, 13 % 8, 13 % 16), (1, (MILLION + 31) % 8, (MILLION + 31) % 16)]
    for row, slot, turn in slots:
        for k in range(2):
            assert torch.equal(state.keys[k][row, :, slot], columns.keys[k][row])
            assert torch.equal(state.values[k][row, :, slot], columns.values[k][row])
        assert torch.equal(state.history[row, turn], columns.history[row])
    assert sum(int((tensor != 0).any(-1).sum()) for tensor in state.tensors[:-1]) == 2 * (2 * 2 * 2 + 1)


def random_columns(state: TemporalState) -> Columns:
    keys, values = (tuple(torch.randn_like(ring[:, :, 0]) for ring in rings) for rings in (state.keys, state.values))
    return Columns(keys, values, torch.randn_like(state.history[:, 0]))


@pytest.mark.parametrize("rubbish", [1e6, -1e6, float("nan")])
def test_a_row_that_was_reset_is_new_whatever_it_held(rubbish: float) -> None:
    model = build()
    stream, texts = record(model, 40), ask(model, 4)
    state = model.new_state(1)
    for tensor in state.tensors[:-1]:
        tensor.fill_(rubbish)
    state.count[:] = MILLION + 5
    state.reset(torch.tensor([0]))
    agree(stepped(model, stream, texts, state), forward(model, stream, texts), 1e-5)
    state.reset(torch.tensor([True]))
    outputs, _ = prefilled(model, stream, texts.maps(model), state)
    agree(outputs, forward(model, stream, texts), 1e-5)


# -- configuration


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "live"}, "mode must be"),
        ({"depth": 0}, "depth must be positive"),
        ({"window": 0}, "window must be positive"),
        ({"embedding": -1}, "embedding must be positive"),
        ({"floor": -0.1}, "floor must be at least 0"),
        ({"floor": float("nan")}, "floor must be at least 0"),
        ({"heads": 5}, "multiple of twice the 5 heads"),
        ({"strides": ()}, "powers of two"),
        ({"strides": (1, 3)}, "powers of two"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        replace(R2Config("causal", 8, 8), **wrong)


def test_both_modes_share_all_weights_but_the_first_map() -> None:
    shapes = [
        {name: tuple(weight.shape) for name, weight in nn.Module.state_dict(build(mode, embedding=0)).items()}
        for mode in ("clip", "causal")
    ]
    assert shapes[0].keys() == shapes[1].keys()
    different = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert different == {"map_video.0.weight", "map_video.0.bias", "map_video.2.weight"}
