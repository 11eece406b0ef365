"""Samples -> the tensors of a training step.

A step reads V crops of T windows, and of each crop up to Q queries: rows. What does not depend on the query, by far the
larger part with many patches, is then computed once a crop.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.dataset import Dataset, Sample
from trainer.losses import Targets
from trainer.remix import Piece, Remixer, Truth, cut


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


def groups(samples: Sequence[Sample], queries: int, rng: Generator, *, mixed: bool = False) -> list[list[Sample]]:
    """All samples once, in random order, up to `queries` together: of one video, or `mixed`."""
    by_video: dict[str, list[Sample]] = defaultdict(list)
    for index in rng.permutation(len(samples)).tolist():
        by_video["" if mixed else samples[index].vid].append(samples[index])
    found = [mine[at : at + queries] for mine in by_video.values() for at in range(0, len(mine), queries)]
    return [found[index] for index in rng.permutation(len(found)).tolist()]


@dataclass(frozen=True)
class Cutter:
    """Cuts crops: of one recording each, or of pieces of many."""

    dataset: Dataset
    length: int
    """T at most."""
    remixer: Remixer | None = None
    piece: int = 0
    """Windows of a piece in the mean, with a remixer."""

    def collate(self, chosen: Sequence[Sequence[Sample]], rng: Generator) -> Batch:
        """One crop for each group, placed so that one of its queries comes true in it."""
        crops = [self._crop(group, rng) for group in chosen]
        longest = max(len(truths[0].inside) for _, truths in crops)
        videos = [[self.dataset.video(piece.vid) for piece in pieces] for pieces, _ in crops]
        layers, embeddings = (
            torch.stack(
                [
                    _padded([getattr(v, name)[p.start : p.end] for v, p in zip(mine, pieces, strict=True)], longest)
                    for mine, (pieces, _) in zip(videos, crops, strict=True)
                ]
            )
            for name in ("layers", "embedding")
        )
        rows = [(place, truth) for place, (_, truths) in enumerate(crops) for truth in truths]
        row_video = torch.tensor([place for place, _ in rows])
        queries = [sample.query for group in chosen for sample in group]
        texts = [self.dataset.text(query) for query in queries]
        words = [torch.from_numpy(np.ascontiguousarray(text.layers.swapaxes(0, 1), np.float32)) for text in texts]
        lengths = torch.tensor([len(each) for each in words])
        return Batch(
            layers,
            embeddings,
            torch.arange(longest) < torch.tensor([len(truths[0].inside) for _, truths in crops])[:, None],
            row_video,
            pad_sequence(words, batch_first=True).transpose(1, 2).contiguous(),
            torch.arange(int(lengths.max())) < lengths[:, None],
            torch.from_numpy(np.stack([text.embedding for text in texts])),
            _targets([truth for _, truth in rows], queries, row_video, longest, rng),
        )

    def _crop(self, group: Sequence[Sample], rng: Generator) -> tuple[list[Piece], list[Truth]]:
        if self.remixer:
            pieces = self.remixer.pieces(group, self.length, self.piece, rng)
            return pieces, [self.remixer.truth(sample, pieces) for sample in group]
        count = len(group[0].inside)
        size = min(self.length, count)
        true = np.flatnonzero(group[int(rng.integers(len(group)))].inside)
        centre = int(rng.choice(true)) if len(true) else int(rng.integers(count))
        start = int(np.clip(centre - rng.integers(size), 0, count - size))
        piece = Piece(group[0].vid, start, start + size)
        return [piece], [cut(sample, piece) for sample in group]


def _targets(
    truths: Sequence[Truth], queries: Sequence[str], row_video: Tensor, length: int, rng: Generator
) -> Targets:
    inside, away, saliency, counted = (
        torch.stack([_padded([part], length) for part in parts]) for parts in zip(*truths, strict=True)
    )
    true = (inside.bool() & counted.bool()).numpy()
    positive = [int(rng.choice(np.flatnonzero(row))) if row.any() else -1 for row in true]
    alike = torch.tensor([[a == b for b in queries] for a in queries])
    # Another query of the same crop that is true at the same window does not contradict it either.
    also = torch.from_numpy(true).T[torch.tensor(positive)]
    alike |= (row_video[:, None] == row_video) & also
    return Targets(inside.bool(), away, saliency, counted.bool(), torch.tensor(positive), alike)


def _padded(parts: Sequence[NDArray[Any]], length: int) -> Tensor:
    """(n, ...) each, one behind the other -> (length, ...) fp32, zeros at the end."""
    out, at = torch.zeros(length, *parts[0].shape[1:]), 0
    for part in parts:
        out[at : at + len(part)] = torch.from_numpy(np.ascontiguousarray(part))
        at += len(part)
    return out
