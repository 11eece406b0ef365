"""Crops spliced anew, in feature space, out of short pieces of many recordings: far more that a query must not answer.

A crop of one recording shows a query a handful of scenes. Here it sees a piece around a moment of each query of its
group, and random pieces of any other recording between them; each crop is a cut that never was.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from trainer.dataset import Sample


@dataclass(frozen=True)
class Piece:
    """Windows [start, end) of a recording."""

    vid: str
    start: int
    end: int


class Truth(NamedTuple):
    """Of a text over the windows of a crop, see `trainer.dataset.Sample`."""

    inside: NDArray[np.bool_]  # (n,)
    distances: NDArray[np.float32]  # (n, 2)
    saliency: NDArray[np.float32]  # (n,)
    counted: NDArray[np.bool_]  # (n,)


def cut(sample: Sample, piece: Piece) -> Truth:
    """Of one piece of the sample's own recording."""
    part = slice(piece.start, piece.end)
    return Truth(sample.inside[part], sample.distances[part], sample.saliency[part], sample.counted[part])


class Remixer:
    """Knows which texts are asked of which recordings, and so what a text says of a piece of another's."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._lengths = {sample.vid: len(sample.inside) for sample in samples}
        self._vids = sorted(self._lengths)
        self._asked: dict[str, dict[str, Sample]] = defaultdict(dict)
        for sample in samples:
            self._asked[sample.query][sample.vid] = sample

    def pieces(self, group: Sequence[Sample], length: int, mean: int, rng: Generator) -> list[Piece]:
        """In a random order, `length` windows together, each piece mean / 2 to 3 mean / 2 windows long.

        Pieces around moments of the group come first; what does not fit any more is left out.
        """
        chosen: list[Piece] = []
        left = length
        wanted: list[Sample | None] = [*group]
        while left > 0:
            sample = wanted.pop(0) if wanted else None
            vid = sample.vid if sample else self._vids[int(rng.integers(len(self._vids)))]
            size = min(left, int(rng.integers(mean // 2, mean + mean // 2 + 1)), self._lengths[vid])
            true = np.flatnonzero(sample.inside) if sample else np.arange(self._lengths[vid])
            at = int(rng.choice(true)) if len(true) else 0
            start = int(np.clip(at - rng.integers(size), 0, self._lengths[vid] - size))
            chosen.append(Piece(vid, start, start + size))
            left -= size
        return [chosen[place] for place in rng.permutation(len(chosen)).tolist()]

    def truth(self, sample: Sample, pieces: Sequence[Piece]) -> Truth:
        """Of the sample's text over the pieces.

        Where another recording was asked the same, its own truth holds. A text that only some recordings were asked is
        unknown in the rest; one of a single recording is false elsewhere.
        """
        owners = self._asked[sample.query]
        inside, saliency, counted = [], [], []
        for piece in pieces:
            part, size = slice(piece.start, piece.end), piece.end - piece.start
            owner = owners.get(piece.vid)
            inside.append(owner.inside[part] if owner else np.zeros(size, bool))
            saliency.append(owner.saliency[part] if owner else np.zeros(size, np.float32))
            counted.append(owner.counted[part] if owner else np.full(size, len(owners) == 1))
        within = np.concatenate(inside)
        return Truth(within, _run_distances(within), np.concatenate(saliency), np.concatenate(counted))


def _run_distances(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(T, 2) from each window's middle to both ends of the run of true windows around it, in hops; zero outside."""
    found = np.zeros((len(inside), 2), np.float32)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8))).reshape(-1, 2)
    for start, end in edges.tolist():
        at = np.arange(start, end) + 0.5
        found[start:end] = np.stack([at - start, end - at], -1)
    return found
