"""What an interrupted run goes on from, and what it must not be mixed up with."""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.errors import InputError
from trainer.config import TrainConfig


@dataclass
class Progress:
    """How far a run came."""

    done: int
    """Epochs, those before the training proper included."""
    best: float
    """Frame AP on val of the best of them."""
    history: list[dict[str, float]]


def inputs(config: TrainConfig, args: argparse.Namespace, world: int) -> dict[str, Any]:
    """All that the outcome of a run depends on, by the option that sets it."""
    files = {name: getattr(args, name) for name in ("train", "val", "text", "init", "teacher")}
    named = {name: str(path.resolve()) if path else None for name, path in files.items()}
    features = [str(folder.resolve()) for folder in args.features]
    return dataclasses.asdict(config) | named | {"features": features, "processes": world}


def save(
    path: Path, made_with: dict[str, Any], trainee: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Whole or not at all."""
    state = {
        "inputs": made_with,
        "trainee": trainee.state_dict(),
        "optimiser": optimiser.state_dict(),
        **dataclasses.asdict(progress),
    }
    scratch = path.with_suffix(f".{os.getpid()}.part")
    torch.save(state, scratch)
    scratch.replace(path)


def load(path: Path, made_with: dict[str, Any], trainee: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Put back what `save` wrote.

    Raises:
        InputError: the file is damaged, or of a run with other inputs.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = state["inputs"]
    except Exception as error:  # a torn file raises anything from EOFError to UnpicklingError
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if odd := [name.replace("_", "-") for name, value in made_with.items() if known.get(name) != value]:
        raise InputError(f"{path} was made with other options ({', '.join(odd)}): resume with the same")
    trainee.load_state_dict(state["trainee"])
    optimiser.load_state_dict(state["optimiser"])
    return Progress(state["done"], state["best"], state["history"])
