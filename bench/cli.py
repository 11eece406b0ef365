"""`livemoments bench MEASURE`."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

from kernels.errors import InputError

MEASURES = {
    "accuracy": "recorded videos through the very code of `run`, scored on what was published when",
    "backfill": "how long a new query takes to be answered for the past",
    "capacity": "how many live streams, each with its queries, this machine bears, and what limits it",
    "latency": "glass to event on a live RTSP stream, and what each stage takes of it",
    "model": "what one window costs the model, beside the image tower and the published model",
    "ops": "what each engine and kernel takes on this CPU, beside its reference and what the machine could do at best",
    "page": "what clips of every moment and clients of the page cost the events",
    "soak": "the memory of a service that watches live streams for long, and how late its events are",
}
"""Each is a module of this package with `add_arguments` and `run`."""


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """`arguments` are those behind `bench`: only the measure that they name is imported."""
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", required=True)
    for name, summary in MEASURES.items():
        measure = measures.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if list(arguments[:1]) == [name]:
            try:
                module = import_module(f"bench.{name}")
            except ModuleNotFoundError as error:
                raise InputError(
                    f"this needs the package {error.name}: pip install 'livemoments[bench,build]'"
                ) from None
            module.add_arguments(measure)
            measure.set_defaults(measured=module.run)


def run(args: argparse.Namespace) -> int:
    measured: Callable[[argparse.Namespace], int] = args.measured
    return measured(args)
