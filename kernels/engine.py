"""Runs an engine bundle, on whatever it was built for: frames and texts in, what is known of them out. No torch.

What runs the graphs is a runtime (kernels/onnx_runtime.py, kernels/gpu_runtime.py), chosen by the bundle's target and
imported then.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kernels.bundle import EMBEDDED, GPU_TARGETS, Manifest, load_manifest
from kernels.errors import BundleError, InputError
from kernels.head import Head, Maps
from kernels.onnx_runtime import CpuRuntime
from kernels.preprocess import Pixels
from kernels.saliency import Calibration

if TYPE_CHECKING:
    from kernels.gpu_runtime import GpuRuntime

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


class Engine:
    """A loaded bundle: weights only, no state. It may serve any number of streams from one thread.

    Raises:
        BundleError: the bundle is missing, damaged, or made for a machine that this is not.
    """

    def __init__(self, folder: Path = EMBEDDED, *, threads: int = 0, zero_shot: bool = False) -> None:
        """
        Args:
            folder: the bundle.
            threads: for one operator on a CPU; 0 leaves the choice to ONNX Runtime (one per core).
            zero_shot: leave a trained head out: what remains serves any hop.
        """
        self._runtime = _runtime(folder, load_manifest(folder), threads)
        self.manifest: Manifest = self._runtime.manifest
        self._text = self._runtime.graph("text")
        shape = None if zero_shot else self.manifest.head
        self.head: Head | None = None
        self.batches = Counter[int]()  # calls of the image tower so far, by how many frames each had
        if shape:
            video, query, step = (self._runtime.graph(name) for name in ("video", "query", "head"))
            self.head = Head(shape, video, query, step, self._runtime.rows)
        self.calibration = Calibration(**self.manifest.calibration)
        self.distractors: Vectors | None = None  # (M, D) unit norm
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if self.calibration.temperature:
                self.distractors = np.load(folder / "distractors.npy").astype(np.float32)
        except Exception as error:  # tokenizers raises bare Exception
            line = str(error).splitlines()[0]
            raise BundleError(f"engine bundle {folder} cannot be loaded: {line}") from error
        if self.distractors is not None and self.distractors.shape[1:] != (self.manifest.width,):
            raise BundleError(f"{folder}/distractors.npy does not fit the engines: build the bundle again")
        # Lengths are checked below, and a batch is padded to its longest text only.
        self._tokenizer.no_truncation()
        self._tokenizer.enable_padding()
        self._tokenizer.encode_special_tokens = True  # a query that spells one out means its letters

    def embed_frames(self, frames: Sequence[Pixels]) -> Images:
        """frames: (H, W, 3) uint8 RGB each, of any sizes."""
        self.batches[len(frames)] += 1
        found = self._runtime.see(frames)
        return Images(found["pooled"], found.get("layers") if self.head else None)

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


def _runtime(folder: Path, manifest: Manifest, threads: int) -> "CpuRuntime | GpuRuntime":
    if manifest.target == "onnxruntime":
        return CpuRuntime(folder, manifest, threads=threads)
    if manifest.target in GPU_TARGETS:
        from kernels.gpu_runtime import GpuRuntime  # heavy, and seldom there

        return GpuRuntime(folder, manifest)
    raise BundleError(f"{folder} is built for {manifest.target}, which this version does not run")
