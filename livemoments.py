"""The front door: `livemoments COMMAND`. Each command lives in the package it belongs to; this file only finds it."""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from kernels.errors import InputError, LivemomentsError


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream import run

    run.add_arguments(parser)
    return run.run


def _serve(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream.service import serve

    serve.add_arguments(parser)
    return serve.run


def _check_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream.config import check

    check.add_arguments(parser)
    return check.run


def _subscribe(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream.client import subscribe

    subscribe.add_arguments(parser)
    return subscribe.run


def _control(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream.client import control

    control.add_arguments(parser, arguments)
    return control.run


def _export(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from stream.export import command

    command.add_arguments(parser)
    return command.run


def _build_engine(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    return _with_torch("kernels.build_engine", "build", parser)


def _import_weights(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    return _with_torch("trainer.import_weights", "train", parser)


def _extract(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    return _with_torch("trainer.extract", "train", parser)


def _train(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    return _with_torch("trainer.train", "train", parser)


def _with_torch(name: str, extra: str, parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """A command that needs torch, which the base install has not."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"this needs the package {error.name}: pip install 'livemoments[{extra}]'") from None
    module.add_arguments(parser)
    run: Callable[[argparse.Namespace], int] = module.run
    return run


def _bench(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from bench import cli

    cli.add_arguments(parser, arguments)
    return cli.run


def _metrics(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    from trainer import metrics_command

    metrics_command.add_arguments(parser)
    return metrics_command.run


COMMANDS = {
    "run": (_run, "watch one source for text queries and tell the moments as they come"),
    "serve": (_serve, "watch many streams for queries that come and go, and tell whoever listens"),
    "check-config": (_check_config, "say what is wrong with a config of serve, or what it says"),
    "subscribe": (_subscribe, "show what a running detector tells: a live table, or JSON lines"),
    "control": (_control, "ask a running service about its streams and queries, or change its streams"),
    "export": (_export, "write the moments of a stream as subtitles, as a timeline of an editor, or as jsonl"),
    "extract": (_extract, "make the features of recordings and queries, once, for training"),
    "train": (_train, "train the model on features and truth: a checkpoint, a table and a picture"),
    "build-engine": (_build_engine, "compile a backbone or a checkpoint for a CPU or a GPU, and hold it against torch"),
    "import-weights": (_import_weights, "bring published R2-Tuning weights into a checkpoint of this project"),
    "metrics": (_metrics, "score predictions against annotations, as the public benchmarks do"),
    "bench": (_bench, "measure accuracy on recorded videos and latency on a live stream"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 done, 2 the user's input was wrong (one line says how), 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="livemoments",
        description="Free-text queries on live video: when a moment starts, when it ends and how strong it is.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a library that is interrupted while it loads may go on regardless
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        for name, (load, summary) in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
            # Only the command that runs is imported: `--help` stays instant, and `subscribe` needs no GStreamer.
            if arguments[:1] == [name]:
                command.set_defaults(run=load(command, arguments[1:]))
        args = parser.parse_args(arguments)
        for ending in (signal.SIGINT, signal.SIGTERM):  # both end a command as Ctrl-C does: open moments close
            signal.signal(ending, signal.default_int_handler)
        exit_code: int = args.run(args)
    except LivemomentsError as error:
        print(f"livemoments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
