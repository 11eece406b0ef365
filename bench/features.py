"""`livemoments bench accuracy --features DIR --checkpoint FILE`: features of recordings through a trained model.

Every window goes through `R2.step`, one after the other and with the state of a live stream: what is scored is what a
viewer would have had at the time. Beside it stands what the backbone says by itself.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from bench.environment import environment
from kernels.errors import InputError
from models.checkpoint import load_checkpoint
from models.errors import ModelError
from models.r2 import R2
from stream.output import check_writable, write
from stream.predictions import to_jsonl
from trainer.annotated import load_annotated
from trainer.dataset import Dataset, Sample
from trainer.report import plot_samples, print_measures
from trainer.scoring import Calibration, calibrate, frame_aps, measures, query_maps, saliencies, zero_shot
from trainer.tvstream import load_tvstream


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False)
    if args.out:
        check_writable(args.out)
    try:
        model, provenance = load_checkpoint(args.checkpoint)
    except ModelError as error:
        raise InputError(str(error)) from None
    if not provenance.calibration:
        raise InputError(f"{args.checkpoint} was not trained to the end: its score has no calibration")
    dataset = _open(args, provenance.hop_s, model.config.depth)
    samples = dataset.samples[args.split]
    if not any(len(sample.windows) for sample in samples):
        raise InputError(f"{args.features}: no query of the split {args.split!r} comes true: nothing to score")
    _check_fits(model, dataset, samples[0], args.checkpoint)
    kept_out = frozenset(provenance.notes.get("unseen", ()))
    if not kept_out or dataset.unseen != kept_out:  # it was not trained on this folder
        trained = frozenset(provenance.notes.get("queries", ()))
        dataset = dataclasses.replace(dataset, unseen=frozenset(s.query for s in samples) - trained)
    calibration = Calibration(**provenance.calibration)
    if model.config.mode == "causal" and not args.whole:
        scores = streamed(model, dataset, samples, console)
    else:  # mode clip sees ahead: there is no live stream that it could stand for
        scores = list(saliencies(model, dataset, samples, provenance.notes["config"]["length"]))
    rows = {"trained": measures(dataset, samples, scores, calibration)}
    aps = {"trained": frame_aps(samples, scores)}
    if len(dataset.text(samples[0].query).embedding) > 1:
        bare = zero_shot(dataset, samples)
        # The best threshold in hindsight: zero-shot has no calibration of its own.
        rows["zero-shot"] = measures(dataset, samples, bare, calibrate(samples, bare))
        aps["zero-shot"] = frame_aps(samples, bare)
    if args.out:
        lines = [
            {"vid": sample.vid, "query": sample.query}
            | {name: None if math.isnan(v[i]) else v[i] for name, v in aps.items()}
            for i, sample in enumerate(samples)
        ]
        write(args.out, to_jsonl(lines))
    print_measures(Console(highlight=False), rows, args.split)
    if args.plot:
        plot_samples(dataset.hop_s, samples, [calibration(each) for each in scores], args.plot / f"{args.split}.png")
    print(json.dumps(rows | {"checkpoint": str(args.checkpoint), "split": args.split} | environment(), allow_nan=False))
    return 0


def _open(args: argparse.Namespace, hop_s: float, depth: int) -> Dataset:
    if (args.features / "index.json").is_file():
        if args.streams:
            raise InputError(f"{args.features} holds its own truth: leave out --streams")
        return load_tvstream(args.features, hop_s, (args.split,))
    if not args.streams:
        raise InputError(f"{args.features} holds no truth (no index.json): give --streams FILE.jsonl")
    found = load_annotated({args.split: args.streams}, [args.features], hop_s=hop_s)
    return found.last_layers(depth)


@torch.inference_mode()
def streamed(model: R2, dataset: Dataset, samples: Sequence[Sample], console: Console) -> list[NDArray[np.float64]]:
    """Saliency (T,) of each sample, window by window."""
    found: list[NDArray[np.float64]] = []
    windows = sum(len(next(iter(group)).inside) for _, group in groupby(samples, key=lambda sample: sample.vid))
    with Progress(console=console) as progress:
        bar = progress.add_task("windows", total=windows)
        for vid, group in groupby(samples, key=lambda sample: sample.vid):
            mine, video = list(group), dataset.video(vid)
            query = query_maps(model, [dataset.text(sample.query) for sample in mine])
            state, column = model.new_state(len(mine)), []
            for layers, embedding in zip(video.layers, video.embedding, strict=True):
                seen = (torch.from_numpy(np.asarray(each, np.float32))[None] for each in (layers, embedding))
                outputs, new = model.step(model.video_maps(*seen), None, query, state)
                state.append(new)
                column.append(outputs.saliency)
                progress.advance(bar)
            found += list(torch.stack(column, 1).double().numpy())
    return found


def _check_fits(model: R2, dataset: Dataset, sample: Sample, checkpoint: Path) -> None:
    video, text, config = dataset.video(sample.vid), dataset.text(sample.query), model.config
    given = video.layers.shape[1], video.layers.shape[3], text.layers.shape[2], video.embedding.shape[1]
    wanted = config.depth, config.video_width, config.text_width, config.embedding or given[3]
    if given != wanted:
        raise InputError(
            f"{checkpoint} reads features of {wanted} layers, image, text and embedding width; these are {given}"
        )
