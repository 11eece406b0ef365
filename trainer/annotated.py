"""Annotated videos whose features are files: QVHighlights' jsonl beside the folders that people in this field have.

    of whom                       video                                     text
    `livemoments extract`         one folder with features.json             in the same folder
    Moment-DETR and its heirs     <vid>.npz features (T, D), two folders    qid<qid>.npz last_hidden_state (L, C),
                                  of CLIP and SlowFast                      pooler_output (D,)
    R2-Tuning                     <vid>.npy (T, K, 1+P, C), or flattened    <qid>.npy (L, K, C), or flattened
    anybody                       layers or features, .npz .npy             the same, by <qid> or qid<qid>
                                  .safetensors, with pts (T,) if irregular

A line is `qid query vid duration relevant_windows`, and if there are any `relevant_clip_ids saliency_scores` (votes of
0 to 4 for clips of 2 s) and `ignored_windows` ([[start, end]], seconds where nobody knows the truth).

Letters: T windows, K layers, P patches, L text tokens, C width, D width of the embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from stream.types import tidy
from stream.window import hop_from_seconds
from trainer.dataset import WINDOW_S, Bools, Dataset, Sample
from trainer.feature_folders import FeatureFolders
from trainer.metrics import CLIP_S, LEVELS, Truth, inside, parse_windows, read_lines

_LONGEST_NAME = 200  # bytes; a file's name may have 255, endings included
_VOTES = max(LEVELS.values())
_TEXTS_KEPT = 2048
_LENGTH_SLACK = 5  # windows
_VIDEOS_KEPT = 256  # mapped files cost no memory, but each costs a mapping

Spans = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Annotation:
    """A line: where a text is true of a video."""

    truth: Truth
    rated: bool
    """Whether clips have votes."""
    ignored: Spans  # (n, 2) seconds

    @property
    def qid(self) -> int | str:
        return self.truth.qid

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl; raises InputError."""
        rated = "relevant_clip_ids" in line or "saliency_scores" in line
        truth = Truth.parse(line if rated else line | {"relevant_clip_ids": [], "saliency_scores": []})
        if not tidy(truth.query):
            raise InputError("query: the text is empty")
        # Half a surrogate pair is JSON and no text: encode() raises, and read_lines says where.
        name = truth.query.encode() and truth.vid.encode()
        if not 0 < len(name) <= _LONGEST_NAME or name in (b".", b"..") or set(b"/\\\0") & set(name):
            raise InputError(f"vid must be the name of a file without its ending, got {truth.vid!r:.60}")
        if ((truth.saliency < 0) | (truth.saliency > _VOTES)).any():
            raise InputError(f"saliency_scores: votes are 0 to {_VOTES}")
        return cls(truth, rated, parse_windows({"ignored_windows": []} | line, "ignored_windows", 2))


def read_annotations(path: Path) -> dict[str, Annotation]:
    """What stands at each "file:line", in order. Raises InputError as read_lines does."""
    return {f"{path}:{number}": parsed for number, parsed in read_lines(path, Annotation.parse).values()}


def check_length(windows: int, hop_s: float, duration_s: float) -> None:
    """Raises InputError if that many windows cannot be those of a video of that length."""
    expected = duration_s / hop_s
    if not 0.75 * expected - _LENGTH_SLACK <= windows <= 1.25 * expected + _LENGTH_SLACK:
        raise InputError(
            f"{windows} windows every {hop_s:g} s are not {duration_s:g} s of video: another hop, or a damaged file?"
        )


def load_annotated(
    annotations: Mapping[str, Path],
    video: Sequence[Path],
    text: Path | None = None,
    hop_s: float | None = None,
    *,
    backbone: str | None = None,
    depth: int | None = None,
    cache_bytes: int = 4 << 30,
) -> Dataset:
    """Annotations with their features. Heads of files are read now, data when it is asked for.

    A folder of `livemoments extract` knows hop, backbone and depth, and has the texts; others are told, see
    `FeatureFolders`. Several folders of videos lie side by side in the width, each token of each of unit length, as
    Moment-DETR does it; one folder stays as it is. The embedding is what a file calls so, or pooled features as wide
    as the text's `pooler_output`; without, it is 0 wide.

    Args:
        annotations: jsonl by split ("train", "val", ..), see above. No video of "train" may be in another.
        cache_bytes: memory for features that cannot be mapped from their files (.npz, fp32, several folders).
    Raises:
        InputError: a file is missing or wrong. Names file and line, and says what to do.
    """
    splits = {name: read_annotations(path) for name, path in annotations.items()}
    _check_apart(splits)
    folders = FeatureFolders(video, text, hop_s, backbone, depth)
    hop_from_seconds(folders.hop_s)
    texts: dict[str, Path] = {}  # by query
    owners: dict[Path, str] = {}
    known: dict[str, Bools] = {}  # by vid
    samples: dict[str, list[Sample]] = {name: [] for name in splits}
    for name, lines in splits.items():
        for place, line in lines.items():
            truth = line.truth
            try:
                if truth.query not in texts:
                    path = folders.find_text(truth.qid, truth.query)
                    if owners.setdefault(path, truth.query) != truth.query:
                        raise InputError(f"qid {truth.qid} stands for {owners[path]!r:.60} elsewhere, and for one file")
                    texts[truth.query] = path
                if not known:
                    folders.probe(truth.vid, texts[truth.query])
                if truth.vid not in known:
                    known[truth.vid] = folders.known(truth.vid)
                check_length(len(known[truth.vid]), folders.hop_s, truth.duration)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            samples[name].append(_sample(line, known[truth.vid], folders.hop_s))
    largest = max(map(len, known.values())) * folders.window_bytes
    return Dataset(
        folders.hop_s,
        folders.backbone,
        samples,
        lru_cache(min(max(cache_bytes // largest, 1), _VIDEOS_KEPT))(folders.video),
        lru_cache(_TEXTS_KEPT)(lambda query: folders.text(texts[query])),
        floor=folders.floor,
    )


def _check_apart(splits: Mapping[str, Mapping[str, Annotation]]) -> None:
    """Raises InputError if a video that is trained on is scored too."""
    trained = {line.truth.vid: place for place, line in splits.get("train", {}).items()}
    for place, line in ((place, line) for name in splits.keys() - {"train"} for place, line in splits[name].items()):
        if first := trained.get(line.truth.vid):
            raise InputError(
                f"{place}: video {line.truth.vid} is trained on too ({first}), so its score would mean nothing: "
                "leave it out of one of the two"
            )


def _sample(line: Annotation, known: Bools, hop_s: float) -> Sample:
    truth = line.truth
    middles = np.arange(len(known)) * hop_s + WINDOW_S / 2
    saliency = None
    if line.rated:
        clips = truth.saliency.mean(1) / _VOTES if truth.saliency.size else np.zeros(1)
        at = (middles // CLIP_S).astype(int)
        saliency = np.where(at < len(clips), clips[at.clip(max=len(clips) - 1)], 0).astype(np.float32)
    # A moment so short that it lies between two middles would be no target at all: it gets the hop around its own.
    spans = truth.windows.copy()
    for span in spans:
        if not inside(middles, span).any():
            centre = span.mean()
            span[:] = min(span[0], centre - hop_s / 2), max(span[1], centre + hop_s / 2)
    sample = Sample.of(truth.vid, truth.query, spans, truth.duration, len(known), hop_s, saliency)
    return replace(sample, windows=truth.windows, counted=known & ~inside(middles, line.ignored))
