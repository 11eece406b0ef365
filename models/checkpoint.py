"""One file with weights, config and provenance, from which the model is rebuilt: safetensors, nothing executable."""

import dataclasses
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import ModelError
from models.published import load_weights
from models.r2 import R2
from models.r2_types import R2Config

FORMAT = 1
"""Raised when an older program would misread the file."""
_KEY = "livemoments"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from and what they fit."""

    source: str
    """How they were made: a file that was imported, a training command."""
    backbone: str
    """What the features must come from, as `models.backbone.load_backbone` takes it."""
    hop_s: float
    """Seconds between windows; a trained head serves no other hop."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, as JSON: data, losses, scores."""
    calibration: dict[str, float] = field(default_factory=dict)
    """`centre` and `slope`, once fitted: score = sigmoid(slope (saliency - centre)). No bundle is built without."""


def save_checkpoint(path: Path, model: R2, provenance: Provenance) -> None:
    """Write the file, whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    head = {
        "format": FORMAT,
        "version": _version(),
        "config": asdict(model.config),
        "provenance": asdict(provenance),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        if not path.parent.is_dir():
            raise ModelError(f"{path} cannot be written: there is no folder {path.parent}")
        scratch = path.parent / f".{path.name}.{os.getpid()}"
        try:
            save_file(weights, scratch, metadata={_KEY: json.dumps(head)})
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be written: {error}") from error


def load_checkpoint(path: Path, *, mode: str | None = None) -> tuple[R2, Provenance]:
    """Rebuild the model, in evaluation mode.

    mode: refuse any other; None takes both.

    Raises:
        ModelError: the file is missing, damaged, no checkpoint of ours, of a newer format, of another mode, or its
            tensors are not those of its config.
    """
    try:
        with safe_open(path, "pt") as file:
            head = (file.metadata() or {}).get(_KEY)
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a checkpoint: {error}") from error
    if head is None:
        raise ModelError(
            f"{path} is no checkpoint of livemoments: published weights come in by `livemoments import-weights`"
        )
    try:
        content = json.loads(head)
        if (found := content["format"]) != FORMAT:
            wrote = content.get("version", "unknown")
            raise ModelError(f"{path} has format {found} (livemoments {wrote}), this program reads {FORMAT}: update it")
        config, provenance = dict(content["config"]), Provenance(**content["provenance"])
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: its head is damaged ({error})") from error
    known = {field.name for field in dataclasses.fields(R2Config)}
    if config.keys() != known:
        odd = sorted(known ^ set(config))
        raise ModelError(f"{path}: its config does not fit this version of livemoments ({', '.join(odd)})")
    if mode is not None and config["mode"] != mode:
        raise ModelError(
            f'{path} is of mode "{config["mode"]}", this needs "{mode}"'
            + (": a clip model sees whole recordings; train a causal one from it" if mode == "causal" else "")
        )
    try:
        model = R2(R2Config(**(config | {"strides": tuple(config["strides"])})))
    except (TypeError, RuntimeError, ModelError) as error:  # RuntimeError: sizes that no memory holds
        raise ModelError(f"{path}: its config is damaged ({error})") from error
    load_weights(model, weights, str(path))
    return model.eval(), provenance


def _version() -> str:
    try:
        return version("livemoments")
    except PackageNotFoundError:
        return "unknown"
