"""The published R2-Tuning weights (github.com/yeliudev/R2-Tuning, `r2_tuning_*.pth`) as a model of ours."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelError
from models.r2 import R2
from models.r2_types import R2Config

_RENAMED = (
    (r"adapter\.video_map\.(\d)\.", r"map_video.\1."),
    (r"adapter\.query_map\.(\d)\.", r"map_query.\1."),
    (r"adapter\.v_map\.", "project_video."),
    (r"adapter\.q_map\.", "project_query."),
    (r"adapter\.scale$", "pooling"),
    (r"adapter\.gate$", "gate"),
    (r"adapter\.tem\.cross_att_norm\.", "layer.norm_cross."),
    (r"adapter\.tem\.self_att_norm\.", "layer.norm_time."),
    (r"adapter\.tem\.ffn_norm\.", "layer.norm_feed_forward."),
    (r"adapter\.tem\.ffn\.mapping\.0\.", "layer.expand."),
    (r"adapter\.tem\.ffn\.mapping\.2\.", "layer.contract."),
    (r"pooling\.att\.weight$", "word_weight.weight"),
    (r"class_head\.module\.1\.", "heads.classify.hidden."),
    (r"class_head\.module\.3\.", "heads.classify.out."),
    (r"coord_head\.module\.1\.", "heads.locate.hidden."),
    (r"coord_head\.module\.3\.", "heads.locate.out."),
    (r"coef$", "heads.scales"),
)
_ATTENTION = re.compile(r"adapter\.tem\.(cross|self)_att\.([qkvm])\.")
_ATTENTION_PARTS = {"q": "query", "k": "key", "v": "value", "m": "out"}
_PYRAMID = re.compile(r"pyramid\.blocks\.(\d)\.(\d+)\.(weight|bias)$")
_HEADS = 8  # the published models; a state dict does not tell


def load_published(path: Path) -> R2:
    """Read a published checkpoint.

    Raises:
        ModelError: the file cannot be read, or its tensors are not those of an R2-Tuning model.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} is no plain checkpoint of tensors (code in a checkpoint is never run)") from error
    except Exception as error:  # of the system, of zip: they share no base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelError(f"{path} holds no state dict: give it an r2_tuning_*.pth as published")
    return from_published(weights, str(path))


def from_published(weights: Mapping[str, Tensor], name: str) -> R2:
    """The model of a published state dict, with or without a `module.` prefix.

    Raises:
        ModelError: tensors are missing, unknown or of the wrong shape; the text begins with `name`.
    """
    plain = {str(key).removeprefix("module."): value for key, value in weights.items()}
    if "adapter.scale" in plain and not any(key.startswith("coord_head.") for key in plain):
        raise ModelError(f"{name} is a highlight model (TVSum, YouTube Highlights), without boundaries: not supported")
    renamed = {_renamed(key): value for key, value in plain.items() if not key.startswith("loss.")}
    # Only convolutions have three axes, (outputs, inputs, taps); ours lie as (outputs, taps, inputs).
    renamed = {key: value.transpose(1, 2) if value.ndim == 3 else value for key, value in renamed.items()}
    try:
        config = _config(renamed)
    except KeyError as error:
        raise ModelError(f"{name} is not of an R2-Tuning model: it has no {error.args[0]!r}") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:  # too few axes, or a size that no model has
        raise ModelError(f"{name} is not of an R2-Tuning model: {error}") from None
    model = R2(config)
    load_weights(model, renamed, name)
    return model.eval()


def load_weights(model: R2, weights: Mapping[str, Tensor], name: str) -> None:
    """Put weights into a model, all of them or none.

    Raises:
        ModelError: tensors are missing, unknown or of the wrong shape; the text begins with `name`.
    """
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise ModelError(f"{name} lacks {len(missing)} tensors, {missing[0]} for one")
    if unknown := sorted(weights.keys() - own.keys()):
        raise ModelError(f"{name} has {len(unknown)} tensors that this model has not, {unknown[0]} for one")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ModelError(f"{name}: {key} is {tuple(value.shape)}, this model has {tuple(own[key].shape)}")
    model.load_state_dict(dict(weights))


def _config(weights: Mapping[str, Tensor]) -> R2Config:
    levels = len(weights["heads.scales"])
    width, text_width = weights["map_query.2.weight"].shape
    return R2Config(
        mode="clip",
        video_width=weights["map_video.0.weight"].shape[0] - 2,
        text_width=text_width,
        depth=len(weights["pooling"]),
        width=width,
        heads=_HEADS,
        ratio=weights["layer.expand.weight"].shape[0] // width,
        strides=tuple(2 ** _depth(weights, level) for level in range(levels)),
    )


def _depth(weights: Mapping[str, Any], level: int) -> int:
    return sum(key.startswith(f"heads.levels.{level}.convs.") and key.endswith(".weight") for key in weights)


def _renamed(key: str) -> str:
    if match := _ATTENTION.match(key):
        kind = "cross" if match[1] == "cross" else "time"
        return f"layer.{kind}.{_ATTENTION_PARTS[match[2]]}.{key[match.end() :]}"
    if match := _PYRAMID.match(key):
        # A block is a row of (turn, convolution, turn, norm, ReLU); tensors stand at 1 and 3 of each five.
        place, turn = divmod(int(match[2]), 5)
        return f"heads.levels.{match[1]}.{'convs' if turn == 1 else 'norms'}.{place}.{match[3]}"
    for pattern, ours in _RENAMED:
        renamed, found = re.subn("^" + pattern, ours, key)
        if found:
            return renamed
    return key  # unknown: refused by name when the weights are loaded


def to_causal(model: R2, *, window: int = 32, embedding: int = 0) -> R2:
    """A causal model that begins with a published one's weights; it has to be trained before it is of use.

    The two end points go, and with them two inputs of the first map; all else keeps its place.
    """
    causal = R2(replace(model.config, mode="causal", window=window, embedding=embedding))
    weights = model.state_dict()
    for name in ("map_video.0.weight", "map_video.0.bias", "map_video.2.weight"):
        weights[name] = weights[name][..., : model.config.video_width]
    load_weights(causal, causal.state_dict() | weights, "the published model")
    return causal
