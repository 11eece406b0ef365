"""MLRL: nothing hidden reaches the student, nothing but clean inputs reaches the teacher, and a collapse is noticed."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.errors import ModelError
from models.mlrl import COLLAPSED, Mlrl, MlrlConfig, MlrlLoss, blocks, check_collapse
from models.r2 import R2
from models.r2_types import R2Config

VIDEO, TEXT = 12, 10
MODES = ("clip", "causal")


pytestmark = pytest.mark.usefixtures("one_thread")


def build(mode: Any, *, dropout: float = 0.0, depth: int = 2) -> R2:
    torch.manual_seed(0)
    model = R2(R2Config(mode, VIDEO, TEXT, embedding=4, depth=depth, width=16, heads=2, window=6, dropout=dropout))
    with torch.no_grad():
        model.pooling.add_(torch.randn(depth))  # zero as published, which leaves the words out of the pooling
    return model


def refiner(model: R2, *, width: int = 16, **config: Any) -> Mlrl:
    torch.manual_seed(1)
    return Mlrl(model, MlrlConfig(predictor_width=width, predictor_depth=1, heads=2, **config))


@dataclass
class Batch:
    layers: Tensor  # (B, T, K, 1+P, width)
    query_layers: Tensor  # (B, K, L, width)
    query_mask: Tensor  # (B, L)
    present: Tensor  # (B, T)

    def loss(self, mlrl: Mlrl, model: R2, seed: int = 3) -> MlrlLoss:
        generator = torch.Generator().manual_seed(seed)
        return mlrl.loss(model, self.layers, self.query_layers, self.query_mask, generator, self.present)


def batch(
    words: tuple[int, ...] = (7, 4), windows: tuple[int, ...] = (20, 20), *, depth: int = 2, patches: int = 2
) -> Batch:
    """Rows of so many words and windows; what pads them is there, and large."""
    torch.manual_seed(2)
    rows = len(words)
    layers = torch.randn(rows, max(windows), depth, 1 + patches, VIDEO)
    query_layers = torch.randn(rows, depth, max(1, *words), TEXT)
    present, query_mask = (
        torch.arange(x.shape[axis]) < torch.tensor(lengths)[:, None]
        for x, axis, lengths in ((layers, 1, windows), (query_layers, 2, words))
    )
    layers[~present] *= 100
    query_layers.transpose(1, 2)[~query_mask] *= 100
    return Batch(layers, query_layers, query_mask, present)


class Overheard:
    """What went through student, teacher and predictor while a loss was computed."""

    def __init__(self, mlrl: Mlrl, model: R2, batch: Batch, seed: int = 3) -> None:
        self.student: dict[str, Any] = {}
        self.teacher: dict[str, Any] = {}

        def recorded(of: R2, name: str, record: dict[str, Any]) -> Any:
            original = getattr(of, name)

            def call(*args: Any) -> Any:
                record[name], record[name + ".out"] = args, original(*args)
                return record[name + ".out"]

            return mock.patch.object(of, name, call)

        def keep(_module: Any, args: Any, out: Any) -> None:
            (self.hidden, self.words), self.shown, self.wanted = args
            self.guesses = out

        hook = mlrl.predictor.register_forward_hook(keep)
        with ExitStack() as stack, torch.no_grad():
            for of, record in ((model, self.student), (mlrl.teacher, self.teacher)):
                for name in ("encode", "query_maps"):
                    stack.enter_context(recorded(of, name, record))
            self.loss = batch.loss(mlrl, model, seed)
        hook.remove()
        self.target_windows = self.teacher["encode.out"]
        self.target_words = torch.stack([each.tokens for each in self.teacher["query_maps.out"].words])


# -- what is hidden and shown


def runs(row: Tensor) -> int:
    return sum(value for value, _ in groupby(row.tolist()))


@pytest.mark.parametrize(
    ("length", "config", "count", "number", "shown"),
    [
        (75, MlrlConfig(), 11, 4, 54),
        (130, MlrlConfig(blocks=2, target_ratio=0.3, context_ratio=0.5), 39, 2, 46),
        (20, MlrlConfig(), 3, 3, 14),  # fewer targets than blocks
        (2, MlrlConfig(), 1, 1, 1),
        (4, MlrlConfig(target_ratio=0.9, context_ratio=0.1), 3, 2, 1),  # one left, two gaps
        (1, MlrlConfig(), 0, 0, 1),
        (0, MlrlConfig(), 0, 0, 0),
    ],
)
def test_targets_are_separate_runs_and_the_context_is_a_part_of_the_rest(
    length: int, config: MlrlConfig, count: int, number: int, shown: int
) -> None:
    present = (torch.arange(140) < length).expand(50, -1)
    target, context = blocks(present, config, torch.Generator().manual_seed(0))
    assert target.sum(1).tolist() == [count] * 50
    assert [runs(row) for row in target] == [number] * 50
    assert context.sum(1).tolist() == [shown] * 50
    assert not (target & context).any()
    assert not ((target | context) & ~present).any()


def test_every_window_is_hidden_in_some_row_and_the_generator_alone_decides() -> None:
    present = torch.ones(200, 30, dtype=torch.bool)
    first, again, other = (blocks(present, MlrlConfig(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first[0].any(0).all() and first[1].any(0).all()
    for ours, same, different in zip(first, again, other, strict=True):
        assert torch.equal(ours, same)
        assert not torch.equal(ours, different)
    share = first[0].float().mean(0)
    assert share.max() < 3 * share.min(), "some windows are hidden far more often than others"


# -- a leak of targets into the context


def differences(mode: str, *, blind: tuple[str, ...] = ()) -> set[str]:
    """What of the student and of the guesses changes with the content of the hidden windows and words.

    blind: methods of the student which lose their mask, as a faulty one would.
    """
    model, data = build(mode), batch()
    mlrl = refiner(model)
    with ExitStack() as stack:
        for name in blind:
            original = getattr(model, name)
            stack.enter_context(
                mock.patch.object(model, name, lambda a, b, mask, f=original: f(a, b, torch.ones_like(mask)))
            )
        first = Overheard(mlrl, model, data)
        layers, query_layers = data.layers.clone(), data.query_layers.clone()
        layers[first.wanted[0]] = 10 * torch.randn(int(first.wanted[0].sum()), *layers.shape[2:])
        query_layers.transpose(1, 2)[first.wanted[1]] = 10 * torch.randn(int(first.wanted[1].sum()), 2, TEXT)
        second = Overheard(mlrl, model, replace(data, layers=layers, query_layers=query_layers))
    assert not torch.equal(first.target_windows, second.target_windows)
    assert not torch.equal(first.target_words, second.target_words)
    pairs = {
        "context windows": [each.hidden[each.shown[0]] for each in (first, second)],
        "context words": [each.words[each.shown[1]] for each in (first, second)],
        "guessed windows": [each.guesses[0][each.wanted[0]] for each in (first, second)],
        "guessed words": [each.guesses[1][each.wanted[1]] for each in (first, second)],
    }
    assert all(len(each[0]) for each in pairs.values())
    return {name for name, (one, two) in pairs.items() if not torch.equal(one, two)}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_targets_reaches_the_context_or_the_guesses(mode: str) -> None:
    assert differences(mode) == set()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blind", ["encode", "query_maps"])
def test_a_leak_of_targets_is_caught(mode: str, blind: str) -> None:
    assert {"context windows", "guessed windows", "guessed words"} <= differences(mode, blind=(blind,))


def test_guesses_need_the_context_and_know_the_place_of_what_they_guess() -> None:
    model, data = build("causal"), batch()
    mlrl = refiner(model)
    first = Overheard(mlrl, model, data)
    layers = data.layers.clone()
    layers[first.shown[0]] = torch.randn(int(first.shown[0].sum()), *layers.shape[2:])
    second = Overheard(mlrl, model, replace(data, layers=layers))
    for ours, theirs, wanted in zip(first.guesses, second.guesses, first.wanted, strict=True):
        assert (ours - theirs)[wanted].abs().amin(0).max() > 1e-4
    guesses = first.guesses[0][0][first.wanted[0][0]]
    assert (guesses[1:] - guesses[:-1]).abs().amax(1).min() > 1e-3


# -- noise on the targets


def clean(model: R2, data: Batch) -> Tensor:
    """Hidden states of a model in evaluation mode that sees everything."""
    with torch.no_grad():
        query = model.query_maps(data.query_layers, torch.zeros(len(data.layers), 5), data.query_mask)
        return model.encode(data.layers, query, data.present)


@pytest.mark.parametrize("mode", MODES)
def test_the_targets_are_clean_whatever_noise_and_dropout_the_student_gets(mode: str) -> None:
    model, data = build(mode, dropout=0.5), batch()
    calm, loud = refiner(model, noise=0.0, dropout=0.0).train(), refiner(model, noise=1.0, dropout=0.5).train()
    heard = [Overheard(calm, model, data), Overheard(loud, model, data), Overheard(loud, model, data, seed=4)]
    for each in heard:
        assert torch.equal(each.teacher["encode"][0], data.layers)
        assert torch.equal(each.teacher["encode"][2], data.present)
        assert torch.equal(each.target_windows, heard[0].target_windows)
        assert torch.equal(each.target_words, heard[0].target_words)
    assert torch.equal(heard[0].target_windows, clean(build(mode).eval(), data))
    assert not torch.equal(heard[0].student["encode"][0], heard[1].student["encode"][0])


@pytest.mark.parametrize("fault", ["dropout of the teacher", "noise in place"])
def test_noise_on_the_targets_is_caught(fault: str) -> None:
    model, data = build("clip", dropout=0.5), batch()
    expected = clean(build("clip").eval(), data)
    mlrl = refiner(model).train()
    assert torch.equal(Overheard(mlrl, model, data).target_windows, expected)
    if fault == "noise in place":
        with mock.patch.object(mlrl, "_disturbed", lambda x, _generator: x.add_(torch.randn(x.shape))):
            heard = Overheard(mlrl, model, data)
    else:
        mlrl.teacher.train()  # what `Mlrl.train` must not leave behind
        heard = Overheard(mlrl, model, data)
    assert not torch.equal(heard.target_windows, expected)


def test_the_students_features_have_the_noise_and_the_dropout_asked_for() -> None:
    model, data = build("clip"), batch(windows=(60, 60))
    data.layers *= 7
    noisy = Overheard(refiner(model, noise=0.5, dropout=0.0), model, data).student["encode"][0]
    scale = ((noisy - data.layers) / data.layers.std(-1, keepdim=True)).std()
    assert 0.48 < scale < 0.52
    dropped = Overheard(refiner(model, noise=0.0, dropout=0.3), model, data).student["encode"][0]
    assert 0.27 < (dropped == 0).float().mean() < 0.33
    torch.testing.assert_close(dropped[dropped != 0], data.layers[dropped != 0] / 0.7)


# -- a collapsed teacher


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", ["clip+query", "clip", "query"])
def test_a_teacher_that_tells_things_apart_is_no_collapse(mode: str, inputs: str) -> None:
    model, data = build(mode), batch()
    for scene in (0.1, 1.0):  # windows much alike, and not at all
        data.layers = data.layers[:, :1] + scene * torch.randn(data.layers.shape)
        spread = float(data.loss(refiner(model, inputs=inputs), model).spread)
        check_collapse(spread)
        assert spread > 2 * COLLAPSED


def last_of(maps: nn.Sequential) -> Tensor:
    last = maps[-1]
    assert isinstance(last, nn.Linear)
    return last.weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["one state", "nothing of the video", "nothing of the words", "not a number"])
def test_a_collapsed_teacher_is_caught(mode: str, fault: str) -> None:
    model, data = build(mode), batch()
    mlrl = refiner(model)
    with torch.no_grad():
        if fault == "one state":
            mlrl.teacher.layer.norm_feed_forward.weight.zero_()
            mlrl.teacher.layer.norm_feed_forward.bias.normal_()
        elif fault == "nothing of the video":  # states that differ with the query would hide it
            last_of(mlrl.teacher.map_video).zero_()
            if mode == "clip":  # positions tell windows apart, which is not seeing them
                for each in (mlrl.teacher.layer.cross.query, mlrl.teacher.layer.time.query):
                    each.weight.zero_()
        elif fault == "nothing of the words":
            last_of(mlrl.teacher.map_query).zero_()
        else:
            mlrl.teacher.layer.norm_time.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="collapsed"):
        check_collapse(float(data.loss(mlrl, model).spread))


@pytest.mark.parametrize("inputs", ["clip", "query"])
def test_alike_inputs_are_no_collapse(inputs: str) -> None:
    model, data = build("causal"), batch((1, 1))
    data.layers = data.layers[:, :1].expand_as(data.layers)
    data.query_layers = data.query_layers[:1].expand_as(data.query_layers)
    check_collapse(float(data.loss(refiner(model, inputs=inputs), model).spread))


# -- the teacher follows


def test_the_teacher_is_a_moving_average_whose_momentum_rises_to_one() -> None:
    model = build("clip")
    mlrl = refiner(model, momentum=0.9)
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        before = [each.clone() for each in mlrl.teacher.parameters()]
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn(each.shape))
        mlrl.update(model, progress)
        for old, now, new in zip(before, mlrl.teacher.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(now, momentum * old + (1 - momentum) * new)
            assert torch.equal(now, old) == (momentum == 1)
    for progress in (-0.1, 1.1):
        with pytest.raises(ModelError, match="progress must be from 0 to 1"):
            mlrl.update(model, progress)


def test_the_teacher_starts_as_the_student_shares_nothing_with_it_and_gets_no_gradient() -> None:
    model = build("clip")
    mlrl = refiner(model)
    own = {each.data_ptr() for each in mlrl.teacher.parameters()}
    for old, new in zip(mlrl.teacher.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) and not old.requires_grad and new.data_ptr() not in own
    batch().loss(mlrl, model).total.backward()  # type: ignore[no-untyped-call]
    assert all(each.grad is None for each in mlrl.teacher.parameters())
    assert not any(each.requires_grad for each in mlrl.teacher.parameters())


# -- what is trained


def touched(module: nn.Module) -> set[str]:
    return {name for name, each in module.named_parameters() if each.grad is not None and each.grad.abs().max() > 0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", ["clip+query", "clip", "query"])
def test_each_of_the_inputs_trains_the_encoder_and_nothing_else(mode: str, inputs: str) -> None:
    model, data = build(mode), batch()
    mlrl = refiner(model, inputs=inputs)
    loss = data.loss(mlrl, model)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert (loss.windows > 0) == ("clip" in inputs)
    assert (loss.words > 0) == ("query" in inputs)
    assert loss.total == loss.windows + loss.words
    reached = touched(model)
    parts = {name.split(".")[0] for name in reached}
    assert parts == {"map_video", "map_query", "project_video", "project_query", "pooling", "gate", "layer"}
    unread = {"project_video.bias"}  # the softmax drops it, see R2
    unread |= {f"layer.{each}.key.bias" for each in ("cross", "time") if mode == "clip" or each == "cross"}  # and these
    whole = {name for name, _ in model.named_parameters() if name.split(".")[0] in parts}
    assert whole - reached <= unread
    assert touched(mlrl.predictor) >= {"enter.weight", "leave.weight", "blank", "kinds", "norm.weight"}
    assert mlrl.null.grad is None or not mlrl.null.grad.any()


@pytest.mark.parametrize("inputs", ["clip+query", "clip", "query"])
def test_the_side_that_is_not_predicted_is_shown_whole_and_clean(inputs: str) -> None:
    model, data = build("clip"), batch()
    heard = Overheard(refiner(model, inputs=inputs), model, data)
    layers, _, windows = heard.student["encode"]
    words, _, spoken = heard.student["query_maps"]
    assert torch.equal(layers, data.layers) == torch.equal(windows, data.present) == ("clip" not in inputs)
    assert torch.equal(words, data.query_layers) == torch.equal(spoken, data.query_mask) == ("query" not in inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", ["clip+query", "clip"])
def test_unlabelled_video_trains_the_null_query_in_place_of_words(mode: str, inputs: str) -> None:
    model, data = build(mode), batch((0, 0))
    mlrl = refiner(model, inputs=inputs)
    loss = data.loss(mlrl, model)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.windows > 0 and loss.words == 0 and loss.spread > COLLAPSED
    assert mlrl.null.grad is not None and mlrl.null.grad.any()
    assert "map_query.2.weight" in touched(model)
    data.query_layers += 1
    assert data.loss(mlrl, model).total == loss.total, "the padding was read"


def test_rows_with_and_without_a_query_share_a_batch() -> None:
    model, data = build("causal"), batch((5, 0))
    heard = Overheard(refiner(model), model, data)
    assert heard.wanted[1].sum(1).tolist() == [1, 0]
    assert heard.shown[1][1].tolist() == [True] + [False] * 4


@pytest.mark.parametrize("mode", MODES)
def test_of_a_pooled_query_the_clean_word_is_predicted_from_the_disturbed_one(mode: str) -> None:
    model, data = build(mode, depth=1), batch((1, 1), depth=1, patches=0)
    heard = Overheard(refiner(model, inputs="query"), model, data)
    assert heard.wanted[1].all() and heard.shown[1].all()
    assert not torch.equal(heard.student["query_maps"][0], data.query_layers)
    target = F.layer_norm(heard.target_words[0], (16,))
    torch.testing.assert_close(heard.loss.total, (heard.guesses[1] - target).square().mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", ["clip+query", "clip", "query"])
def test_padding_is_not_read(mode: str, inputs: str) -> None:
    model, data = build(mode), batch(windows=(20, 13))
    mlrl = refiner(model, inputs=inputs)
    first = data.loss(mlrl, model)
    data.layers[~data.present] = 5.0
    data.query_layers.transpose(1, 2)[~data.query_mask] = 5.0
    assert data.loss(mlrl, model) == first


def test_more_padding_changes_nothing() -> None:
    model, data = build("causal"), batch()  # the other mode has end points and positions that do count it in
    mlrl = refiner(model, inputs="clip", noise=0.0, dropout=0.0)
    longer = replace(
        data,
        layers=torch.cat([data.layers, data.layers], 1),
        present=torch.cat([data.present, torch.zeros_like(data.present)], 1),
    )
    torch.testing.assert_close(longer.loss(mlrl, model), data.loss(mlrl, model))


# -- training


def moving(seed: int, rows: int = 16, length: int = 24) -> Batch:
    """Points that circle, each at a pace of its own, seen in all features; there are no words."""
    generator = torch.Generator().manual_seed(seed)
    phase, pace = torch.rand(2, rows, 1, generator=generator)
    angle = 6.28 * phase + (0.2 + 0.3 * pace) * torch.arange(length)
    way = torch.randn(4, VIDEO, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], -1) @ way
    layers = seen[:, :, None, None]
    words = torch.zeros(rows, 1, 1, TEXT)
    return Batch(layers, words, torch.zeros(rows, 1, dtype=torch.bool), torch.ones(rows, length, dtype=torch.bool))


def refine(mlrl: Mlrl, model: R2, *, steps: int, rate: float) -> MlrlLoss:
    optimiser = torch.optim.Adam(
        [*model.parameters(), *(each for each in mlrl.parameters() if each.requires_grad)], lr=rate
    )
    for step in range(steps):
        loss = moving(step).loss(mlrl, model, seed=step)
        check_collapse(float(loss.spread))
        optimiser.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        mlrl.update(model, step / (steps - 1))
    return loss


@pytest.mark.parametrize("mode", MODES)
def test_training_learns_to_guess_from_the_context_and_changes_the_student(mode: str) -> None:
    model, unseen, other = build(mode, depth=1), moving(1000), batch(depth=1)
    mlrl = refiner(model, width=64)
    before, first = clean(model, other), Overheard(mlrl, model, unseen).loss
    refine(mlrl, model, steps=120, rate=5e-3)
    last = Overheard(mlrl, model, unseen)
    target = F.layer_norm(last.target_windows[last.wanted[0]], (16,))
    blindly = (target - target.mean(0)).square().mean()  # the best that one guess for all can reach
    assert last.loss.windows < 0.4 * first.windows
    assert last.loss.windows < 0.7 * blindly
    assert (clean(model, other) - before).abs().mean() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_without_momentum_collapses_and_stops_the_training(mode: str) -> None:
    model = build(mode, depth=1)
    with pytest.raises(ModelError, match="collapsed"):
        refine(refiner(model, momentum=0.0), model, steps=60, rate=3e-2)


# -- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": "both"}, 'inputs must be "clip\\+query", "clip" or "query", got \'both\''),
        ({"target_ratio": 1.0}, "target_ratio must be more than 0 and less than 1, got 1.0"),
        ({"target_ratio": float("nan")}, "target_ratio must be"),
        ({"blocks": 0}, "blocks must be positive, got 0"),
        ({"context_ratio": 0.0}, "context_ratio must be"),
        ({"noise": float("inf")}, "noise must be at least 0"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"momentum": 1.1}, "momentum must be from 0 to 1, got 1.1"),
        ({"predictor_depth": 0}, "predictor_depth must be positive"),
        ({"heads": 0}, "heads must be positive"),
        ({"predictor_width": 100, "heads": 8}, "predictor_width must be a multiple of twice the 8 heads, got 100"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        MlrlConfig(**wrong)


@pytest.mark.parametrize(
    ("inputs", "words", "windows"),
    [("query", (0, 0), (9, 9)), ("clip", (3, 2), (1, 1)), ("clip+query", (0, 0), (1, 1))],
)
def test_a_batch_in_which_nothing_can_be_predicted_is_refused(
    inputs: str, words: tuple[int, ...], windows: tuple[int, ...]
) -> None:
    model = build("clip")
    with pytest.raises(ModelError, match="nothing to predict"):
        batch(words, windows).loss(refiner(model, inputs=inputs), model)
