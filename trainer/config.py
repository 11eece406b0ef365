"""What a training run is made of. It travels with the checkpoint, so that any of them can be run again."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from kernels.errors import InputError
from trainer.losses import LossWeights


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are those of the README's causal model on tvstream."""

    mode: Literal["causal", "clip"] = "causal"
    window: int = 32
    """W of a causal model."""
    depth: int = 0
    """K; 0: all layers that the features have."""
    width: int = 256
    dropout: float = 0.5
    epochs: int = 10
    crops: int = 32
    """Pieces of video a step."""
    queries: int = 1
    """Of each crop at most: what the backbone says of it is then mapped once."""
    length: int = 128
    """Windows of a crop. At K (W - 1) + 1 and fewer, the far end of the memory is never trained."""
    piece: int = 0
    """Windows in the mean of the pieces that a crop is spliced out of; 0: a crop is a stretch of one recording."""
    align: int = 0
    """Steps, before all else, of contrasting single windows with texts in large batches; causal models only."""
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 50
    """Steps until the learning rate is reached; it then falls to 0 along a cosine."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    zero_shot: float = 10.0
    """Scale of the backbone's own similarity in the score, at the start of a causal model."""
    learn_zero_shot: bool = False
    query_noise: float = 0.0
    """Length of the Gaussian noise that is added to a text's vectors, relative to their own length."""
    weights: LossWeights = field(default_factory=LossWeights)
    refine: Literal["no", "before", "joint"] = "no"
    """MLRL: not at all, before the training (Rep/MR), or in it (Rep+MR)."""
    refine_epochs: int = 3
    refine_weight: float = 1.0
    inputs: Literal["clip+query", "clip", "query"] = "clip+query"
    """What MLRL hides and predicts."""
    distil: float = 0.0
    """Weight of what a teacher says."""
    seed: int = 0
    amp: bool = False
    """Multiply in bfloat16 where that is safe."""

    def __post_init__(self) -> None:
        for name in ("epochs", "crops", "queries", "length", "width", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        losses = {f"weight_{name}": value for name, value in dataclasses.asdict(self.weights).items()}
        for name, value in {**losses, "zero_shot": self.zero_shot, "seed": self.seed}.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {value:g}")
        if self.align and self.mode == "clip":
            raise InputError("--align is for causal models: those of mode clip read where in its clip a window lies")
        if self.piece == 1:
            raise InputError("--piece must be 0, or at least 2 windows")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name):g}")
        for name in (
            "depth",
            "piece",
            "align",
            "weight_decay",
            "warmup",
            "query_noise",
            "refine_epochs",
            "refine_weight",
            "distil",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name):g}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field, with its default; the losses' weights as --weight-focal and so on."""
    for each in dataclasses.fields(TrainConfig):
        if each.name == "weights":
            for loss in dataclasses.fields(LossWeights):
                _flag(parser, f"weight-{loss.name}", float, loss.default, f"weight of the loss {loss.name!r}")
        else:
            _flag(parser, each.name, each.type, each.default, HELP.get(each.name, each.name.replace("_", " ")))


HELP = {
    "mode": "causal streams; clip is the published model, for recordings",
    "window": "windows that a causal model sees; 1 leaves the memory out",
    "depth": "layers of the backbone that are read (0: all that the features have)",
    "crops": "pieces of video a step",
    "queries": "queries of a crop, at most",
    "length": "windows of a crop",
    "align": "steps of contrasting single windows with texts, before all else (0: none)",
    "piece": "splice crops out of pieces of so many windows, of many recordings (0: crops are of one)",
    "warmup": "steps until the learning rate is reached",
    "clip_norm": "largest norm of the gradient",
    "zero_shot": "scale of the backbone's own similarity in the score",
    "learn_zero_shot": "train that scale too",
    "query_noise": "noise on the text's vectors, relative to their length",
    "refine": "MLRL: refine the features before the training, or jointly",
    "refine_epochs": "epochs of --refine before",
    "refine_weight": "weight of --refine joint",
    "inputs": "what MLRL hides and predicts",
    "distil": "weight of what --teacher says",
    "amp": "bfloat16 where that is safe",
}


def _flag(parser: argparse.ArgumentParser, name: str, kind: Any, default: Any, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text)
    elif kind in (int, float):
        metavar = "N" if kind is int else "X"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} (default {default:g})")
    else:
        parser.add_argument(flag, choices=kind.__args__, default=default, help=f"{text} (default {default})")


def from_arguments(args: argparse.Namespace) -> TrainConfig:
    """Raises InputError when a number is out of range."""
    losses = [each.name for each in dataclasses.fields(LossWeights)]
    weights = LossWeights(**{name: getattr(args, f"weight_{name}") for name in losses})
    names = [each.name for each in dataclasses.fields(TrainConfig) if each.name != "weights"]
    return TrainConfig(weights=weights, **{name: getattr(args, name) for name in names})
