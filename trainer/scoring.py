"""What a model says of whole recordings, the calibration of its score, and how good both are."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from models.r2 import R2
from models.r2_types import ClipOutputs, QueryMaps
from stream.moments import MomentOptions, Tracker
from stream.types import NS, WINDOW_NS, Kind, Moment, Saliency, Window
from stream.window import hop_from_seconds
from trainer.dataset import Dataset, Sample, Text
from trainer.metrics import average_precision, frame_f1, temporal_iou
from trainer.streaming_metrics import Closed, Opened, QueryRun, streaming_scores

Floats = NDArray[np.float64]
ZERO_SHOT_FACTORS = 0.5, 0.7, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0
ROWS = 16
"""Queries that are scored together: what bounds the memory of a long recording."""


Measures = dict[str, float | int | None]
"""By name; None where a measure is not defined."""


@dataclass(frozen=True)
class Calibration:
    """score = 1 / (1 + exp(-slope (saliency - centre))): one threshold for all queries."""

    centre: float
    slope: float

    def __call__(self, saliency: Floats) -> Floats:
        # tanh does not overflow.
        return 0.5 + 0.5 * np.tanh(self.slope * (saliency - self.centre) / 2)


@dataclass(frozen=True, eq=False)
class Told:
    """The moments of a sample, as a live stream would have told them."""

    opened: list[Opened]
    closed: list[Closed]


def query_maps(model: R2, texts: Sequence[Text]) -> QueryMaps:
    """Texts of any lengths -> maps of as many rows."""
    device = model.pooling.device
    words = [torch.from_numpy(np.ascontiguousarray(text.layers.swapaxes(0, 1), np.float32)) for text in texts]
    lengths = torch.tensor([len(each) for each in words])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = pad_sequence(words, batch_first=True).transpose(1, 2)
    asked = torch.from_numpy(np.stack([text.embedding for text in texts]))
    return model.query_maps(padded.to(device), asked.to(device), mask.to(device))


@torch.inference_mode()
def saliencies(model: R2, dataset: Dataset, samples: Sequence[Sample], clip_length: int = 128) -> Iterator[Floats]:
    """(T,) of each sample, in their order; samples of one video should stand together.

    A causal model sees a recording from its beginning; one of mode `clip` sees pieces of `clip_length` windows.
    """
    training, device = model.training, model.pooling.device
    model.eval()
    for vid, group in groupby(samples, key=lambda sample: sample.vid):
        mine, video = list(group), dataset.video(vid)
        layers, embedding = (
            torch.from_numpy(np.asarray(each, np.float32)).to(device) for each in (video.layers, video.embedding)
        )
        for at in range(0, len(mine), ROWS):
            query = query_maps(model, [dataset.text(sample.query) for sample in mine[at : at + ROWS]])
            rows = len(query.pooled)
            if model.config.mode == "causal":
                maps = model.video_maps(layers[None], embedding[None])
                shared = type(maps)(*(each.expand(rows, *each.shape[1:]) for each in maps))
                found = model.prefill(shared, query)[0].saliency
            else:
                found = torch.cat([_piece(model, piece, query) for piece in _pieces(layers, clip_length)], 1)
            yield from found.double().cpu().numpy()
    model.train(training)


def _pieces(layers: torch.Tensor, length: int) -> list[torch.Tensor]:
    """A rest shorter than half a piece goes with the piece before it."""
    cuts = list(range(length, len(layers) - length // 2, length))
    return list(layers.tensor_split(cuts))


def _piece(model: R2, layers: torch.Tensor, query: QueryMaps) -> torch.Tensor:
    rows = len(query.pooled)
    outputs = model(layers.expand(rows, *layers.shape), layers.new_zeros(rows, len(layers), 0), query)
    assert isinstance(outputs, ClipOutputs)
    return outputs.saliency


def zero_shot(dataset: Dataset, samples: Sequence[Sample]) -> list[Floats]:
    """(T,) of each sample: what the backbone says by itself, without any training."""
    found = []
    for sample in samples:
        video, text = dataset.video(sample.vid).embedding.astype(np.float32), dataset.text(sample.query).embedding
        length = np.sqrt((video**2).sum(1) + dataset.floor**2).clip(1e-12)
        found.append((video @ text[:-1] / length + text[-1]).astype(np.float64))
    return found


def calibrate(samples: Sequence[Sample], scores: Sequence[Floats]) -> Calibration:
    """The logistic curve through the truth of all frames, moved so that 0.5 is where their F1 is best.

    Raises:
        ValueError: nothing is true, or all.
    """
    pairs = [
        (saliency[index], truth)
        for sample, saliency in zip(samples, scores, strict=True)
        for index, truth in [sample.scored()]
    ]
    values, truths = (np.concatenate(part) for part in zip(*pairs, strict=True))
    if not 0 < truths.sum() < len(truths):
        raise ValueError("a calibration needs frames that are true and frames that are not")
    spread = values.std() or 1.0
    x, weight = (values - values.mean()) / spread, np.zeros(2)
    for _ in range(50):  # Newton's method on the cross entropy, a little damped by a ridge
        design = np.stack([x, np.ones_like(x)], 1)
        chance = 1 / (1 + np.exp(-design @ weight))
        hessian = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (truths - chance) - 1e-3 * weight)
        weight = weight + step
        if np.abs(step).max() < 1e-8:
            break
    slope = max(float(weight[0]) / spread, 1e-3 / spread)
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], truths[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    f1[:-1][ranked[:-1] == ranked[1:]] = 0  # a threshold cannot part equal scores
    best = int(f1.argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best] - 1
    return Calibration(float((ranked[best] + below) / 2), slope)


def tell(sample: Sample, scores: Floats, hop_s: float, options: MomentOptions) -> Told:
    """Run the live path's tracker over calibrated scores (T,)."""
    hop_ns = hop_from_seconds(hop_s)
    tracker, told = Tracker(sample.vid, sample.query, hop_ns, options), Told([], [])

    def note(moment: Moment, kind: Kind, now_s: float) -> None:
        if kind is Kind.OPENED:
            told.opened.append(Opened(now_s, moment.start_ns / NS))
        elif kind is Kind.CLOSED and moment.end_ns is not None:
            told.closed.append(Closed(now_s, moment.start_ns / NS, moment.end_ns / NS, moment.score))

    end_ns = 0
    for index, score in enumerate(scores.tolist()):
        start_ns = index * hop_ns
        end_ns = start_ns + WINDOW_NS
        window = Window(sample.vid, index, start_ns, end_ns, (), 0, 0)
        for change in tracker.push(Saliency(sample.vid, sample.query, index, score, score), window):
            note(change.moment, change.kind, end_ns / NS)
    for change in tracker.drain():
        note(change.moment, change.kind, end_ns / NS)
    return told


def balanced_ap(dataset: Dataset, samples: Sequence[Sample], scores: Sequence[Floats]) -> float:
    """What choices are made by: frame AP, the mean of seen and unseen queries' where there are both."""
    kinds = [[i for i, s in enumerate(samples) if (s.query in dataset.unseen) is unseen] for unseen in (False, True)]
    return float(np.mean([mean_ap([samples[i] for i in kind], [scores[i] for i in kind]) for kind in kinds if kind]))


def weigh_zero_shot(model: R2, dataset: Dataset, samples: Sequence[Sample], scores: Sequence[Floats]) -> list[Floats]:
    """Set the scale of the backbone's own similarity in the score to what is best on samples, -> their new scores.

    Training sees its own queries only, for which its own part is worth more than it is for any other.
    """
    bare, scale = zero_shot(dataset, samples), model.zero_shot.item()
    learned = [saliency - scale * own for saliency, own in zip(scores, bare, strict=True)]

    def scaled(factor: float) -> list[Floats]:
        return [part + factor * scale * own for part, own in zip(learned, bare, strict=True)]

    best = max(ZERO_SHOT_FACTORS, key=lambda factor: balanced_ap(dataset, samples, scaled(factor)))
    with torch.no_grad():
        model.zero_shot.mul_(best)
    return scaled(best)


def mean_ap(samples: Sequence[Sample], scores: Sequence[Floats]) -> float:
    """Frame AP, the mean over samples that come true; NaN without any."""
    known = [ap for ap in frame_aps(samples, scores) if not math.isnan(ap)]
    return float(np.mean(known)) if known else math.nan


def frame_aps(samples: Sequence[Sample], scores: Sequence[Floats]) -> list[float]:
    """Of each sample; NaN where it never comes true."""
    found = []
    for sample, saliency in zip(samples, scores, strict=True):
        index, truth = sample.scored()
        found.append(average_precision(truth, saliency[index]))
    return found


def measures(
    dataset: Dataset, samples: Sequence[Sample], scores: Sequence[Floats], calibration: Calibration
) -> Measures:
    """Every measure by name. `scores` are saliencies; those with a threshold take the default one, calibrated.

    Raises:
        ValueError: nothing comes true.
    """
    options = MomentOptions()
    parted: Mapping[str, list[int]] = {"seen": [], "unseen": []}
    for place, sample in enumerate(samples):
        parted["unseen" if sample.query in dataset.unseen else "seen"].append(place)
    aps = {
        f"frame_ap_{name}": mean_ap([samples[i] for i in chosen], [scores[i] for i in chosen])
        for name, chosen in parted.items()
        if chosen
    }
    graded = [calibration(saliency) for saliency in scores]
    marked = [
        (truth, score[index])
        for sample, score in zip(samples, graded, strict=True)
        for index, truth in [sample.scored()]
    ]
    truths, given = zip(*marked, strict=True)
    told = [tell(sample, score, dataset.hop_s, options) for sample, score in zip(samples, graded, strict=True)]
    runs = [QueryRun(s.windows, s.duration_s, t.opened, t.closed) for s, t in zip(samples, told, strict=True)]
    truth, score = np.concatenate(truths), np.concatenate(given)
    found: Measures = {
        "queries": len(samples),
        "frame_ap": mean_ap(samples, scores),
        **aps,
        "f1": frame_f1(truths, given, options.threshold).micro,
        "frame_recall": float((score[truth] >= options.threshold).mean()),
        "mr_r1_50": _recall_at_1(samples, told, 0.5),
        "mr_r1_70": _recall_at_1(samples, told, 0.7),
        **streaming_scores(runs).named(),
    }
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def _recall_at_1(samples: Sequence[Sample], told: Sequence[Told], iou: float) -> float:
    """Percent of the queries that come true whose strongest moment meets a true window at that IoU."""
    hits = []
    for sample, each in zip(samples, told, strict=True):
        if not len(sample.windows):
            continue
        best = max(each.closed, key=lambda moment: moment.score, default=None)
        hits.append(best is not None and temporal_iou([[best.start_s, best.end_s]], sample.windows).max() >= iou)
    return 100 * float(np.mean(hits))
