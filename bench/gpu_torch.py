"""What the engines of a bundle would cost in torch, eager and compiled, on the same GPU; the head with random weights.

Weights do not change the time. The rest of a window is there too: frames go up, columns are written into the rings.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from kernels.bundle import HeadShape, Manifest
from kernels.recipe import Narrow
from models.backbone import Backbone, load_backbone
from models.r2 import R2
from models.r2_types import R2Config

Pixels = NDArray[np.uint8]


class Work(NamedTuple):
    name: str
    eager: Callable[[], object]
    compiled: Callable[[], object]
    gflop: float  # of matrix products and convolutions


def why_not() -> str | None:
    """Why torch has no say here; None where it has."""
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def works(
    manifest: Manifest, device: str, frames: Sequence[Pixels], batches: Sequence[int], rows: Sequence[int], words: int
) -> Iterator[Work]:
    """The works of bench/gpu.py by the same names.

    Args:
        frames: to preprocess, one at a time.
        batches: of the image tower.
        rows: of the head; none without one.
        words: tokens of a query.
    Raises:
        ModelError: the weights of the backbone are not here.
    """
    torch.set_grad_enabled(False)
    half = torch.half if device == "cuda" else torch.float  # fp16 convolutions are not for a CPU
    backbone = load_backbone(manifest.model.removesuffix(" and R2"), manifest.head.depth if manifest.head else 1)
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (backbone.mean, backbone.std))
    for frame in frames:
        height, width, _ = frame.shape
        scale = backbone.resize / min(height, width)
        size = int(height * scale), int(width * scale)
        edges = [(each - backbone.size) // 2 for each in size]

        def preprocess(frame: Pixels = frame, size: tuple[int, int] = size, edges: list[int] = edges) -> Tensor:
            whole = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float()
            small = F.interpolate(whole, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
            top, left = edges
            under = small[..., top : top + backbone.size, left : left + backbone.size]
            return ((under - mean) / std).to(half)

        yield _work(f"preprocess, {width}x{height}", preprocess)
    tower = Narrow(backbone.pixels, half).to(device).eval()
    for batch in batches:
        pixels = torch.randn(batch, 3, backbone.size, backbone.size, device=device, dtype=half)

        def image(pixels: Tensor = pixels) -> object:
            return tower(pixels)

        yield _work(f"image, {batch}", image)
    if manifest.head:
        with torch.device(device):
            yield from _heads(manifest.head, backbone, rows, words)


def time_ms(call: Callable[[], object], seconds: float, rounds: int) -> list[float]:
    """Of each round, on the GPU, after as many seconds of warming up."""
    end = time.monotonic() + seconds
    call()  # compiles
    while time.monotonic() < end:
        call()
    taken = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        last.synchronize()
        taken.append(float(first.elapsed_time(last)))
    return taken


def _heads(shape: HeadShape, backbone: Backbone, rows: Sequence[int], words: int) -> Iterator[Work]:
    """Where the default device is the GPU."""
    widths = backbone.video_width, backbone.text_width, backbone.embedding, backbone.floor
    model = R2(
        R2Config("causal", *widths, depth=shape.depth, width=shape.width, heads=shape.heads, window=shape.window)
    ).eval()
    video = model.video_maps(
        torch.randn(1, shape.depth, 1 + backbone.patches, backbone.video_width), torch.randn(1, backbone.embedding)
    )
    for count in rows:
        query = model.query_maps(
            torch.randn(count, shape.depth, words, backbone.text_width),
            torch.randn(count, backbone.embedding + 1),
            torch.ones(count, words, dtype=torch.bool),
        )
        state, stream = model.new_state(count), torch.zeros(count, dtype=torch.int64)

        def window(query=query, state=state, stream=stream) -> Tensor:  # type: ignore[no-untyped-def]
            outputs, columns = model.step(video, stream, query, state)
            state.append(columns)
            return outputs.saliency

        yield _work(f"head, {count}", window)


def _work(name: str, call: Callable[[], object]) -> Work:
    with FlopCounterMode(display=False) as counter:
        call()
    return Work(name, call, torch.compile(call), round(counter.get_total_flops() / 1e9, 5))
