"""`python -m models.reference FILE.safetensors`: is our R2 the published one, number for number?

The file holds `weights/` (a published state dict), `inputs/video` (1, T, K, 1+P, width), `inputs/query` (1, L, K,
width) and `outputs/` of the published model. Prints the largest absolute error of each output and, last, one JSON
object; the exit code is 1 when one is above 1e-4, 2 when the file does not fit. Ours are computed in float64: what is
left is the rounding of the file, the same on every machine. Boundaries are compared in windows, as the model has them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import ModelError
from models.published import from_published
from models.r2_types import ClipOutputs

TOLERANCE = 1e-4
SECONDS = torch.tensor([2.0, 2.0, 1.0])  # a window of the published features: of start, end, probability


def compare(path: Path) -> dict[str, float]:
    """Largest absolute error of each output in the file.

    Raises:
        ModelError: the file cannot be read or is not of this form.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
    given: dict[str, dict[str, Tensor]] = {part: {} for part in ("weights", "inputs", "outputs")}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        if part not in given:
            raise ModelError(f"{path}: {name} is none of weights/, inputs/, outputs/")
        given[part][rest] = value
    model = from_published(given["weights"], str(path)).double()
    video, text = (_input(given["inputs"], name, f"{path}: inputs/{name}") for name in ("video", "query"))
    c = model.config
    ones, length, depth, tokens, width = video.shape
    if ones != 1 or depth != c.depth or width != c.video_width or not length or not tokens:
        fits = f"(1, T, {c.depth}, 1+P, {c.video_width})"
        raise ModelError(f"{path}: inputs/video is {tuple(video.shape)}, its weights want {fits}")
    if (text.shape[0], *text.shape[2:]) != (1, c.depth, c.text_width) or not text.shape[1]:
        fits = f"(1, L, {c.depth}, {c.text_width})"
        raise ModelError(f"{path}: inputs/query is {tuple(text.shape)}, its weights want {fits}")
    if not given["outputs"]:
        raise ModelError(f"{path} has no outputs/ to compare with")
    nothing = text.new_zeros(1, 0)
    with torch.inference_mode():
        text = text.transpose(1, 2)
        query = model.query_maps(text, nothing, torch.ones(1, text.shape[2], dtype=torch.bool))
        outputs = model(video, nothing, query)
    assert isinstance(outputs, ClipOutputs)
    ours = {
        "hidden": outputs.hidden,
        "query_last": query.words[0].tokens,
        "query_pooled": query.pooled[:, None],
        "saliency": outputs.saliency[0],
        "boundary": outputs.boundaries(model.config.strides)[0],
    }
    depth = model.config.depth
    ours |= {f"coll_v{i}": outputs.cls[:, depth - 1 - i] for i in range(depth)}  # in the order of the steps
    ours |= {f"class_level{i}": level[..., None] for i, level in enumerate(outputs.logits)}
    with torch.inference_mode():  # what the head says before it becomes a distance
        raw = [model.heads.locate.whole(level) for level in model.heads.pyramid(outputs.hidden)]
    ours |= {f"coord_level{i}": level for i, level in enumerate(raw)}
    if strange := sorted(given["outputs"].keys() - ours.keys()):
        raise ModelError(f"{path}: nothing of ours compares with outputs/{strange[0]}")
    return {name: _error(ours[name], want, name, path) for name, want in given["outputs"].items()}


def _input(inputs: dict[str, Tensor], name: str, shown: str) -> Tensor:
    if name not in inputs:
        raise ModelError(f"{shown} is missing")
    axes = {"video": 5, "query": 4}[name]
    if inputs[name].ndim != axes or not inputs[name].is_floating_point():
        raise ModelError(f"{shown} is {inputs[name].dtype} with {inputs[name].ndim} axes, {axes} of float32 are wanted")
    return inputs[name].double()


def _error(ours: Tensor, want: Tensor, name: str, path: Path) -> float:
    if not want.is_floating_point():
        raise ModelError(f"{path}: outputs/{name} is {want.dtype}, float32 is wanted")
    if ours.shape != want.shape:
        raise ModelError(f"{path}: outputs/{name} is {tuple(want.shape)}, ours is {tuple(ours.shape)}")
    if name == "boundary":
        want = want / SECONDS
    return float((ours - want).abs().max())


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m models.reference", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="weights, inputs and outputs of the published model")
    try:
        errors = compare(parser.parse_args().file)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("output", "largest error")
    for name, largest in errors.items():
        table.add_row(name, f"{largest:.2e}", style="" if largest <= TOLERANCE else "red")
    Console(highlight=False).print(table)
    print(json.dumps(errors))
    return 0 if all(largest <= TOLERANCE for largest in errors.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
