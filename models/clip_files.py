"""The files of a CLIP on disk or on the hub: where they are, and what in them cannot be right.

All that is wrong is a ModelError that names the file.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.errors import ModelError

# In this order of preference. OpenAI's first models were published before safetensors, and not all have gained one.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find(source: str | Path) -> Path:
    """A folder, or what the hub has under that name, in its local cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        for weights in WEIGHTS:
            folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "tokenizer.json", weights]))
            if (folder / weights).exists():
                break
    except Exception as error:  # not installed, the hub's own, those of its HTTP client, those of the system
        raise ModelError(
            f"{source}: no such folder, and the Hugging Face hub does not give it ({_reason(error)}); give a local "
            "folder with config.json, tokenizer.json and model.safetensors"
        ) from error
    return folder


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def file_of(folder: Path, *names: str) -> Path:
    """The first of the names that the folder has."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ModelError(f"{folder}: {names[0]} is missing")


def read_tokenizer(path: Path, vocabulary: int, end: int | None) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens that closes a text with `end`, or with its last token if None."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{path}: cannot be read as a tokenizer ({_reason(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Otherwise a text that spells out the end token would be pooled there, and the rest of it go unread.
    tokenizer.encode_special_tokens = True
    size, empty = tokenizer.get_vocab_size(), tokenizer.encode("").ids
    end = size - 1 if end is None else end
    if size > vocabulary or len(empty) != 2 or empty[-1] != end:
        raise ModelError(
            f"{path}: {size} tokens, a text is put in {empty}; config.json wants {vocabulary} at most, and a "
            f"start and the end {end}"
        )
    return tokenizer


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ModelError(f"{path}: damaged or not a file of weights ({_reason(error)})") from error


def fill(tower: nn.Module, prefix: str, weights: dict[str, Tensor], path: Path) -> None:
    """Move a tower's weights out of `weights`, as float32."""
    found = {}
    for name, own in tower.state_dict().items():
        key = name if "_projection." in name else f"{prefix}.{name}"  # projections stand beside the towers
        tensor = weights.pop(key, None)
        if tensor is None:
            raise ModelError(f"{path}: tensor {key} is missing")
        if tensor.shape != own.shape:
            raise ModelError(f"{path}: {key} is {list(tensor.shape)}, by config.json it is {list(own.shape)}")
        found[name] = tensor.float()
    tower.load_state_dict(found, assign=True)
