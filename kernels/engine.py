"""Runs an engine bundle on the CPU: the one file that imports onnxruntime and tokenizers. No torch, no transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kernels.bundle import EMBEDDED, Manifest, load_manifest
from kernels.errors import BundleError, InputError
from kernels.head import Head, Maps
from kernels.preprocess import Pixels, crop

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Images:
    """N encoded frames."""

    pooled: Vectors  # (N, D)
    layers: Vectors | None  # (N, K, 1+P, width); None where no head reads them


@dataclass(frozen=True, eq=False)
class Texts:
    """N encoded queries."""

    pooled: Vectors  # (N, D) unit norm
    level: Vectors  # (N,) mean of a query's cosine with what the backbone knows: its background
    spread: Vectors  # (N,) standard deviation of the same
    maps: list[Maps] | None  # N, what the head reads of each; None where there is none


class Graph:
    """One ONNX graph. Raises what ONNX Runtime raises, which has no common base, when it cannot be loaded."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """threads: for one operator; 0 leaves the choice to ONNX Runtime (one per core)."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Without this a pool of threads spins between frames, one second apart, and keeps a core busy for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """All outputs by name. Inputs are not copied."""
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


class Engine:
    """A loaded bundle: weights only, no state. It may serve any number of streams from one thread.

    Raises:
        BundleError: the bundle is missing, damaged, or made for another target.
    """

    def __init__(self, folder: Path = EMBEDDED, *, threads: int = 0, zero_shot: bool = False) -> None:
        """
        Args:
            folder: the bundle.
            threads: for one operator; 0 leaves the choice to ONNX Runtime (one per core).
            zero_shot: leave a trained head out: what remains serves any hop.
        """
        self.manifest: Manifest = load_manifest(folder)
        if self.manifest.target != "onnxruntime":
            raise BundleError(f"{folder} is built for {self.manifest.target}, which cannot be run yet")
        try:
            self._image, self._text = (Graph(folder / name, threads=threads) for name in ("image.onnx", "text.onnx"))
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            shape = None if zero_shot else self.manifest.head
            files = ("video.onnx", "query.onnx", "head.onnx")
            self.head = Head(shape, *(Graph(folder / name, threads=threads) for name in files)) if shape else None
        except Exception as error:  # both libraries raise bare Exception for a file they cannot read
            line = str(error).splitlines()[0]
            raise BundleError(f"engine bundle {folder} cannot be loaded: {line}") from error
        # Lengths are checked below, and a batch is padded to its longest text only.
        self._tokenizer.no_truncation()
        self._tokenizer.enable_padding()

    def embed_crops(self, crops: Pixels) -> Images:
        """crops (N, size, size, 3) uint8 RGB."""
        found = self._image(crops=crops)
        return Images(found["pooled"], found.get("layers") if self.head else None)

    def embed_frames(self, frames: Sequence[Pixels]) -> Images:
        """frames: (H, W, 3) uint8 RGB each, of any sizes."""
        m = self.manifest
        return self.embed_crops(np.stack([crop(f, resize=m.image_resize, size=m.image_size) for f in frames]))

    def embed_texts(self, texts: Sequence[str]) -> Texts:
        """Encode queries, in one batch.

        Raises:
            InputError: a text is empty or longer than the engine's context.
        """
        tokens, mask = self.tokenise(texts)
        found = self._text(tokens=tokens, mask=mask)
        maps = self.head.map_queries(found["layers"], found["sentence"], mask > 0) if self.head else None
        return Texts(found["pooled"], found["level"], found["spread"], maps)

    def tokenise(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """-> tokens, mask (N, L), padded to the longest text.

        Raises:
            InputError: a text is empty or longer than the engine's context.
        """
        for text in texts:
            if not text.strip():
                raise InputError("the query is empty: say what to wait for, such as 'a person enters the room'")
        encoded = self._tokenizer.encode_batch(list(texts))
        for text, tokenised in zip(texts, encoded, strict=True):
            length = sum(tokenised.attention_mask)
            if length > self.manifest.max_tokens:
                raise InputError(
                    f"the query is {length} tokens long, this engine takes {self.manifest.max_tokens}: "
                    f"shorten '{text[:40]}...'"
                )
        tokens = np.array([e.ids for e in encoded], dtype=np.int64)  # (N, L)
        mask = np.array([e.attention_mask for e in encoded], dtype=np.int64)
        return tokens, mask
