"""`livemoments train`: features and truth into a checkpoint.

    livemoments train --features DIR --out RUN                                      of the tvstream form
    livemoments train --features DIR --train a.jsonl --val b.jsonl --out RUN        QVHighlights style
    torchrun --nproc-per-node 2 -m livemoments train ...                            on several processes

RUN gets best.safetensors (the epoch with the best frame AP on val), last.safetensors, state.pt (to resume from),
report.json, report.png and log/ (TensorBoard). A run that was interrupted goes on with --resume and ends as if it had
not been.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from kernels.errors import InputError
from models.checkpoint import Provenance, load_checkpoint, save_checkpoint
from models.errors import ModelError
from models.mlrl import Mlrl, MlrlConfig, check_collapse
from models.r2 import R2
from models.r2_types import R2Config
from stream.output import check_folder
from trainer import run_state
from trainer.batches import Batch, Cutter, groups
from trainer.config import TrainConfig, add_options, from_arguments
from trainer.dataset import Dataset
from trainer.open_dataset import add_dataset_options, open_dataset
from trainer.remix import Remixer
from trainer.report import write_report
from trainer.scoring import Calibration, balanced_ap, calibrate, saliencies, weigh_zero_shot
from trainer.trainee import Phase, Trainee

PAIRS = 256
"""Of window and text, in a step of the alignment: all others of a step are what a pair is told from."""
SPREAD_STEPS = 20
"""Over so many steps the spread of the teacher is averaged before it is judged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    assert __doc__ is not None
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = __doc__.partition("\n\n")[2]
    add_dataset_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run, made if need be")
    parser.add_argument("--init", type=Path, metavar="FILE", help="begin with the weights of a checkpoint")
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="checkpoint of mode clip to distil from (--distil)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME")
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    config = from_arguments(args)
    try:
        return train(config, args)
    except ModelError as error:
        raise InputError(str(error)) from None


def train(config: TrainConfig, args: argparse.Namespace) -> int:
    # ---------------------------------------------------------------------------------------------- data and processes
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = _device(args.device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    console = Console(stderr=True, highlight=False, quiet=rank > 0)
    out: Path = args.out
    state_path = out / "state.pt"
    if state_path.exists() != args.resume:
        raise InputError(
            f"{out} holds a run: go on with --resume, or choose another --out"
            if not args.resume
            else f"{out} holds no run to resume"
        )
    check_folder(out)
    dataset = open_dataset(args)
    samples, val = dataset.samples["train"], dataset.samples["val"]
    truths = [truth for sample in val for truth in sample.scored()[1].tolist()]
    if not samples or not 0 < sum(truths) < len(truths):
        raise InputError("nothing to train on: train and val need queries that come true, and not all the time")
    if config.depth:
        dataset = dataset.last_layers(config.depth)

    # ---------------------------------------------------------------------------------------------- model and optimiser
    torch.manual_seed(config.seed)
    model = build(config, dataset, args.init).to(device)
    teacher = load_checkpoint(args.teacher, mode="clip")[0].to(device).requires_grad_(False) if args.teacher else None
    if (teacher is not None) != (config.distil > 0):
        raise InputError("--teacher and --distil belong together")
    mlrl = Mlrl(model, MlrlConfig(inputs=config.inputs)).to(device) if config.refine != "no" else None
    reads = [(c.video_width, c.text_width, c.depth) for c in (model.config, (teacher or model).config)]
    if reads[0] != reads[1]:
        raise InputError(
            f"{args.teacher} reads other features (widths and layers {reads[1]}) than the student ({reads[0]})"
        )
    trainee = Trainee(model, config, mlrl, teacher)
    trained = [weight for weight in trainee.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    # Some weights have no gradient: of W_v's bias never, of the heads while MLRL refines.
    stepped: nn.Module = DistributedDataParallel(trainee, find_unused_parameters=True) if world > 1 else trainee
    refining = config.refine_epochs if config.refine == "before" else 0
    crops = len(groups(samples, config.queries, np.random.default_rng(0), mixed=config.piece > 0))
    steps = math.ceil(crops / (config.crops * world))
    # What each epoch does, and in how many steps.
    counts: list[tuple[Phase, int, int]] = [
        ("align", min(config.align, 1), config.align),
        ("refine", refining, steps),
        ("train", config.epochs, steps),
    ]
    plan = [(phase, long) for phase, times, long in counts for _ in range(times)]

    # ---------------------------------------------------------------------------------------------- where it stands
    made_with, so_far = run_state.inputs(config, args, world), run_state.Progress(0, -math.inf, [])
    if args.resume:
        so_far = run_state.load(state_path, made_with, trainee, optimiser)
    writer = SummaryWriter(str(out / "log"), purge_step=so_far.done + 1) if rank == 0 else None

    # ---------------------------------------------------------------------------------------------- epochs
    with _progress(console) as progress:
        every = [number for _, number in plan]
        bar = progress.add_task("training", total=sum(every), completed=sum(every[: so_far.done]), note="")
        for number, (phase, _) in list(enumerate(plan))[so_far.done :]:
            mine = [place for place, (name, _) in enumerate(plan) if name == phase]
            if number == mine[0]:
                optimiser.state.clear()  # the moments of another loss
            # The seeds of an epoch depend on nothing that went before, so that a resumed run draws the same.
            rng = np.random.default_rng((config.seed, number))
            torch.manual_seed(config.seed + 1000 * (number + 1) + rank)
            generator = torch.Generator(device).manual_seed(config.seed + 1000 * (number + 1) + rank)
            losses: dict[str, list[float]] = defaultdict(list)
            trainee.train()
            draw = _pairs if phase == "align" else _crops
            for place, batch in enumerate(draw(dataset, config, rng, rank, world)):
                at, total = sum(every[mine[0] : number]) + place, sum(every[epoch] for epoch in mine)
                rate = learning_rate(config, at, total)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                amp = torch.autocast(device.type, torch.bfloat16) if config.amp else nullcontext()
                with amp:
                    found = stepped(batch.to(device), generator, phase)
                if not torch.isfinite(found["total"]):
                    raise InputError(f"the loss is {found['total'].item()} in epoch {number + 1}: lower --lr")
                optimiser.zero_grad()
                found["total"].backward()
                nn.utils.clip_grad_norm_(trained, config.clip_norm)
                optimiser.step()
                if mlrl is not None and "mlrl" in found:
                    mlrl.update(model, at / total)
                for name, value in found.items():
                    losses[name].append(value.item())
                if losses["spread"] and place % SPREAD_STEPS == SPREAD_STEPS - 1:
                    check_collapse(float(np.mean(losses["spread"][-SPREAD_STEPS:])))
                progress.update(bar, advance=1, note=f"loss {np.mean(losses['total'][-20:]):.3f}")
            row = {name: float(np.mean(values)) for name, values in losses.items() if values}
            if "spread" in row:
                check_collapse(row["spread"])
            if not all(weight.isfinite().all() for weight in trained):
                raise InputError(f"the weights are no numbers after epoch {number + 1}: lower --lr")
            if phase == "train":
                row["val_ap"] = balanced_ap(dataset, val, _scores(model, dataset, config))
            so_far.done = number + 1
            so_far.history.append({"epoch": number + 1, **row})
            if writer:
                for name, value in row.items():
                    writer.add_scalar(f"{phase}/{name}", value, number + 1)
                writer.flush()
                provenance = _provenance(config, dataset, so_far.history)
                if phase == "train" and row["val_ap"] > so_far.best:
                    so_far.best = row["val_ap"]
                    save_checkpoint(out / "best.safetensors", model, provenance)
                save_checkpoint(out / "last.safetensors", model, provenance)
                run_state.save(state_path, made_with, trainee, optimiser, so_far)
            told = " ".join(f"{name} {value:.3f}" for name, value in row.items())
            progress.console.print(f"epoch {number + 1}/{len(plan)}, {phase}: {told}", soft_wrap=True)

    # ---------------------------------------------------------------------------------------------- what came of it
    if writer:
        writer.close()
        model, provenance = load_checkpoint(out / "best.safetensors")
        if not provenance.calibration:  # otherwise the run had come this far before
            scores = _scores(model, dataset, config)
            if model.config.embedding:
                scores = weigh_zero_shot(model, dataset, val, scores)
            provenance = dataclasses.replace(provenance, calibration=dataclasses.asdict(calibrate(val, scores)))
            save_checkpoint(out / "best.safetensors", model, provenance)
        calibration = Calibration(**provenance.calibration)
        result = write_report(model, dataset, calibration, config.length, out, Console(highlight=False))
        print(json.dumps(result | {"run": str(out), "epochs": len(plan)}, allow_nan=False))
    if world > 1:
        torch.distributed.destroy_process_group()
    return 0


def build(config: TrainConfig, dataset: Dataset, init: Path | None) -> R2:
    """A new model that fits the data, or the one of a checkpoint."""
    sample = dataset.samples["train"][0]
    video, text = dataset.video(sample.vid), dataset.text(sample.query)
    depth, width = video.layers.shape[1], video.layers.shape[3]
    shape = R2Config(
        config.mode,
        width,
        text.layers.shape[2],
        embedding=video.embedding.shape[1] if config.mode == "causal" else 0,
        floor=dataset.floor,
        depth=depth,
        width=config.width,
        window=config.window,
        dropout=config.dropout,
    )
    model = R2(shape)
    if shape.mode == "causal" and shape.embedding:
        nn.init.constant_(model.zero_shot, config.zero_shot)
        model.zero_shot.requires_grad_(config.learn_zero_shot)
    if config.align:  # what the alignment learns of a window then passes through the temporal layer as it is
        for part in (model.layer.cross.out, model.layer.time.out, model.layer.contract):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    if init is not None:
        given, _ = load_checkpoint(init, mode=config.mode)
        if (found := dataclasses.replace(given.config, dropout=shape.dropout)) != shape:
            raise InputError(f"{init} does not fit: it is {found}, the data and options ask for {shape}")
        model.load_state_dict(given.state_dict())
    return model


def _scores(model: R2, dataset: Dataset, config: TrainConfig) -> list[NDArray[np.float64]]:
    """Of the val split."""
    scores = list(saliencies(model, dataset, dataset.samples["val"], config.length))
    if not all(np.isfinite(saliency).all() for saliency in scores):
        raise InputError("the model's scores are no numbers any more: lower --lr")
    return scores


def _device(name: str) -> torch.device:
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or has never heard of it
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def _crops(dataset: Dataset, config: TrainConfig, rng: np.random.Generator, rank: int, world: int) -> Iterator[Batch]:
    """This process's share of an epoch: all draw the same order, and each takes every `world`-th crop of a step."""
    samples = dataset.samples["train"]
    found = groups(samples, config.queries, rng, mixed=config.piece > 0)
    cutter = Cutter(dataset, config.length, Remixer(samples) if config.piece else None, config.piece)
    step = config.crops * world
    for at in range(0, len(found), step):
        mine = found[at : at + step][rank::world] or found[:1]
        yield cutter.collate(mine, rng)


def _pairs(dataset: Dataset, config: TrainConfig, rng: np.random.Generator, rank: int, world: int) -> Iterator[Batch]:
    """Single windows, CLS alone, each with a text that is true of it; as many steps as the config says."""
    samples = [sample for sample in dataset.samples["train"] if (sample.inside & sample.counted).any()]
    cutter = Cutter(dataset.first_tokens(), 1)
    for _ in range(config.align):
        drawn = rng.choice(len(samples), min(PAIRS * world, len(samples)), replace=False)[rank::world]
        yield cutter.collate([[samples[place]] for place in drawn.tolist()], rng)


def _provenance(config: TrainConfig, dataset: Dataset, history: list[dict[str, float]]) -> Provenance:
    notes = {
        "config": dataclasses.asdict(config),
        "history": history,
        "queries": sorted({sample.query for sample in dataset.samples["train"]}),
        "unseen": sorted(dataset.unseen),
    }
    return Provenance("livemoments " + " ".join(sys.argv[1:]), dataset.backbone, dataset.hop_s, notes)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
