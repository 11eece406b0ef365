"""Samples -> the tensors of a training step.

A step reads V crops of T windows, and of each crop up to Q queries: rows. What does not depend on the query, by far the
larger part with many patches, is then computed once a crop.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.dataset import Dataset, Sample
from trainer.losses import Targets


class Batch(NamedTuple):
    """V crops, R rows."""

    layers: Tensor  # (V, T, K, 1+P, width)
    embedding: Tensor  # (V, T, D)
    mask: Tensor  # (V, T) bool, false on padding at the end
    row_video: Tensor  # (R,) int64: which crop a row watches
    words: Tensor  # (R, K, L, width)
    word_mask: Tensor  # (R, L) bool
    asked: Tensor  # (R, D + 1): embedding of the query
    targets: Targets

    def to(self, device: torch.device) -> "Batch":
        targets = Targets(*(each.to(device) for each in self.targets))
        moved = {name: each.to(device) for name, each in self._asdict().items() if name != "targets"}
        return Batch(**moved, targets=targets)


def groups(samples: Sequence[Sample], queries: int, rng: Generator) -> list[list[Sample]]:
    """All samples once, in random order: up to `queries` of one video together."""
    by_video: dict[str, list[Sample]] = defaultdict(list)
    for index in rng.permutation(len(samples)).tolist():
        by_video[samples[index].vid].append(samples[index])
    found = [mine[at : at + queries] for mine in by_video.values() for at in range(0, len(mine), queries)]
    return [found[index] for index in rng.permutation(len(found)).tolist()]


def epoch(
    dataset: Dataset, samples: Sequence[Sample], *, crops: int, queries: int, length: int, rng: Generator
) -> Iterator[Batch]:
    """Every sample once, `crops` groups a step. The last step may have fewer."""
    found = groups(samples, queries, rng)
    for at in range(0, len(found), crops):
        yield collate(dataset, found[at : at + crops], length, rng)


def collate(dataset: Dataset, chosen: Sequence[Sequence[Sample]], length: int, rng: Generator) -> Batch:
    """One crop of `length` windows for each group, placed so that one of its queries comes true in it."""
    longest = min(length, max(len(group[0].inside) for group in chosen))
    layers, embeddings, masks, rows = [], [], [], []
    for place, group in enumerate(chosen):
        video, count = dataset.video(group[0].vid), len(group[0].inside)
        true = np.flatnonzero(group[int(rng.integers(len(group)))].inside)
        centre = int(rng.choice(true)) if len(true) else int(rng.integers(count))
        start = int(np.clip(centre - rng.integers(longest), 0, max(0, count - longest)))
        crop = slice(start, start + longest)
        layers.append(_padded(video.layers[crop], longest))
        embeddings.append(_padded(video.embedding[crop], longest))
        masks.append(torch.arange(longest) < count - start)
        rows += [(place, sample, crop) for sample in group]
    texts = [dataset.text(sample.query) for _, sample, _ in rows]
    words = [torch.from_numpy(np.ascontiguousarray(text.layers.swapaxes(0, 1), np.float32)) for text in texts]
    lengths = torch.tensor([len(each) for each in words])
    row_video = torch.tensor([place for place, _, _ in rows])
    return Batch(
        torch.stack(layers),
        torch.stack(embeddings),
        torch.stack(masks),
        row_video,
        pad_sequence(words, batch_first=True).transpose(1, 2).contiguous(),
        torch.arange(int(lengths.max())) < lengths[:, None],
        torch.from_numpy(np.stack([text.embedding for text in texts])),
        _targets(rows, row_video, longest, rng),
    )


def _targets(rows: Sequence[tuple[int, Sample, slice]], row_video: Tensor, length: int, rng: Generator) -> Targets:
    inside, away, saliency, counted = (
        torch.stack([_padded(getattr(sample, name)[crop], length) for _, sample, crop in rows])
        for name in ("inside", "distances", "saliency", "counted")
    )
    true = (inside.bool() & counted.bool()).numpy()
    positive = [int(rng.choice(np.flatnonzero(row))) if row.any() else -1 for row in true]
    names = [sample.query for _, sample, _ in rows]
    alike = torch.tensor([[a == b for b in names] for a in names])
    # Another query of the same crop that is true at the same window does not contradict it either.
    also = torch.from_numpy(true).T[torch.tensor(positive)]
    alike |= (row_video[:, None] == row_video) & also
    return Targets(inside.bool(), away, saliency, counted.bool(), torch.tensor(positive), alike)


def _padded(values: NDArray[Any], length: int) -> Tensor:
    """(n, ...) -> (length, ...) fp32, zeros at the end."""
    out = torch.zeros(length, *values.shape[1:])
    out[: len(values)] = torch.from_numpy(np.ascontiguousarray(values))
    return out
