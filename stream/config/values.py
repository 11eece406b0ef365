"""The kinds of values in a config and what each must be. A ValueError says what is wrong: what to do.

Relative paths, those of video files included, begin at the validation's context: the folder of the config.
"""

import base64
import binascii
import os
import re
import ssl
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationInfo

from kernels.errors import InputError, LivemomentsError
from stream.config.rules import is_host
from stream.sources import STREAM_NAME, SourceKind, parse_source
from stream.types import tidy
from stream.window import hop_from_seconds


def _folder(info: ValidationInfo) -> Path:
    return info.context if isinstance(info.context, Path) else Path()


def _located(path: Path, info: ValidationInfo) -> Path:
    if path == Path():
        raise ValueError("is empty: give the name of a file or folder")
    if "\0" in str(path):
        raise ValueError("is no name of a file: it holds a zero byte")
    return _folder(info) / os.path.expanduser(path)  # noqa: PTH111 - leaves a user it does not know


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: names are relative to the config")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: permission denied")
    return path


def _to_write(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}: make it, or name a file elsewhere")
    return path


def _to_fill(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}: make it, or name a folder elsewhere")
    if not os.access(path if path.exists() else path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: permission denied")
    return path


def _source(text: str, info: ValidationInfo) -> str:
    text = text.strip()
    try:
        if _may_be_file(text):
            text = str(_folder(info) / os.path.expanduser(text))  # noqa: PTH111
        parse_source(text)
    except LivemomentsError as error:
        # Where the form of an address is wrong, `parse_source` cannot tell its password.
        raise ValueError(re.sub(":.*@", ":***@", tidy(str(error)))) from None
    return text


def _may_be_file(text: str) -> bool:
    if not text or "://" in text or text.startswith("test:"):
        return False
    try:
        return parse_source(text).kind is SourceKind.FILE
    except LivemomentsError:
        return True


def _query_text(text: str) -> str:
    if not tidy(text):
        raise ValueError("is empty: write what to wait for")
    return text


def _stream_name(name: str) -> str:
    if not STREAM_NAME.fullmatch(name):
        raise ValueError("cannot be the name of a stream: use 1 to 64 letters, digits, dots, - or _")
    return name


def _hop(seconds: float) -> float:
    try:
        hop_from_seconds(seconds)
    except InputError as error:
        raise ValueError(str(error)) from None
    return seconds


def _host(text: str) -> str:
    if not is_host(text):
        raise ValueError("is no IP address or host name: write it without port and brackets")
    return text


def check_tls(cert: Path, key: Path) -> None:
    try:
        # An encrypted key must not ask for its passphrase on a terminal that nobody watches.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError:
        raise ValueError("is no key of server.tls_cert: both must be PEM, the key without passphrase") from None


def _off(port: object) -> object:
    if port is True:
        raise ValueError("must be a number, or false")
    return None if port is False else port


def _token(text: str) -> str:
    if not re.fullmatch(r"[!-~]{16,}", text):  # it travels in a header of HTTP
        raise ValueError("must have at least 16 letters, digits and signs of ASCII, and no spaces")
    return text


def _webhook_secret(text: str) -> str:
    if len(text) < 16:
        raise ValueError("must have at least 16 characters")
    if text.startswith("whsec_"):
        try:
            base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise ValueError("begins with whsec_ and does not go on in base64: copy it again") from None
    return text


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        sound = False
    if not sound or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be http://HOST/PATH or https://HOST/PATH, other characters %-encoded")
    return text


def _curve_key(key: str) -> str:
    from stream.deliver.zeromq import is_key  # here, so that a config without keys needs no zmq

    if not is_key(key):
        raise ValueError("is no CURVE key: it has 40 characters, ZeroMQ's Z85")
    return key


# Strict: "5" is no number, and 1 is not true.
Whole = Annotated[int, Strict()]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Switch = Annotated[bool, Strict()]
Share = Annotated[Real, Field(ge=0, le=1)]
Seconds = Annotated[Real, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Threshold = Annotated[Real, Field(gt=0, le=1)]
Hop = Annotated[Real, AfterValidator(_hop)]
Port = Annotated[Whole, Field(ge=0, le=65535)]
PortOrOff = Annotated[Port | None, BeforeValidator(_off)]
AnyPath = Annotated[Path, AfterValidator(_located)]
FilePath = Annotated[AnyPath, AfterValidator(_readable)]
OutPath = Annotated[AnyPath, AfterValidator(_to_write)]
OutFolder = Annotated[AnyPath, AfterValidator(_to_fill)]
Host = Annotated[str, AfterValidator(_host)]
Url = Annotated[str, AfterValidator(_url)]
Token = Annotated[str, AfterValidator(_token)]
WebhookSecret = Annotated[str, AfterValidator(_webhook_secret)]
CurveKey = Annotated[str, AfterValidator(_curve_key)]
SourceText = Annotated[str, AfterValidator(_source)]
StreamName = Annotated[str, AfterValidator(_stream_name)]
QueryText = Annotated[str, AfterValidator(_query_text)]
