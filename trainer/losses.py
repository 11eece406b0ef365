"""The losses of R2-Tuning (arXiv:2404.00801, section 3.4; weights as in its published code), for both modes.

    focal       is a point inside a moment? (Lin et al. 2017, arXiv:1708.02002, alpha 0.25, gamma 2)
    boundary    L1 on the distances of the points inside, in strides of their level
    saliency    a clip that answers against those that answer less, over the clips of its video
    batch       the same against the other samples of the batch, at its place
    video       InfoNCE between a true clip's CLS and the query, over the batch, in each layer
    layer       InfoNCE between the same two, over the layers of one sample

Mode `clip` has the published targets. Mode `causal` differs where streaming does (DESIGN, section 3): every window
inside a moment is foreground at every level, and what the saliency loss contrasts is the published score itself, the
zero-shot part included, so that its scale is learned.

Letters: B batch, T windows, K layers, C width, S levels.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.r2_types import CausalOutputs, ClipOutputs

ALPHA, GAMMA = 0.25, 2.0
TEMPERATURE = 0.07
CENTRE_RADIUS = 1.5  # strides; mode `clip`
_NOTHING = -1e4  # in place of -inf, whose log-sum over nothing has no gradient


@dataclass(frozen=True)
class LossWeights:
    """0 leaves a loss out."""

    focal: float = 1.0
    boundary: float = 0.2
    saliency: float = 0.1
    batch: float = 0.1
    video: float = 0.1
    layer: float = 0.1


class Targets(NamedTuple):
    """The truth of a batch, see `trainer.dataset.Sample`."""

    inside: Tensor  # (B, T) bool
    distances: Tensor  # (B, T, 2) in windows, to the ends of the shortest moment
    saliency: Tensor  # (B, T)
    counted: Tensor  # (B, T) bool
    positive: Tensor  # (B,) a window that answers, drawn anew each time, for the contrasts; -1 where none does
    alike: Tensor  # (B, B) bool: the text of the second does not contradict the chosen window of the first


def causal_losses(outputs: CausalOutputs, targets: Targets) -> dict[str, Tensor]:
    """The first three by name, unweighted."""
    inside, counted = targets.inside, targets.counted
    focal = focal_loss(outputs.logits, inside[..., None].expand_as(outputs.logits)).mean(-1)
    within = (inside & counted)[..., None, None]
    return {
        "focal": _mean(focal, counted),
        "boundary": _boundary(outputs.distances, targets.distances[:, :, None], within),
        **saliency_losses(outputs.saliency, targets),
    }


def clip_losses(outputs: ClipOutputs, pooled: Tensor, targets: Targets, strides: tuple[int, ...]) -> dict[str, Tensor]:
    """The first three as published: a point near a moment's centre, on the level whose range holds its larger distance.

    pooled (B, C): of the query, as the heads see it.
    """
    focal, boundary, points = [], [], []
    levels = zip(strides, (*strides[1:], torch.inf), outputs.logits, outputs.distances, strict=False)
    for place, (stride, following, logits, found) in enumerate(levels):
        at = slice(None, stride * logits.shape[1], stride)
        away, counted = targets.distances[:, at], targets.counted[:, at]
        to_centre = (away[..., 0] - away[..., 1]).abs() / 2
        low = stride if place else 0
        largest = away.amax(-1)
        mine = targets.inside[:, at] & (to_centre <= CENTRE_RADIUS * stride) & (largest >= low) & (largest < following)
        focal.append(focal_loss(logits, mine))
        mine = mine & counted
        boundary.append(torch.where(mine[..., None], (found - away).abs() / stride, 0.0).sum())
        points.append(torch.stack([counted, mine]))
    counted, mine = torch.cat(points, -1)
    similarity = F.cosine_similarity(outputs.hidden, pooled[:, None], dim=-1)
    return {
        "focal": _mean(torch.cat(focal, 1), counted),
        "boundary": torch.stack(boundary).sum() / (2 * mine.sum()).clamp(min=1),
        **saliency_losses(similarity, targets),
    }


def weighted(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Their sum."""
    return torch.stack([getattr(weights, field.name) * losses[field.name] for field in fields(weights)]).sum()


def focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Elementwise, logits and bool truth of one shape."""
    logits = logits.float()
    wanted = truth.to(logits.dtype)
    surprise = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = (wanted - logits.sigmoid()).abs()
    return torch.where(truth, ALPHA, 1 - ALPHA) * missed**GAMMA * surprise


def saliency_losses(scores: Tensor, targets: Targets) -> dict[str, Tensor]:
    """True windows against those that answer less: of the same video, and of the batch at the same place.

    scores (B, T). The published loss samples one true window a video; the mean over all of them is the same in
    expectation and less noisy. Of the batch, samples of the same text are left out.
    """
    scaled, rated = scores.float() / TEMPERATURE, targets.saliency
    true = targets.inside & targets.counted
    along = (rated[:, None] < rated[:, :, None]) & targets.counted[
        :, None
    ]  # (B, T, T): the last against the one before
    lower = rated.T[None] < rated[:, :, None]  # (B, T, B)
    across = lower & targets.counted.T[None] & ~targets.alike[:, None]
    found = {}
    for name, less, others in (("saliency", along, scaled[:, None]), ("batch", across, scaled.T[None])):
        rivals = others.expand(less.shape).masked_fill(~less, _NOTHING).logsumexp(-1)  # (B, T)
        row = torch.where(true, F.softplus(rivals - scaled), 0.0).sum(1) / true.sum(1).clamp(min=1)
        # A query that is true for long counts as much as one that is true for a moment: so does frame AP.
        found[name] = _mean(row, true.any(1))
    return found


def contrasts(cls: Tensor, row_video: Tensor, pooled: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Equations 9 and 10, over the rows that come true: cls (V, K, T, C), row_video (B,), pooled (B, K, C)."""
    rows = (targets.positive >= 0).nonzero().squeeze(-1)
    if not len(rows):
        nothing = cls.new_zeros(())
        return {"video": nothing, "layer": nothing}
    video = F.normalize(cls[row_video[rows], :, targets.positive[rows]].float(), dim=-1)  # (n, K, C)
    query = F.normalize(pooled[rows].float(), dim=-1)
    other = ~torch.eye(len(rows), dtype=torch.bool, device=cls.device)
    batch = video.transpose(0, 1) @ query.permute(1, 2, 0) / TEMPERATURE  # (K, n, n)
    batch = batch.masked_fill(targets.alike[rows][:, rows] & other, _NOTHING)
    return {"video": _nce(batch), "layer": _nce(video @ query.mT / TEMPERATURE)}


def _nce(similarities: Tensor) -> Tensor:
    """(.., n, n), the diagonal belongs together -> in both directions."""
    down, along = (similarities.log_softmax(axis).diagonal(dim1=-2, dim2=-1) for axis in (-2, -1))
    return -(down + along).mean()


def _boundary(found: Tensor, wanted: Tensor, within: Tensor) -> Tensor:
    away = torch.where(within, (found - wanted).abs(), 0.0)
    return away.sum() / within.expand_as(away).sum().clamp(min=1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
