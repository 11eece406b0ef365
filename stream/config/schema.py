"""The config of `livemoments serve`: a TOML file -> `Config`, or all of its mistakes, each with its line.

config_values.py    what each value must be
config_rules.py     what the parts must be to each other
config_wording.py   a mistake in words
toml_lines.py       its line
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from kernels.bundle import EMBEDDED
from kernels.errors import InputError
from stream.config.lines import KeyPath, line_of, value_lines
from stream.config.rules import SECRETS, contradictions, is_loopback, read_secrets
from stream.config.values import (
    AnyPath,
    Count,
    CurveKey,
    FilePath,
    Hop,
    Host,
    OutFolder,
    OutPath,
    Port,
    PortOrOff,
    QueryText,
    Real,
    Seconds,
    Share,
    SourceText,
    StreamName,
    Switch,
    Threshold,
    Token,
    Url,
    WebhookSecret,
    Whole,
    check_tls,
)
from stream.config.wording import explain
from stream.moments import MomentOptions
from stream.types import Kind, tidy
from stream.window import hop_from_seconds


class ConfigError(InputError):
    """What is wrong with a config, one line a mistake: `FILE:LINE: what is wrong: what to do`."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_by_name=True)


class QueryConfig(_Table):
    """A query. In the file it may be its text alone."""

    text: QueryText
    threshold: Threshold | None = None  # None: that of `moments`

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if not isinstance(value, str | dict | QueryConfig):
            raise ValueError("must be text in quotes, or {text = ..., threshold = ...}")
        return {"text": value} if isinstance(value, str) else value


class StreamConfig(_Table):
    """A stream and the queries of its own; those of every stream are in `Config.queries`."""

    source: SourceText = Field(repr=False)  # as `parse_source` takes it, credentials included
    queries: tuple[QueryConfig, ...] = ()


class EngineConfig(_Table):
    path: AnyPath = EMBEDDED
    zero_shot: Switch = False
    hop: Hop = 1.0  # seconds

    @property
    def hop_ns(self) -> int:
        return hop_from_seconds(self.hop)


class CurveConfig(_Table):
    """ZeroMQ's encryption. Keys are Z85 text."""

    secret_key: CurveKey = Field(repr=False)
    clients: Annotated[tuple[CurveKey, ...], Field(min_length=1)]  # public keys that may subscribe


class ServerConfig(_Table):
    bind: Host = "127.0.0.1"
    ws_port: Port = 8765  # 0: any free one
    zmq_port: PortOrOff = 5555  # 0: any free one; None (in the file: false): no ZeroMQ
    page_port: PortOrOff = 8766  # 0: any free one; None (in the file: false): no page, no clips to load, no metrics
    token: Token | None = Field(default=None, repr=False)
    tls_cert: FilePath | None = None  # both or none
    tls_key: FilePath | None = None
    curve: CurveConfig | None = None

    @field_validator("tls_key")
    @classmethod
    def _fits(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if key and (cert := info.data.get("tls_cert")):
            check_tls(cert, key)
        return key

    @property
    def is_loopback(self) -> bool:
        """Only this machine can connect."""
        return is_loopback(self.bind)


class LogConfig(_Table):
    path: OutPath = Field(default=Path("livemoments.sqlite"), validate_default=True)
    max_mb: Count = 512


class ClipsConfig(_Table):
    """Video files cut around moments."""

    folder: OutFolder | None = None  # None: no clips
    before_s: Seconds = 5.0  # that a clip begins before its moment, at least
    after_s: Seconds = 5.0  # and goes on after it
    longest_s: Annotated[Real, Field(gt=0)] = 600.0  # a longer clip is cut off
    max_mb: Count = 10240  # on the disk, in all: the oldest go
    ring_mb: Count = 64  # in memory, of each stream


class Limits(_Table):
    """What a server bears. What would go beyond is refused."""

    streams: Count = 64
    clients: Count = 256
    queries: Count = 1000  # running in all
    queries_per_client: Count = 64
    message_bytes: Annotated[Whole, Field(ge=256)] = 65536  # a request with a query must fit in
    messages_per_second: Annotated[Real, Field(gt=0)] = 20.0  # of one client, on average; bursts of 5 times that
    history_s: Seconds = 600.0  # how long features are kept for backfill; 0: none


class WebhookConfig(_Table):
    url: Url = Field(repr=False)  # often a secret in itself
    secret: WebhookSecret | None = Field(default=None, repr=False)  # signs
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = (Kind.OPENED, Kind.CLOSED)
    streams: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # names; None: all
    queries: Annotated[tuple[QueryText, ...], Field(min_length=1)] | None = None  # texts; None: all


class _Moments(_Table):
    """MomentOptions, as the file has them."""

    threshold: Threshold = MomentOptions.threshold
    hysteresis: Share = MomentOptions.hysteresis
    min_length_s: Seconds = MomentOptions.min_length_s
    min_gap_s: Seconds = MomentOptions.min_gap_s
    update_s: Seconds = MomentOptions.update_s
    prominence: Share = MomentOptions.prominence

    @model_validator(mode="before")
    @classmethod
    def _from_options(cls, value: object) -> object:
        return vars(value) if isinstance(value, MomentOptions) else value

    def options(self) -> MomentOptions:
        return MomentOptions(**self.model_dump())


# Validated as a table of the file, so that all of its mistakes are found, and kept as what the trackers take.
_CheckedMoments = Annotated[
    MomentOptions,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            _Moments.options, handler.generate_schema(_Moments)
        )
    ),
]


class Config(_Table):
    """All of it. `load_config` also holds the parts against each other: who makes one by hand sees to that."""

    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    log: LogConfig = Field(default_factory=LogConfig)
    clips: ClipsConfig = ClipsConfig()
    moments: _CheckedMoments = MomentOptions()
    limits: Limits = Limits()
    webhooks: tuple[WebhookConfig, ...] = Field(default=(), validation_alias="webhook")  # [[webhook]]
    streams: dict[StreamName, StreamConfig] = Field(default_factory=dict)  # [streams.NAME]
    queries: tuple[QueryConfig, ...] = ()  # on every stream


_TABLES: dict[KeyPath, type[_Table]] = {
    (): Config,
    ("engine",): EngineConfig,
    ("server",): ServerConfig,
    ("server", "curve"): CurveConfig,
    ("log",): LogConfig,
    ("clips",): ClipsConfig,
    ("moments",): _Moments,
    ("limits",): Limits,
    ("webhook",): WebhookConfig,
    ("queries",): QueryConfig,
    ("streams", "*"): StreamConfig,
    ("streams", "*", "queries"): QueryConfig,
}


@dataclass(frozen=True)
class Changes:
    """What a reload brings: names of streams, and of fields of `Config`."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]  # another source, or other queries of its own
    sections: tuple[str, ...]  # those of queries, moments, limits and webhooks that differ
    restart: tuple[str, ...]  # those of engine, server, log and clips that differ: they wait for a restart


def changes(old: Config, new: Config) -> Changes:
    def differ(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(old, name) != getattr(new, name))

    return Changes(
        added=tuple(name for name in new.streams if name not in old.streams),
        removed=tuple(name for name in old.streams if name not in new.streams),
        changed=tuple(name for name in old.streams if new.streams.get(name, old.streams[name]) != old.streams[name]),
        sections=differ("queries", "moments", "limits", "webhooks"),
        restart=differ("engine", "server", "log", "clips"),
    )


def load_config(path: Path) -> Config:
    """Read a config, with the secrets that are in files of their own.

    Raises:
        ConfigError: it cannot be read, or has mistakes.
    """
    text = read_text(path)
    try:
        data = tomllib.loads(text)
        lines = value_lines(text)
    except tomllib.TOMLDecodeError as error:
        problem, _, at = str(error).partition(" (at ")
        found = re.match(r"line (\d+)", at)
        line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
        raise ConfigError(f"{path}:{line}: this is not TOML: {problem[0].lower()}{problem[1:]}") from None
    except (RecursionError, ValueError):  # which tell no line
        raise ConfigError(f"{path}:1: an array is nested too deeply, or a number has thousands of digits") from None
    folder = path.absolute().parent
    data.setdefault("log", {})  # its default path, too, is relative to the file
    mistakes = [*contradictions(data), *read_secrets(data, folder)]
    try:
        config = Config.model_validate(data, context=folder, by_alias=True, by_name=False)
    except ValidationError as error:
        told = {at for at, _ in mistakes}
        for each in error.errors(include_url=False):
            *table, key = each["loc"]
            if (*table, f"{key}_file") not in told:  # what is missing since its file cannot be read
                mistakes.append(explain(each, _keys(table)))
    if not mistakes:
        return config
    by_line = sorted({(line_of(lines, at), tidy(problem)) for at, problem in mistakes})
    raise ConfigError("\n".join(f"{path}:{line}: {problem}" for line, problem in by_line))


def read_text(path: Path) -> str:
    """The text of a config, of whatever line ends.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {(error.strerror or str(error)).lower()}") from None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: this is not text in UTF-8: save it as such") from None


def _keys(table: list[str | int]) -> list[str]:
    """The keys that a table may have, of the path of the table."""
    names: KeyPath = tuple(part for part in table if isinstance(part, str))
    if names[:1] == ("streams",) and len(names) > 1:
        names = ("streams", "*", *names[2:])
    if names not in _TABLES:
        return []
    keys = [str(field.validation_alias or name) for name, field in _TABLES[names].model_fields.items()]
    secret = SECRETS.get(".".join(str(part) for part in names))
    return keys + ([f"{secret}_file"] if secret else [])
