"""`livemoments check-config`: what is wrong with a config, or what it says. No camera and no engine is opened."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from kernels.bundle import Manifest, load_manifest
from kernels.errors import BundleError
from stream.config.lines import line_of, value_lines
from stream.config.schema import (
    ClipsConfig,
    Config,
    ConfigError,
    EngineConfig,
    QueryConfig,
    ServerConfig,
    WebhookConfig,
    load_config,
    read_text,
)
from stream.moments import MomentOptions
from stream.sources import parse_source
from stream.types import NS, tidy

PIPE_WIDTH = 200
"""Columns of what goes into a file or another program."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the config that `livemoments serve` takes")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    manifest = check_engine(args.config, config.engine)
    # Queries and names are the user's own text, which rich must not take for markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    table = Table.grid(padding=(0, 2))
    for title, value in _lines(config, manifest):
        table.add_row(title, value)
    console.print(table)
    return 0


def check_engine(path: Path, engine: EngineConfig) -> Manifest:
    """Hold the bundle that the config at `path` names against what it is to do, without loading its weights.

    Raises:
        ConfigError: there is no whole bundle, or its trained head serves another hop.
    """
    lines = value_lines(read_text(path))
    try:
        manifest = load_manifest(engine.path)
    except BundleError as error:
        raise ConfigError(f"{path}:{line_of(lines, ('engine', 'path'))}: engine.path: {error}") from None
    if manifest.head and not engine.zero_shot and round(manifest.head.hop_s * NS) != engine.hop_ns:
        raise ConfigError(
            f"{path}:{line_of(lines, ('engine', 'hop'))}: engine.hop: this engine was trained at a hop of "
            f"{manifest.head.hop_s:g} s: set engine.hop = {manifest.head.hop_s:g}, or engine.zero_shot = true, which "
            "takes any"
        )
    return manifest


def _lines(config: Config, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Title and value of each line to show."""
    head = "zero-shot" if config.engine.zero_shot or not manifest.head else "trained head"
    yield "engine", f"{manifest.model} on {manifest.target}, {head}, hop {config.engine.hop:g} s ({config.engine.path})"
    for name, stream in config.streams.items():
        yield f"stream {name}", "\n".join([tidy(parse_source(stream.source).shown), *map(_query, stream.queries)])
    if not config.streams:
        yield "streams", "none"
    yield "every stream", "\n".join(map(_query, config.queries)) or "no queries"
    yield from _listening(config.server)
    yield "log", f"{config.log.path}, at most {config.log.max_mb} MB"
    yield "clips", _clips(config.clips)
    for webhook in config.webhooks:
        yield "webhook", _webhook(webhook)
    yield "moments", _differing(vars(config.moments), vars(MomentOptions()))
    yield "limits", _differing(config.limits.model_dump(), type(config.limits)().model_dump())


def _listening(server: ServerConfig) -> Iterator[tuple[str, str]]:
    host = f"[{server.bind}]" if ":" in server.bind else server.bind
    reach = "this machine only" if server.is_loopback else "other machines too"
    tls, token = server.tls_cert is not None, server.token is not None
    whom = f"{'encrypted' if tls else 'not encrypted'}, {'with a token' if token else 'without a token'}"
    for name, scheme, port in (("WebSocket", "ws", server.ws_port), ("page", "http", server.page_port)):
        address = f"{scheme}{'s' if tls else ''}://{host}:{port or '(any port)'}"
        yield name, "off" if port is None else f"{address}, {reach}, {whom}"
    if server.zmq_port is None:
        yield "ZeroMQ", "off"
    else:
        count = len(server.curve.clients) if server.curve else 0
        whom = f"encrypted, for {count} client{'s' if count > 1 else ''}" if count else "not encrypted, for anybody"
        yield "ZeroMQ", f"tcp://{host}:{server.zmq_port or '(any port)'}, {reach}, {whom}"


def _clips(clips: ClipsConfig) -> str:
    if clips.folder is None:
        return "none"
    return (
        f"{clips.folder}, at most {clips.max_mb} MB, from {clips.before_s:g} s before a moment to {clips.after_s:g} s "
        f"after it, {clips.longest_s:g} s at the longest; {clips.ring_mb} MB of memory a stream"
    )


def _webhook(webhook: WebhookConfig) -> str:
    """Path and query of the address are left out: they often are the secret."""
    parts = urlsplit(webhook.url)
    streams = ", ".join(webhook.streams) if webhook.streams else "all streams"
    queries = ", ".join(map(tidy, webhook.queries)) if webhook.queries else "all queries"
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/..., {'signed' if webhook.secret else 'not signed'}"
    return f"{address}: {', '.join(webhook.kinds)} of {streams}, {queries}"


def _query(query: QueryConfig) -> str:
    return f"- {tidy(query.text)}" + (f" (threshold {query.threshold:g})" if query.threshold is not None else "")


def _differing(values: dict[str, float], defaults: dict[str, float]) -> str:
    changed = [
        f"{key} {value:.9g} (default {defaults[key]:.9g})" for key, value in values.items() if value != defaults[key]
    ]
    return ", ".join(changed) or "as by default"
