"""`python -m bench.distractors --features DIR`: how the zero-shot scores of a CLIP are made comparable.

On recorded CLIP features with truth (a folder of the tvstream form, trainer/tvstream.py), three scores of a window for
a text: the bare cosine, the same above the text's own level among all texts, in its spreads, as lite does it, and how
much likelier the text is than distractors, texts of other classes (kernels/saliency.py). Of each the frame AP, mean
over (video, class), and the best F1 that one threshold gives all queries: what kernels/recipe.py takes for a CLIP.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from kernels.errors import InputError
from kernels.saliency import background
from trainer.metrics import average_precision
from trainer.tvstream import load_tvstream

TEMPERATURES = (0.01, 0.02, 0.04)

Floats = NDArray[np.float32]
Score = Callable[[Floats, int], Floats]
"""Windows (n, D) of unit norm and the place of a text -> (n,)."""


def ways(texts: Floats) -> dict[str, Score]:
    """Ways to score; distractors of a text are those on the other parity of places, so it is never its own."""
    likeness = texts @ texts.T
    np.fill_diagonal(likeness, np.nan)
    level, spread = np.nanmean(likeness, 1), np.nanstd(likeness, 1)
    found: dict[str, Score] = {
        "cosine": lambda v, place: v @ texts[place],
        "above the text's level": lambda v, place: (v @ texts[place] - level[place]) / spread[place],
    }
    for temperature in TEMPERATURES:

        def likelier(v: Floats, place: int, t: float = temperature) -> Floats:
            odds: Floats = v @ texts[place] / t - background(v, texts[1 - place % 2 :: 2], t)
            return odds

        found[f"likelier than distractors, temperature {temperature}"] = likelier
    return found


def best_f1(scores: Floats, truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Of all thresholds, and that threshold."""
    order = np.argsort(-scores)
    right = np.cumsum(truth[order])
    f1 = 2 * right / (np.arange(1, len(right) + 1) + truth.sum())
    return float(f1.max()), float(scores[order][f1.argmax()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.distractors", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--features", type=Path, required=True, metavar="DIR", help="a folder of the tvstream form")
    parser.add_argument("--split", default="val", help="whose videos (default val)")
    args = parser.parse_args()
    try:
        data = load_tvstream(args.features, 1.0, (args.split,))
        if not (samples := data.samples[args.split]):
            raise InputError(f"{args.features}: the split {args.split!r} asks nothing")
    except InputError as error:
        print(f"bench.distractors: {error}", file=sys.stderr)
        return 2
    queries = sorted({sample.query for sample in samples})
    texts = np.stack([data.text(query).embedding[:-1] for query in queries]).astype(np.float32)
    result = {}
    for name, score in ways(texts).items():
        found, truth = [], []
        for sample in samples:
            windows, labels = sample.scored()
            v = data.video(sample.vid).embedding[windows].astype(np.float32)
            v /= np.linalg.norm(v, axis=1, keepdims=True).clip(1e-12)
            found.append(score(v, queries.index(sample.query)))
            truth.append(labels)
        f1, threshold = best_f1(np.concatenate(found), np.concatenate(truth))
        ap = float(np.mean([average_precision(*pair) for pair in zip(truth, found, strict=True)]))
        result[name] = {"frame_ap": round(ap, 4), "f1": round(f1, 4), "threshold": round(threshold, 3)}
    table = Table("score", "frame AP", "F1, one threshold", "threshold", title=f"{args.split}, {len(samples)} queries")
    for name, row in result.items():
        table.add_row(name, *map(str, row.values()))
    console = Console(highlight=False)
    console.print(table)
    print(json.dumps({"split": args.split, "ways": result} | environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
