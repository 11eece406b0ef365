"""Each loss against loops over its definition."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.r2_types import CausalOutputs, ClipOutputs
from trainer.losses import (
    TEMPERATURE,
    LossWeights,
    Targets,
    causal_losses,
    clip_losses,
    contrasts,
    focal_loss,
    saliency_losses,
    weighted,
)

ROWS, WINDOWS = 4, 24


pytestmark = pytest.mark.usefixtures("one_thread")


def targets(seed: int = 0) -> Targets:
    """Row i is inside a moment of its own; the last row never is."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(ROWS, WINDOWS, dtype=torch.bool)
    distances = torch.zeros(ROWS, WINDOWS, 2)
    for row in range(ROWS - 1):
        start, end = 2 + 4 * row, 9 + 5 * row
        inside[row, start:end] = True
        at = torch.arange(start, end)
        distances[row, start:end] = torch.stack([at - start + 0.5, end - at - 0.5], -1)
    saliency = inside * torch.randint(1, 4, (ROWS, WINDOWS), generator=generator) / 3
    counted = torch.rand(ROWS, WINDOWS, generator=generator) < 0.8
    counted[torch.arange(ROWS - 1), torch.tensor([5, 8, 12])] = True
    alike = torch.eye(ROWS, dtype=torch.bool)
    alike[0, 2] = alike[2, 0] = True
    return Targets(inside, distances, saliency, counted, torch.tensor([5, 8, 12, -1]), alike)


def test_focal_loss_is_its_formula() -> None:
    for logit, truth in ((0.3, True), (-2.0, True), (1.5, False), (-4.0, False)):
        p = 1 / (1 + math.exp(-logit))
        right, weight = (p, 0.25) if truth else (1 - p, 0.75)
        expected = -weight * (1 - right) ** 2 * math.log(right)
        assert focal_loss(torch.tensor(logit), torch.tensor(truth)).item() == pytest.approx(expected, rel=1e-5)


def test_saliency_contrasts_each_true_window_with_all_that_answer_less() -> None:
    t, scores = targets(), torch.randn(ROWS, WINDOWS)
    x = scores / TEMPERATURE
    found: dict[str, list[float]] = {"saliency": [], "batch": []}
    for i in range(ROWS):
        along, across = [], []
        for at in range(WINDOWS):
            if not (t.inside[i, at] and t.counted[i, at]):
                continue
            rated = t.saliency[i, at]
            own = [x[i, s] for s in range(WINDOWS) if t.counted[i, s] and t.saliency[i, s] < rated]
            others = [
                x[j, at] for j in range(ROWS) if t.counted[j, at] and t.saliency[j, at] < rated and not t.alike[i, j]
            ]
            along.append(_surprise(x[i, at], own))
            across.append(_surprise(x[i, at], others))
        if along:
            found["saliency"].append(sum(along) / len(along))
            found["batch"].append(sum(across) / len(across))
    losses = saliency_losses(scores, t)
    assert len(found["saliency"]) == ROWS - 1, "each query that comes true counts once"
    for name, values in found.items():
        assert losses[name].item() == pytest.approx(sum(values) / len(values), rel=1e-4)


def _surprise(chosen: Tensor, rivals: list[Tensor]) -> float:
    together = torch.stack([chosen, *rivals])
    return float(together.logsumexp(0) - chosen)


def test_contrasts_pair_a_true_clip_with_its_query_in_batch_and_layers() -> None:
    t = targets()
    cls, pooled = torch.randn(2, 3, WINDOWS, 8), torch.randn(ROWS, 3, 8)
    rows = torch.tensor([0, 1, 1, 0])
    found = contrasts(cls, rows, pooled, t)
    true = [0, 1, 2]
    video = [F.normalize(cls[rows[i], :, t.positive[i]], dim=-1) for i in true]
    query = [F.normalize(pooled[i], dim=-1) for i in true]
    video_terms, layer_terms = [], []
    for i in true:
        for k in range(3):
            own = float(video[i][k] @ query[i][k]) / TEMPERATURE
            fair = [j for j in true if j == i or not t.alike[i, j]]
            queries = torch.tensor([float(video[i][k] @ query[j][k]) / TEMPERATURE for j in fair])
            fair = [j for j in true if j == i or not t.alike[j, i]]
            videos = torch.tensor([float(video[j][k] @ query[i][k]) / TEMPERATURE for j in fair])
            video_terms += [float(queries.logsumexp(0)) - own + float(videos.logsumexp(0)) - own]
            layers = torch.tensor([float(video[i][k] @ query[i][m]) / TEMPERATURE for m in range(3)])
            other = torch.tensor([float(video[i][m] @ query[i][k]) / TEMPERATURE for m in range(3)])
            layer_terms += [float(layers.logsumexp(0)) - own + float(other.logsumexp(0)) - own]
    assert found["video"].item() == pytest.approx(sum(video_terms) / len(video_terms), rel=1e-4)
    assert found["layer"].item() == pytest.approx(sum(layer_terms) / len(layer_terms), rel=1e-4)


def test_a_batch_in_which_nothing_comes_true_has_no_contrasts() -> None:
    t = targets()._replace(positive=torch.full((ROWS,), -1))
    found = contrasts(torch.randn(2, 3, WINDOWS, 8), torch.zeros(ROWS, dtype=torch.int64), torch.randn(ROWS, 3, 8), t)
    assert found["video"].item() == found["layer"].item() == 0


def test_every_window_inside_is_foreground_on_every_level_of_a_causal_model() -> None:
    t = targets()
    logits, distances = torch.randn(ROWS, WINDOWS, 2), torch.rand(ROWS, WINDOWS, 2, 2) * 5
    found = causal_losses(CausalOutputs(torch.zeros(0), logits, distances, torch.randn(ROWS, WINDOWS)), t)
    focal, boundary = [], []
    for i in range(ROWS):
        for at in range(WINDOWS):
            if not t.counted[i, at]:
                continue
            for level in range(2):
                focal.append(float(focal_loss(logits[i, at, level], t.inside[i, at])))
                if t.inside[i, at]:
                    boundary += (distances[i, at, level] - t.distances[i, at]).abs().tolist()
    assert found["focal"].item() == pytest.approx(sum(focal) / len(focal), rel=1e-4)
    assert found["boundary"].item() == pytest.approx(sum(boundary) / len(boundary), rel=1e-4)


def test_clip_mode_has_the_published_targets() -> None:
    t, strides = targets(), (1, 2, 4)
    logits = [torch.randn(ROWS, WINDOWS // stride) for stride in strides]
    distances = [torch.rand(ROWS, WINDOWS // stride, 2) * 6 for stride in strides]
    hidden, query = torch.randn(ROWS, WINDOWS, 8), torch.randn(ROWS, 8)
    outputs = ClipOutputs(hidden, torch.zeros(0), logits, distances, torch.zeros(0))
    found = clip_losses(outputs, query, t, strides)
    focal, boundary = [], []
    for level, stride in enumerate(strides):
        low, high = (0, 2, 4)[level], (2, 4, math.inf)[level]
        for i in range(ROWS):
            for place in range(WINDOWS // stride):
                at = place * stride
                before, after = t.distances[i, at].tolist()
                mine = bool(t.inside[i, at]) and abs(before - after) / 2 <= 1.5 * stride
                mine = mine and low <= max(before, after) < high
                if t.counted[i, at]:
                    focal.append(float(focal_loss(logits[level][i, place], torch.tensor(mine))))
                    if mine:
                        wanted = torch.tensor([before, after])
                        boundary += ((distances[level][i, place] - wanted).abs() / stride).tolist()
    assert boundary, "no point is near a centre: the test would prove nothing"
    assert found["focal"].item() == pytest.approx(sum(focal) / len(focal), rel=1e-4)
    assert found["boundary"].item() == pytest.approx(sum(boundary) / len(boundary), rel=1e-4)
    similarity = F.cosine_similarity(hidden, query[:, None], dim=-1)
    for name, value in saliency_losses(similarity, t).items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_windows_whose_truth_is_unknown_teach_nothing() -> None:
    t = targets()
    logits = torch.randn(ROWS, WINDOWS, 2, requires_grad=True)
    distances = torch.rand(ROWS, WINDOWS, 2, 2, requires_grad=True)
    scores = torch.randn(ROWS, WINDOWS, requires_grad=True)
    found = causal_losses(CausalOutputs(torch.zeros(0), logits, distances, scores), t)
    torch.autograd.backward(list(found.values()))
    for each in (logits, distances, scores):
        assert each.grad is not None and not each.grad[~t.counted].any() and each.grad[t.counted].any()


def test_the_total_is_weighted_and_zero_leaves_a_loss_out() -> None:
    losses = {
        name: torch.tensor(value)
        for name, value in {
            "focal": 1.0,
            "boundary": 2.0,
            "saliency": 3.0,
            "batch": 6.0,
            "video": 4.0,
            "layer": 5.0,
            "distil": 100.0,
        }.items()
    }
    assert weighted(losses, LossWeights(1, 0.5, 0.1, 0.5, 0, 0.2)).item() == pytest.approx(1 + 1 + 0.3 + 3 + 0 + 1)
