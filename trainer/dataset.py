"""What training reads, whatever it was made from: the features of windows, texts, and where each text is true.

    Video     features of a recording, one row a window of 2 s, `hop_s` apart
    Text      a query as the backbone reads it
    Sample    a text on a video, with the truth of every window
    Dataset   all of these by split, and what they were made with

`trainer/tvstream.py` and `trainer/annotated.py` read datasets from disk; `trainer/extract.py` makes features.
Letters: T windows, K layers of the backbone, P patches, L text tokens, D width of its embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from trainer.metrics import inside

WINDOW_S = 2.0
"""Length of a window; the live path's (stream/types.py)."""

Halves = NDArray[np.float16]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Video:
    """Features of one recording. Window t is [t hop, t hop + 2 s); memory-mapped where the file allows it."""

    layers: Halves  # (T, K, 1+P, width), the deepest layer last, the first token CLS
    embedding: Halves  # (T, D)

    def __post_init__(self) -> None:
        if self.layers.ndim != 4 or self.embedding.ndim != 2 or len(self.layers) != len(self.embedding):
            raise ValueError(f"layers must be (T, K, 1+P, width), got {self.layers.shape} and {self.embedding.shape}")


@dataclass(frozen=True, eq=False)
class Text:
    """A query, encoded."""

    layers: Halves  # (K, L, width)
    embedding: Floats  # (D + 1,), see models.backbone.Backbone.text


@dataclass(frozen=True, eq=False)
class Sample:
    """A text on a video, and the truth of its windows."""

    vid: str
    query: str
    windows: NDArray[np.float64]  # (n, 2) true ones, seconds
    duration_s: float
    inside: Bools  # (T,)
    distances: Floats  # (T, 2) from a window's middle to start and end of the shortest moment around it, in hops
    saliency: Floats  # (T,) how strongly it answers; 0 and 1 where nobody rated it
    counted: Bools  # (T,) windows whose truth is known, and which losses and scores count
    frames: NDArray[np.intp] | None = None  # (n,) which window scores each labelled frame; None: all do
    labels: Bools | None = None  # (n,) of those frames

    def scored(self) -> tuple[NDArray[np.intp], Bools]:
        """What frame measures count: n windows, and whether each is true."""
        if self.frames is None or self.labels is None:
            windows = np.flatnonzero(self.counted)
            return windows, self.inside[windows]
        return self.frames, self.labels

    @classmethod
    def of(
        cls,
        vid: str,
        query: str,
        windows: NDArray[np.float64],
        duration_s: float,
        count: int,
        hop_s: float,
        saliency: Floats | None = None,
    ) -> Self:
        """From true windows: a window of features is inside a moment when its middle is."""
        middles = np.arange(count, dtype=np.float64) * hop_s + WINDOW_S / 2
        within = inside(middles, windows)
        return cls(
            vid,
            query,
            windows,
            duration_s,
            within,
            distances(middles, windows, hop_s),
            within.astype(np.float32) if saliency is None else saliency,
            np.ones(count, bool),
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples by split, and where their features are."""

    hop_s: float
    backbone: str
    """What made the features, as `models.backbone.load_backbone` takes it."""
    samples: Mapping[str, Sequence[Sample]]
    """By split: "train", "val", and "test" where there is one."""
    video: Callable[[str], Video]
    """By vid. Raises InputError when its file is missing or damaged."""
    text: Callable[[str], Text]
    """By the query's text."""
    unseen: frozenset[str] = frozenset()
    """Queries that are kept out of training, and scored apart."""
    floor: float = 0.0
    """Length that an image embedding must exceed to count in full, see models.r2.R2Config."""

    def first_tokens(self) -> Self:
        """The same without patches: CLS alone."""

        def video(vid: str) -> Video:
            whole = self.video(vid)
            return Video(whole.layers[:, :, :1], whole.embedding)

        return replace(self, video=video)

    def last_layers(self, depth: int) -> Self:
        """The same, of the last `depth` layers of the backbone alone.

        Raises:
            InputError: the features have fewer.
        """
        any_sample = next(sample for samples in self.samples.values() for sample in samples)
        if (found := self.video(any_sample.vid).layers.shape[1]) < depth:
            raise InputError(f"the features hold {found} layers of the backbone, not {depth}: extract them again")

        def video(vid: str) -> Video:
            whole = self.video(vid)
            return Video(whole.layers[:, -depth:], whole.embedding)

        def text(query: str) -> Text:
            whole = self.text(query)
            return Text(whole.layers[-depth:], whole.embedding)

        return replace(self, video=video, text=text)


def distances(middles: NDArray[np.float64], windows: NDArray[np.float64], hop_s: float) -> Floats:
    """(T, 2) from each middle to start and end of the shortest window that holds it, in hops; zero outside."""
    found = np.zeros((len(middles), 2), np.float32)
    # The longest first: a shorter one that lies inside it overwrites it.
    for start, end in sorted(windows.tolist(), key=lambda window: window[0] - window[1]):
        held = (middles >= start) & (middles < end)
        found[held] = np.stack([middles[held] - start, end - middles[held]], -1) / hop_s
    return found
