"""What R2 reads: an image tower and a text tower that show their last K layers, whichever backbone it is.

`clip` is a CLIP of the hub's layout, see `models/clip.py`. `lite` needs no hub, see `models/lite.py`; a CNN and a
sentence encoder have no layers in common, so four taps of the one and the last four layers of the other stand for them.

Both towers also give an embedding. Zero-shot, a text's fit to an image is v . q[:D] + q[D], where q (D + 1) is the
text's embedding and v comes of the image's, e / sqrt(|e|^2 + floor^2).

Letters: N images or texts, S side of a crop, K layers, P patches, L tokens, D embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.clip import ClipTextTower, load_clip
from models.errors import ModelError
from models.lite import (
    EMBEDDING,
    FLOOR,
    IMAGE_SIZE,
    MAX_TOKENS,
    MEAN,
    RESIZE,
    STD,
    TAP_CHANNELS,
    ImageTower,
    QueryTower,
)
from models.lite_packages import load_tokenizer, tokenise, tokenizer_file, towers

LITE_SIDE = 7
"""Of the grid that the taps are pooled to."""


@dataclass(frozen=True)
class Backbone:
    """Both towers, frozen and in evaluation mode, and all that prepares their inputs."""

    name: str
    image: nn.Module
    """crops (N, S, S, 3) uint8 RGB -> layers (N, K, 1+P, video_width), the deepest last, and embedding (N, D), raw."""
    pixels: nn.Module
    """The same from crops (N, 3, S, S), less `mean` and over `std`."""
    mean: list[float]
    """Of red, green and blue, which count from 0 to 255."""
    std: list[float]
    text: nn.Module
    """ids, mask (N, L) int64 -> layers (N, K, L, text_width) and embedding (N, D + 1).

    Of a CLIP the fit is a cosine: the text's vector of unit norm, and 0. Of lite it counts in spreads above the text's
    level (see kernels/saliency.py): the vector by its spread, and minus its level by its spread.
    """
    tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    """Texts -> ids, mask (N, L); a text too long is a ModelError."""
    tokenizer: Path
    """The file that it comes from."""
    context: int
    """Tokens of the longest text."""
    resize: int
    """Pixels of the short side before the centre crop."""
    size: int
    """S."""
    depth: int
    """K."""
    patches: int
    video_width: int
    text_width: int
    embedding: int
    """D."""
    floor: float
    """Length that an image's embedding must exceed to count in full: 0, or lite's."""


def load_backbone(name: str, depth: int = 4) -> Backbone:
    """`lite`, a CLIP's name on the hub such as `openai/clip-vit-base-patch32`, or a folder that holds one.

    Raises:
        ModelError: there is none of that name, a file or package is missing, or it has no `depth` layers.
    """
    return _lite(depth) if name == "lite" else _clip(name, depth)


class FromCrops(nn.Module):
    """Crops in place of normalised pixels, so that all backbones begin alike."""

    def __init__(self, pixels: nn.Module, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.pixels = pixels
        # Of all colours of a row of pixels: an engine is slow where only the last axis, of three, is broadcast.
        self.mean, self.scale = (nn.Buffer(each.repeat(side)) for each in (torch.tensor(mean), 1 / torch.tensor(std)))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        rows = (crops.flatten(2).float() - self.mean) * self.scale
        layers, embedding = self.pixels(rows.reshape(crops.shape).permute(0, 3, 1, 2))
        return layers, embedding


class _Seeing(TypedDict):
    image: nn.Module
    pixels: nn.Module
    mean: list[float]
    std: list[float]


def _seeing(pixels: nn.Module, side: int, mean: list[float], std: list[float]) -> _Seeing:
    return {"image": FromCrops(pixels, side, mean, std).eval(), "pixels": pixels, "mean": mean, "std": std}


class _ClipText(nn.Module):
    def __init__(self, tower: ClipTextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        layers, embedding = self.tower(ids, mask)
        return layers, F.pad(F.normalize(embedding, dim=-1), (0, 1))


def _clip(source: str, depth: int) -> Backbone:
    clip = load_clip(source, depth)
    config = clip.config
    return Backbone(
        name=source if not Path(source).is_dir() else str(Path(source).resolve()),
        **_seeing(
            clip.image, config.image_size, *([255 * value for value in each] for each in (config.mean, config.std))
        ),
        text=_ClipText(clip.text).eval(),
        tokenize=lambda texts: clip.tokenize(texts, truncate=False),
        tokenizer=clip.tokenizer_file,
        context=config.context,
        resize=config.image_size,
        size=config.image_size,
        depth=depth,
        patches=config.patches,
        video_width=config.image.width,
        text_width=config.text.width,
        embedding=config.projection,
        floor=0.0,
    )


class _LiteImage(nn.Module):
    """Taps of the CNN on one grid and in one width; the first token is their mean."""

    def __init__(self, tower: ImageTower, depth: int) -> None:
        super().__init__()
        self.tower, self.depth = tower, depth
        # Fixed and orthonormal: nothing of a tap is lost, and each lies elsewhere in the space that R2 maps.
        generator = torch.Generator().manual_seed(0)
        width = max(TAP_CHANNELS)
        for place, channels in enumerate(TAP_CHANNELS):
            basis, triangle = torch.linalg.qr(torch.randn(width, channels, generator=generator, dtype=torch.float64))
            basis = basis * triangle.diagonal().sign()  # QR leaves the signs to the library
            self.register_buffer(f"basis{place}", basis.float())  # (width, channels)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        taps, logits = self.tower.classifier.taps(pixels)
        layers = []
        for place in range(len(taps) - self.depth, len(taps)):
            grid = F.avg_pool2d(taps[place], taps[place].shape[-1] // LITE_SIDE)
            tokens = F.linear(grid.flatten(2).mT, self.get_buffer(f"basis{place}"))  # (N, P, width)
            layers.append(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        return torch.stack(layers, 1), self.tower.embed(logits)


class _LiteText(nn.Module):
    def __init__(self, tower: QueryTower, depth: int) -> None:
        super().__init__()
        self.tower, self.depth = tower, depth

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.tower.text.hidden(ids, mask)
        pooled, level, spread = self.tower.compared(self.tower.text.pool(hidden[-1], mask))
        embedding = torch.cat([pooled, -level[:, None]], -1) / spread[:, None]
        return torch.stack(hidden[-self.depth :], 1), embedding


def _lite(depth: int) -> Backbone:
    if not 1 <= depth <= len(TAP_CHANNELS):
        raise ModelError(f"the backbone lite shows 1 to {len(TAP_CHANNELS)} layers, not {depth}")
    image, query = towers()
    tokenizer = load_tokenizer()

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = tokenise(tokenizer, texts)
        if ids.shape[1] > MAX_TOKENS:
            longest = texts[int(mask.sum(1).argmax())]
            raise ModelError(f"text of {ids.shape[1]} tokens, lite reads {MAX_TOKENS} at most: {longest[:60]!r}...")
        return ids, mask

    return Backbone(
        name="lite",
        **_seeing(_LiteImage(image, depth).eval().requires_grad_(False), IMAGE_SIZE, [MEAN] * 3, [STD] * 3),
        text=_LiteText(query, depth).eval().requires_grad_(False),
        tokenize=tokenize,
        tokenizer=tokenizer_file(),
        context=MAX_TOKENS,
        resize=RESIZE,
        size=IMAGE_SIZE,
        depth=depth,
        patches=LITE_SIDE**2,
        video_width=max(TAP_CHANNELS),
        text_width=EMBEDDING,
        embedding=EMBEDDING,
        floor=FLOOR,
    )
