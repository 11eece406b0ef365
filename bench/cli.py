"""`livemoments bench MEASURE`."""

import argparse
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", required=True)
    try:
        from bench import accuracy, latency, soak
    except ModuleNotFoundError as error:
        from kernels.errors import InputError

        raise InputError(f"the benchmarks need {error.name}: pip install 'livemoments[bench]'") from None
    for name, module in (("accuracy", accuracy), ("latency", latency), ("soak", soak)):
        summary = (module.__doc__ or "").split(": ", 1)[1].split(".")[0]
        measure = measures.add_parser(name, help=summary, description=summary)
        module.add_arguments(measure)
        measure.set_defaults(measured=module.run)


def run(args: argparse.Namespace) -> int:
    measured: Callable[[argparse.Namespace], int] = args.measured
    return measured(args)
