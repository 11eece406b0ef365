"""How far two runs of the same graphs agree, and the gate that an engine passes when it first meets a GPU. numpy only.

What is compared are directions: the worst cosine of each output.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kernels.bundle import Manifest
from kernels.errors import BundleError

PARITY = 0.999
"""The worst cosine that is agreement."""
PENDING = "pending"
"""What a manifest says of parity before an engine has met a GPU."""

Arrays = Mapping[str, NDArray[Any]]
Samples = Mapping[str, tuple[Arrays, Arrays]]
"""By graph: inputs, and what torch gave for them."""

log = logging.getLogger(__name__)


def worst_cosine(given: NDArray[Any], want: NDArray[Any]) -> float:
    """Over the vectors of the last axis; an output of one number a sample, (N,), is one vector.

    What is infinite (padding) must be so on both sides, and counts no more. -1 where shapes differ or something is not
    a number, and where such a vector is not as long on both sides, to 2%: its numbers are no direction.
    """
    if given.shape != want.shape or np.isnan(want).any():
        return -1.0
    padding = np.isinf(want)
    if (given[padding] != want[padding]).any() or not np.isfinite(given[~padding]).all():
        return -1.0
    a, b = (np.where(padding, 0.0, each).astype(np.float64) for each in (given, want))
    ours, theirs = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    if want.ndim == 1 and not np.isclose(ours, theirs, rtol=0.02, atol=1e-9):
        return -1.0
    lengths = ours * theirs
    nothing = (a == b).all(-1)  # what is zero on both sides agrees
    return round(float(np.where(nothing, 1.0, (a * b).sum(-1) / np.where(lengths > 0, lengths, 1.0)).min()), 6)


def load_samples(folder: Path) -> Samples:
    """The reference of a bundle.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    path = folder / "reference.npz"
    samples: dict[str, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
    try:
        with np.load(path) as file:
            for key in file.files:
                graph, side, name = key.split("/")
                samples.setdefault(graph, ({}, {}))[("in", "out").index(side)][name] = file[key]
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:  # not of this form, or no archive at all
        problem = (str(error).splitlines() or ["it is damaged"])[0]
        raise BundleError(f"{path} cannot be read: {problem}; build the bundle again") from None
    return samples


def confirm(folder: Path, manifest: Manifest, gpu: str, run: Callable[[str, Arrays], Arrays]) -> Manifest:
    """Hold every graph of a bundle against its reference, where that was not done yet, and write down how it went.

    Args:
        gpu: where it runs now; what was found on another says nothing.
        run: a graph by name, and its inputs -> its outputs.
    Returns:
        the manifest with the worst cosine of each output.
    Raises:
        BundleError: an output is below 0.999, or there is no reference.
    """
    if manifest.parity != PENDING and manifest.parity_on == gpu:
        return manifest
    agreed: dict[str, float] = {}
    for graph, (inputs, want) in load_samples(folder).items():
        given = run(graph, inputs)
        for name, each in want.items():
            agreed[f"{graph}.{name}"] = worst_cosine(given[name], each)
    if missing := set(manifest.precision) - {output.partition(".")[0] for output in agreed}:
        named = ", ".join(sorted(missing))
        raise BundleError(f"{folder}/reference.npz holds nothing to check {named} against: build the bundle again")
    worst = min(agreed, key=lambda name: agreed[name])
    if not agreed[worst] >= PARITY:
        raise BundleError(
            f"engine bundle {folder} is wrong on this GPU: {worst} does not agree with torch, worst cosine "
            f"{agreed[worst]}, at least {PARITY} is needed; build it in fp32, or for another target"
        )
    checked = replace(manifest, parity=agreed, parity_on=gpu)
    try:
        checked.write(folder)
    except OSError as error:
        log.info("the parity of %s is known to this process only, it cannot be written: %s", folder, error)
    return checked
