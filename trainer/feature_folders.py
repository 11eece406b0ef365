"""Folders of features, one file a video or text, as `Video` and `Text`: many layouts made one, errors named by file.

Letters: T windows, K layers, P patches, L text tokens, C width, D width of the embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from trainer.dataset import Bools, Halves, Text, Video
from trainer.features import ENDINGS, ONLY, Manifest, find, read, shapes, text_file
from trainer.resample import first_windows, resample

SLACK = 5
"""Windows by which two extractors may differ on the length of one video."""
_WIDEST = 16384
"""Of pooled features; what is wider has been flattened."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """What a CLIP's flattened features are made of."""

    tokens: int  # 1 + P
    width: int
    text_width: int


LAYOUTS = {
    "openai/clip-vit-base-patch32": Layout(50, 768, 512),
    "openai/clip-vit-base-patch16": Layout(197, 768, 512),
    "openai/clip-vit-large-patch14": Layout(257, 1024, 768),
    "openai/clip-vit-large-patch14-336": Layout(577, 1024, 768),
}


class FeatureFolders:
    """Features of videos by vid and of texts by file. `probe` comes first: all must look like the first of each."""

    def __init__(
        self, video: Sequence[Path], text: Path | None, hop_s: float | None, backbone: str | None, depth: int | None
    ) -> None:
        """
        Args:
            video: several are concatenated along the width, each token of each brought to unit length first.
            text: may be None where `video` is a folder of `livemoments extract`.
            hop_s: seconds between windows; a folder of ours knows it.
            backbone: what made the features; a folder of ours knows it. Flattened ones cannot be read without.
            depth: K, refused if the features have another; None takes what is there.
        Raises:
            InputError: a folder is missing, or says otherwise than the arguments.
        """
        if not video:
            raise InputError("the features of the videos are missing: name their folder")
        for folder in (*video, *([text] if text else [])):
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder of features")
        self.floor = 0.0
        self._ours = None
        self._videos = list(video)
        for folder in video:
            if (manifest := Manifest.read(folder)) is None:
                continue
            if len(video) > 1 or text not in (None, folder):
                raise InputError(f"{folder} holds videos and texts of one backbone: it goes with no other folder")
            asked = {"hop_s": hop_s, "backbone": backbone, "depth": depth}
            for name, value in asked.items():
                if value not in (None, made := getattr(manifest, name)):
                    raise InputError(f"{folder} was extracted with {name} {made}, not {value}")
            self._ours, self._videos, text = manifest, [folder / "video"], folder
            hop_s, backbone, self.floor = manifest.hop_s, manifest.backbone, manifest.floor
        if text is None:
            raise InputError("the features of the texts are missing: name their folder")
        if hop_s is None:
            raise InputError(f"{video[0]} does not say how far its windows are apart: name the hop, in seconds")
        self.hop_s = hop_s
        self.backbone = backbone or "+".join(folder.name for folder in video)
        self._text, self._depth, self._layout = text, depth, LAYOUTS.get(self.backbone)

    def probe(self, vid: str, text: Path) -> None:
        """Settle what all videos and texts look like, from one of each. Raises InputError."""
        parts = self._parts(vid)
        self._shape: tuple[int, ...] = _together(vid, parts).shape[1:]  # K, 1+P, C
        tokens, pooled = self._read_text(text)
        self._text_width = tokens.shape[2]
        # An image answers a text without training where both lie in one space, which equal widths stand for.
        width = self._ours.embedding if self._ours else len(pooled)
        answering = [place for place, (_, image) in enumerate(parts) if image.shape[1] == width]
        self._place, self._embedding = (answering[0], width) if answering else (0, 0)

    @property
    def window_bytes(self) -> int:
        """Of one window in memory."""
        return 2 * (int(np.prod(self._shape)) + self._embedding)

    def known(self, vid: str) -> Bools:
        """(T,) windows that hold a frame, read from the heads of files. Raises InputError."""
        parts = []
        for path in self._video_files(vid):
            heads = shapes(path)
            known = np.ones((heads[_main(path, heads)] or (0,))[0], bool)
            if "pts" in heads:
                first = _grid(path, read(path)["pts"], np.zeros((len(known), 0)), self.hop_s)
                known = np.ones(len(first), bool)
                known[: first_windows(read(path)["pts"][:1], self.hop_s).sum()] = False
            elif "counted" in heads:
                known = read(path)["counted"].astype(bool)
            if not len(known):
                raise InputError(f"{path} holds no windows")
            parts.append(known)
        count = _shared(vid, parts)
        return np.asarray(np.all([known[:count] for known in parts], axis=0))

    def video(self, vid: str) -> Video:
        """Raises InputError if a file is damaged, holds what is no finite number, or does not look like the first."""
        path, parts = self._video_files(vid)[0], self._parts(vid)
        layers, image = _together(vid, parts), parts[self._place][1]
        if layers.shape[1:] != self._shape:
            raise InputError(f"{path}: windows are {layers.shape[1:]} (K, 1+P, C), those of others {self._shape}")
        if self._embedding not in (0, image.shape[1]):
            raise InputError(f"{path}: the embedding is {image.shape[1]} wide, those of others {self._embedding}")
        return Video(_halves(path, layers), _halves(path, image[: len(layers), : self._embedding]))

    def find_text(self, qid: int | str, query: str) -> Path:
        """The file of a text: by the text itself in a folder of ours, else by qid. Raises InputError without."""
        if self._ours:
            if (path := text_file(self._text, query)).is_file():
                return path
            raise InputError(f"{self._text} has no features of {query!r:.60}: extract with these annotations too")
        if found := find(self._text, f"qid{qid}", f"{qid}"):
            return found
        raise InputError(f"{self._text} has no features of qid {qid}: no {qid} or qid{qid} with {_endings()}")

    def text(self, path: Path) -> Text:
        """Raises InputError as `video` does."""
        tokens, pooled = self._read_text(path)
        if tokens.shape[2] != self._text_width:
            raise InputError(f"{path}: tokens are {tokens.shape[2]} wide, those of others {self._text_width}")
        embedding = np.zeros(self._embedding + 1, np.float32)
        if self._embedding:
            width = self._embedding + (self._ours is not None)
            if len(pooled) != width:
                raise InputError(f"{path}: the embedding is {len(pooled)} wide, those of others {width}")
            if not np.isfinite(pooled).all():
                raise InputError(f"{path}: a number is not finite")
            # What is not ours comes from a CLIP, whose fit is a cosine: see models.backbone.Backbone.text.
            embedding[:width] = pooled if self._ours else pooled / np.linalg.norm(pooled).clip(1e-6)
        return Text(_halves(path, tokens), embedding)

    # -- videos

    def _video_files(self, vid: str) -> list[Path]:
        """One a folder."""
        found = {folder: find(folder, vid) for folder in self._videos}
        for folder, path in found.items():
            if path is None:
                raise InputError(f"{folder} has no features of video {vid}: no {vid} with {_endings()}")
        return [path for path in found.values() if path]

    def _parts(self, vid: str) -> list[tuple[Array, Array]]:
        """(T, K, 1+P, C) and (T, D) of every folder; D is 0 where nothing answers a text without training."""
        parts = []
        for path in self._video_files(vid):
            arrays = read(path)
            main = _floats(path, arrays[_main(path, arrays)])
            layers = self._unflatten(path, main)
            pooled = layers.shape[1:3] == (1, 1)
            image = arrays.get("embedding", layers[:, 0, 0] if pooled else np.zeros((len(layers), 0), np.float16))
            if image.ndim != 2 or len(image) != len(layers):
                raise InputError(f"{path}: expected an embedding ({len(layers)}, D), got {image.shape}")
            if "pts" in arrays:
                layers, image = (_grid(path, arrays["pts"], values, self.hop_s) for values in (layers, image))
            parts.append((layers, _floats(path, image)))
        return parts

    def _unflatten(self, path: Path, given: Array) -> Array:
        """(T, K, 1+P, C)."""
        if given.ndim == 2 and self._layout and given.shape[1] % (self._layout.tokens * self._layout.width) == 0:
            given = given.reshape(len(given), -1, self._layout.tokens, self._layout.width)
        elif given.ndim == 2 and given.shape[1] > _WIDEST:
            raise InputError(
                f"{path}: windows of {given.shape[1]} numbers are flattened layers: name the backbone, one of "
                + ", ".join(LAYOUTS)
            )
        elif given.ndim == 2:
            given = given[:, None, None]
        if given.ndim != 4 or 0 in given.shape:
            raise InputError(f"{path}: expected features (T, C) or (T, K, 1+P, C), got {given.shape}")
        if self._depth not in (None, given.shape[1]):
            raise InputError(f"{path} has {given.shape[1]} layers, not {self._depth}")
        return given

    # -- texts

    def _read_text(self, path: Path) -> tuple[Array, Array]:
        """Tokens (K, L, C), and what answers an image without training: (D,) or empty."""
        arrays, depth = read(path), self._shape[0]
        name = _main(path, arrays)
        main = tokens = _floats(path, arrays[name])
        if main.ndim == 1:
            tokens = main[None, None]
        elif main.ndim == 2 and depth == 1:
            tokens = main[None]
        elif main.ndim == 2 and self._layout and main.shape[1] == depth * self._layout.text_width:
            tokens = main.reshape(len(main), depth, -1).swapaxes(0, 1)
        elif main.ndim == 3 and not self._ours:  # all but ours put the layers behind the tokens
            tokens = main.swapaxes(0, 1)
        if tokens.ndim != 3 or 0 in tokens.shape or len(tokens) != depth:
            raise InputError(
                f"{path}: expected tokens (L, K, C) of {depth} layers, as the videos have, got {main.shape}"
                + ("" if self._layout or main.ndim != 2 else ": if they are flattened, name the backbone")
            )
        lone = main if main.size == main.shape[-1] else np.zeros(0, np.float16)  # a text of one token is pooled
        return tokens, _floats(path, arrays.get("pooler_output", arrays.get("embedding", lone))).reshape(-1)


def _main(path: Path, names: Iterable[str]) -> str:
    """Which array of a file is the features."""
    held = list(names)
    for name in ("layers", ONLY, "last_hidden_state", *held[: len(held) == 1]):
        if name in held:
            return name
    raise InputError(f"{path} holds {', '.join(held) or 'nothing'}: expected an array called {ONLY}")


def _floats(path: Path, values: Array) -> Array:
    if values.dtype.kind != "f":
        raise InputError(f"{path}: expected floating point numbers, got {values.dtype}")
    return values


def _halves(path: Path, values: Array) -> Halves:
    """As they are if they are fp16 already, so that a mapped file stays mapped."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16, copy=False)
    if not np.isfinite(halves).all():
        raise InputError(f"{path}: a number is not finite, or beyond the 65504 of fp16")
    return halves


def _grid(path: Path, pts: Array, values: Array, hop_s: float) -> Array:
    try:
        return resample(pts, values, hop_s)[0]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: pts: {error}") from None


def _shared(vid: str, parts: Sequence[Array]) -> int:
    """T of features that are as good as equally long."""
    lengths = [len(part) for part in parts]
    if max(lengths) - min(lengths) > SLACK:
        raise InputError(f"video {vid}: its folders hold {lengths} windows: were they extracted at one hop?")
    return min(lengths)


def _together(vid: str, parts: Sequence[tuple[Array, Array]]) -> Array:
    """(T, K, 1+P, C) of all folders: several side by side, each token of each of unit length."""
    layers = [layers for layers, _ in parts]
    if len(layers) == 1:
        return layers[0]
    count = _shared(vid, layers)
    if len({part.shape[1:3] for part in layers}) > 1:
        raise InputError(f"video {vid}: its folders disagree on layers and tokens, and cannot be put side by side")
    wide = [part[:count].astype(np.float32) for part in layers]
    return np.concatenate([part / np.linalg.norm(part, axis=-1, keepdims=True).clip(1e-5) for part in wide], -1)


def _endings() -> str:
    return f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
