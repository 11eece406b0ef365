"""Bundles: what is refused and how it is said; preprocessing; texts that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kernels.bundle import EMBEDDED, load_manifest
from kernels.engine import Engine
from kernels.errors import BundleError, InputError


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(zero_shot=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))


def edit(bundle: Path, **fields: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | fields))


def truncate(bundle: Path) -> None:
    path = bundle / "image.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def forge(bundle: Path) -> None:
    """A file that is not a model, with a manifest that vouches for it."""
    from kernels.bundle import describe_files

    (bundle / "image.onnx").write_bytes(b"not a model")
    edit(bundle, files=describe_files(bundle))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: shutil.rmtree(b), "there is no such folder"),
        (lambda b: (b / "manifest.json").unlink(), "has no manifest.json"),
        (lambda b: (b / "manifest.json").write_text("{"), "cannot be read"),
        (lambda b: (b / "manifest.json").write_text("[]"), "format None"),
        (lambda b: edit(b, format=99), "format 99, this version reads 2"),
        (lambda b: edit(b, surprise=1), "surprise"),
        (lambda b: edit(b, head={"depth": 4}), "damaged: missing 8 required positional arguments: 'window'"),
        (lambda b: edit(b, head=7), "is damaged"),
        (lambda b: edit(b, files={"head.onnx": {}}), "is damaged: files;"),
        (lambda b: edit(b, files=[]), "is damaged: files;"),
        (lambda b: edit(b, calibration={}), "is damaged: calibration;"),
        (lambda b: edit(b, calibration={"floor": 0, "centre": "x", "slope": 1}), "is damaged: calibration;"),
        (lambda b: (b / "text.onnx").unlink(), "text.onnx is missing"),
        (truncate, "image.onnx does not match its hash"),
        (forge, "cannot be loaded"),
        (lambda b: edit(b, target="abacus"), "built for abacus"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(bundle: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Engine(bundle)
    assert "\n" not in str(caught.value)


def test_an_intact_copy_loads(bundle: Path) -> None:
    assert load_manifest(bundle).model == "lite and R2"


def test_a_batch_gives_what_single_calls_give(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (90, 160, 3), dtype=np.uint8), rng.integers(0, 256, (240, 200, 3), dtype=np.uint8)]
    batch = engine.embed_frames(frames).pooled
    singles = np.concatenate([engine.embed_frames([frame]).pooled for frame in frames])
    np.testing.assert_allclose(batch, singles, atol=1e-5)
    texts = ["a dog", "a very long sentence about a dog that runs along a beach with a stick"]
    together, apart = engine.embed_texts(texts), [engine.embed_texts([t]) for t in texts]
    for name in ("pooled", "level", "spread"):
        expected = np.concatenate([getattr(text, name) for text in apart])
        np.testing.assert_allclose(getattr(together, name), expected, atol=1e-5)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_query_is_refused(engine: Engine, text: str) -> None:
    with pytest.raises(InputError, match="query is empty"):
        engine.embed_texts([text])


def test_an_overlong_query_is_refused_and_never_cut(engine: Engine) -> None:
    fits = " ".join(["dog"] * (engine.manifest.max_tokens - 2))
    assert engine.embed_texts([fits]).pooled.shape == (1, engine.manifest.width)
    with pytest.raises(InputError, match=r"129 tokens long, this engine takes 128"):
        engine.embed_texts([fits + " dog"])
