"""The `clip` backbone against transformers, on random weights of the full size; its files, its texts, its export."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from kernels.export import export
from models.clip import (
    EOS_IS_LARGEST,
    VIT_B16,
    VIT_B32,
    VIT_L14,
    VIT_L14_336,
    Clip,
    ClipConfig,
    ClipImageTower,
    ClipTextTower,
    TowerConfig,
    load_clip,
)
from models.errors import ModelError

TEXTS = ["a dog catches the ball", "x", "The Crowd cheers, and it's loud:  22 players leave!", ""]
START, END = "<|startoftext|>", "<|endoftext|>"
TINY = ClipConfig(TowerConfig(32, 3, 2, 64), TowerConfig(24, 2, 3, 48), 8, 24, 16, vocabulary=600, eos_token_id=599)


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """A tokenizer of CLIP's kind: byte-level BPE that knows the ends of words, whose last two tokens enclose a text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "a woman opens the door and a man enters the room"] * 4, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:80]
    # In the order of the published file: bytes, bytes that end a word, what they merge to, and the two specials last.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += [f"<|unused{i}|>" for i in range(vocabulary - 2 - len(tokens))] + [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer.model = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END)
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def hub_config(config: ClipConfig) -> dict[str, Any]:
    def tower(part: TowerConfig) -> dict[str, Any]:
        return {
            "hidden_size": part.width,
            "num_hidden_layers": part.layers,
            "num_attention_heads": part.heads,
            "intermediate_size": part.mlp_width,
            "hidden_act": part.activation,
            "layer_norm_eps": part.norm_eps,
        }

    return {
        "model_type": "clip",
        "projection_dim": config.projection,
        "vision_config": tower(config.image) | {"patch_size": config.patch, "image_size": config.image_size},
        "text_config": tower(config.text)
        | {
            "vocab_size": config.vocabulary,
            "max_position_embeddings": config.context,
            "eos_token_id": config.eos_token_id,
            "bos_token_id": config.vocabulary - 2,
        },
    }


def publish(config: ClipConfig, folder: Path) -> Path:
    """Write a model as the hub holds it: names and shapes of its tensors are those of transformers, values random."""
    from transformers import CLIPConfig, CLIPModel

    (folder / "config.json").write_text(json.dumps(hub_config(config)))
    train_tokenizer(config.vocabulary).save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        shapes = CLIPModel(CLIPConfig.from_pretrained(folder)).state_dict()
    # Each tensor is a stretch of one row of random numbers: drawing all of them anew takes longer than the comparison.
    step = 1013
    longest = max(like.numel() for like in shapes.values())
    numbers = torch.rand(longest + step * len(shapes), generator=torch.Generator().manual_seed(0)) * 2 - 1
    weights = {}
    for i, (name, like) in enumerate(shapes.items()):
        # Wide enough that no part of the network is lost in rounding: norms, biases and attention all matter.
        centre, spread = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, 0.05)
        spread = 0.2 if name.endswith("bias") else spread
        weights[name] = centre + spread * numbers[i * step : i * step + like.numel()].view(like.shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of its own for a test to damage."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def emptied(tmp_path: Path) -> Iterator[Path]:
    """pytest keeps the folders of its last runs; gigabytes of random weights are not worth keeping."""
    yield tmp_path
    for file in tmp_path.iterdir():
        file.unlink()


def pixels_of(config: ClipConfig, count: int) -> Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def hidden_states(config: ClipConfig, folder: Path, layers: int, images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and transformers' outputs of the same model, by name, in pairs."""
    from transformers import AutoTokenizer, CLIPModel

    ours = load_clip(folder, layers)
    assert ours.config == config
    theirs = CLIPModel.from_pretrained(folder, attn_implementation="eager").train(mode=False)
    pixels = pixels_of(config, images)
    ids, mask = ours.tokenize(TEXTS, truncate=False)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        image = theirs.vision_model(pixels, output_hidden_states=True)
        text = theirs.text_model(**tokens, output_hidden_states=True)
        image_layers, image_pooled = ours.image(pixels)
        text_layers, text_pooled = ours.text(ids, mask)
        return {
            "ids": (ids, tokens["input_ids"]),
            "mask": (mask, tokens["attention_mask"]),
            "image layers": (image_layers, torch.stack(image.hidden_states[-layers:], 1)),
            "image pooled": (image_pooled, theirs.visual_projection(image.pooler_output)),
            "text layers": (text_layers, torch.stack(text.hidden_states[-layers:], 1)),
            "text pooled": (text_pooled, theirs.text_projection(text.pooler_output)),
        }


def shallow(config: ClipConfig, layers: int) -> ClipConfig:
    image, text = (replace(tower, layers=layers) for tower in (config.image, config.text))
    return replace(config, image=image, text=text)


@pytest.mark.parametrize(
    ("config", "layers", "images"),
    [
        pytest.param(VIT_B32, 4, 3, id="B32"),
        pytest.param(replace(VIT_B16, eos_token_id=EOS_IS_LARGEST), 4, 2, id="B16"),
        pytest.param(VIT_L14, 12, 1, id="L14"),
        # In depth it is L14, and twice as slow.
        pytest.param(shallow(replace(VIT_L14_336, eos_token_id=EOS_IS_LARGEST), 6), 4, 1, id="L14-336"),
    ],
)
def test_towers_equal_transformers_at_full_size(config: ClipConfig, layers: int, images: int, emptied: Path) -> None:
    compared = hidden_states(config, publish(config, emptied), layers, images)
    assert compared["image layers"][0].shape == (images, layers, 1 + config.patches, config.image.width)
    assert compared["text pooled"][0].shape == (len(TEXTS), config.projection)
    for name, (given, expected) in compared.items():
        assert given.shape == expected.shape, name
        error = (given - expected).abs().max().item()
        print(f"{name}: {error:.1e} of {expected.float().abs().max().item():.1f}")  # shown by `pytest -rP`
        assert error <= 1e-4, name
        assert name in ("ids", "mask") or expected.std() > 0.3, f"{name}: too small for 1e-4 to mean anything"


def test_both_ways_to_find_the_end_of_a_text_pool_the_same(tiny: Path) -> None:
    ids, mask = load_clip(tiny, 2).tokenize(TEXTS, truncate=False)
    by_id = load_clip(tiny, 2).text(ids, mask)[1]
    edit_config(tiny, lambda config: config["text_config"].update(eos_token_id=EOS_IS_LARGEST))
    assert load_clip(tiny, 2).config.eos_token_id == EOS_IS_LARGEST
    assert torch.equal(load_clip(tiny, 2).text(ids, mask)[1], by_id)


def test_padding_and_company_do_not_change_a_text(tiny_folder: Path) -> None:
    clip = load_clip(tiny_folder, 2)
    layers, pooled = clip.text(*clip.tokenize(TEXTS, truncate=False))
    for i, text in enumerate(TEXTS):
        ids, mask = clip.tokenize([text], truncate=False)
        assert mask.all() and clip.tokenizer.id_to_token(int(ids[0, -1])) == END
        alone, alone_pooled = clip.text(ids, mask)
        torch.testing.assert_close(layers[i, :, : ids.shape[1]], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled[i], alone_pooled[0], rtol=0, atol=1e-5)


def test_a_text_that_does_not_fit_is_refused_unless_it_may_be_cut(tiny_folder: Path) -> None:
    clip = load_clip(tiny_folder, 2)
    fits, too_long = " ".join(["x"] * 75), " ".join(["x"] * 76)
    assert clip.tokenize([fits], truncate=False)[0].shape == (1, 77)
    with pytest.raises(ModelError, match=r"^text of 78 tokens, CLIP reads 77 at most: 'x x x"):
        clip.tokenize(["a dog", too_long], truncate=False)
    ids, mask = clip.tokenize(["a dog", too_long], truncate=True)
    assert torch.equal(ids[1:], clip.tokenize([fits], truncate=False)[0])
    assert mask.sum(1).tolist() == [4, 77]


def test_a_text_cannot_spell_the_end_of_itself(tiny_folder: Path) -> None:
    clip = load_clip(tiny_folder, 2)
    ids, mask = clip.tokenize([f"a dog {END} a ball {START}", "a dog"], truncate=False)
    assert (ids == TINY.eos_token_id).sum(1)[0] == 1 and ids[0, -1] == TINY.eos_token_id
    assert (ids == TINY.eos_token_id - 1).sum(1)[0] == 1
    pooled = clip.text(ids, mask)[1]
    assert (pooled[0] - pooled[1]).abs().max() > 1e-2


def test_the_towers_are_frozen(tiny_folder: Path) -> None:
    clip = load_clip(tiny_folder, 2)
    for tower in (clip.image, clip.text):
        assert not tower.training and not any(weight.requires_grad for weight in tower.parameters())


def test_random_towers_need_no_files() -> None:
    image, text = ClipImageTower(TINY, 3).eval(), ClipTextTower(TINY, 1).eval()
    ids = torch.tensor([[598, 4, 599], [598, 599, 599]])
    layers, pooled = image(pixels_of(TINY, 2))
    assert layers.shape == (2, 3, 1 + TINY.patches, 32) and pooled.shape == (2, 16)
    layers, pooled = text(ids, torch.ones_like(ids))
    assert layers.shape == (2, 1, 3, 24) and pooled.shape == (2, 16)
    for layers_wanted in (0, 4):
        with pytest.raises(ModelError, match="a tower of 3 blocks gives 1 to 3"):
            ClipImageTower(TINY, layers_wanted)
    with pytest.raises(ModelError, match="images of side 24"):
        image(torch.zeros(1, 3, 31, 31))


def test_the_exported_towers_agree_with_torch(tiny_folder: Path, tmp_path: Path) -> None:
    """By the build's own export; batches and lengths differ from those it was traced with."""
    clip, end = load_clip(tiny_folder, 2), TINY.eos_token_id

    def texts(*lengths: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, end - 1, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
        return ids.where(mask, end), mask.long()

    for tower, names, example, others in (
        (clip.image, ["pixels"], (pixels_of(TINY, 2),), [(pixels_of(TINY, n),) for n in (1, 3)]),
        (clip.text, ["ids", "mask"], texts(7, 5), [texts(2), texts(9, 77, 3)]),
    ):
        path = tmp_path / f"{names[0]}.onnx"
        axes = {name: {0: "batch", 1: "length"} if tower is clip.text else {0: "batch"} for name in names}
        model = export(tower, dict(zip(names, example, strict=True)), ["layers", "pooled"], axes)
        path.write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for given in (example, *others):
            inputs = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
            with torch.no_grad():
                expected = tower(*given)
            for ours, theirs in zip(session.run(None, inputs), expected, strict=True):
                assert theirs.abs().max() > 0.1
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    # Not over the file itself, which the tensors are read from as they are needed.
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"model_type": "clip", "text_config": {}, "vision_config": {"patch_size": 16}},
        {"projection_dim": 768, "text_config": None, "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6}},
        # As openai/clip-vit-large-patch14 has it: the twins win, and with them the default of what they leave out.
        {
            "projection_dim": 768,
            "text_config": {"hidden_size": 640, "num_attention_heads": 10, "eos_token_id": 2},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
            "vision_config": {"hidden_size": 640, "num_attention_heads": 10, "patch_size": 16},
            "vision_config_dict": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        },
        {"text_config": {"eos_token_id": 2}, "text_config_dict": None, "vision_config_dict": {}},
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(written: dict[str, Any], tmp_path: Path) -> None:
    from transformers import CLIPConfig

    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = CLIPConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "full.json").write_text(json.dumps(theirs))
    full = ClipConfig.from_file(tmp_path / "full.json")
    assert ClipConfig.from_file(tmp_path / "config.json") == full
    assert full.text.width == theirs["text_config"]["hidden_size"]
    assert full.eos_token_id == theirs["text_config"]["eos_token_id"]


def test_a_bare_config_is_that_of_b32(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ClipConfig.from_file(tmp_path / "config.json") == VIT_B32


def test_old_files_load_alike(tiny: Path) -> None:
    """Half precision, saved ranges, and weights from before safetensors."""
    reference = load_clip(tiny, 2)
    expected = reference.image(pixels_of(TINY, 1))[1]

    def age(weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            weights[key] = value.half()
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        weights["vision_model.embeddings.position_ids"] = torch.arange(10)[None]

    edit_weights(tiny, age)
    halves = load_clip(tiny, 2)
    given = halves.image(pixels_of(TINY, 1))[1]
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-2)

    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    assert torch.equal(load_clip(tiny, 2).image(pixels_of(TINY, 1))[1], given)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), r": config\.json is missing$"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), r": tokenizer\.json is missing$"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), r": model\.safetensors is missing$"),
    ("torn config", lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "not the config of a model of type 'clip'"),
    ("other model", lambda f: edit_config(f, lambda c: c.update(model_type="siglip")), "of type 'clip'"),
    ("text", lambda f: edit_config(f, lambda c: c.update(projection_dim="x")), "projection_dim is 'x'"),
    ("section", lambda f: edit_config(f, lambda c: c.update(text_config=[3])), "hidden_size is None"),
    ("no patch", lambda f: edit_config(f, lambda c: c["vision_config"].update(patch_size=0)), "patch_size is 0"),
    ("patches", lambda f: edit_config(f, lambda c: c["vision_config"].update(patch_size=7)), "24 is not a multiple"),
    ("heads", lambda f: edit_config(f, lambda c: c["text_config"].update(num_attention_heads=5)), "of 5 heads"),
    ("activation", lambda f: edit_config(f, lambda c: c["text_config"].update(hidden_act="relu")), "'relu' is not one"),
    ("torn tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
    (
        "vocabulary",
        lambda f: edit_config(f, lambda c: c["text_config"].update(vocab_size=599)),
        r"600 tokens, .* config\.json wants 599 at most",
    ),
    ("end", lambda f: edit_config(f, lambda c: c["text_config"].update(eos_token_id=7)), "wants .* the end 7$"),
    ("torn weights", lambda f: (f / "model.safetensors").write_bytes(b"PK" * 99), "damaged or not a file of weights"),
    (
        "torn old weights",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin: damaged or not a file of weights",
    ),
    (
        "shape",
        lambda f: edit_config(f, lambda c: c.update(projection_dim=17)),
        r"visual_projection\.weight is \[16, 32\], by config\.json it is \[17, 32\]$",
    ),
    (
        "missing tensor",
        lambda f: edit_weights(f, lambda w: w.pop("text_model.encoder.layers.1.mlp.fc2.bias")),
        r"tensor text_model\.encoder\.layers\.1\.mlp\.fc2\.bias is missing$",
    ),
    (
        "unknown tensor",
        lambda f: edit_config(f, lambda c: c["vision_config"].update(num_hidden_layers=2)),
        r"16 tensors that CLIP does not have, the first is vision_model\.encoder\.layers\.2\.",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_model_is_refused_in_one_line(damage: Callable[[Path], Any], message: str, tiny: Path) -> None:
    damage(tiny)
    with pytest.raises(ModelError, match=message) as caught:
        load_clip(tiny, 2)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_: object) -> str:
        raise OSError("Name or service not known\nand more that nobody reads")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        ModelError, match=r"does not give it \(Name or service not known\); give a local folder"
    ) as caught:
        load_clip("openai/clip-vit-base-patch32")
    assert str(caught.value).startswith("openai/clip-vit-base-patch32: no such folder")


def test_from_the_hub_come_only_the_files_that_are_read(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A stand-in for the hub, of a model that was published before safetensors."""
    cache = tmp_path_factory.mktemp("cache")
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    (tiny / "tf_model.h5").write_bytes(b"of no use")

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "someone/tiny-clip"
        for file in tiny.iterdir():
            if file.name in allow_patterns:
                (cache / file.name).write_bytes(file.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    clip: Clip = load_clip("someone/tiny-clip", 2)
    assert clip.config == TINY
    assert {file.name for file in cache.iterdir()} == {"config.json", "tokenizer.json", "pytorch_model.bin"}
