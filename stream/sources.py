"""What the user may give as a video source, understood without GStreamer: text in, `Source` out.

`parse_source` opens nothing. Files and devices are only looked at, so that the commonest mistakes get a clear line at
once. What is said about a source later is here too, since it needs no gi: its `SourceStatus`, and why it failed.
"""

import os
import re
import socket
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from kernels.errors import SourceError

UNDERSTOOD = (
    "a video file, file://, http(s):// (also HLS, .m3u8), rtsp(s)://, rtmp(s)://, srt://, "
    "udp://host:port (MPEG-TS), /dev/videoN, test:PATTERN, or a gst-launch description ending in raw video (a ! b)"
)
STREAM_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NETWORK = frozenset({"http", "https", "rtsp", "rtsps", "rtspt", "rtmp", "rtmps", "srt", "udp"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DEVICE = re.compile(r"(?:v4l2://)?(/dev/video\d+)")
# A description of one element alone has no "!": the only such that gives pictures is a source.
_ONE_ELEMENT = re.compile(r"[a-z][a-z0-9]*src(\s|$)")
_PATTERN = re.compile(r"[a-z0-9-]*")
_USER = re.compile(r"(://)([^/\s\"':@]*)(:[^/\s\"']*)?@")
_SECRET = re.compile(
    r"((?:user-?pw|[\w-]*pass(?:word|phrase)?|[\w-]*token|[\w-]*secret|[\w-]*key|auth|sig(?:nature)?)=)(\"[^\"]*\"|[^\s&\"]+)",
    re.IGNORECASE,
)


NO_VIDEO = "no video"
"""The problem of a source that can be read and holds no pictures."""
_PORTS = {"http": 80, "https": 443, "rtsp": 554, "rtspt": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443}


class SourceKind(StrEnum):
    """How a source is opened, and what its end means."""

    FILE = "file"  # ends
    NETWORK = "network"  # dies and comes back, unless the far end says how long it is
    DEVICE = "device"  # dies and comes back
    TEST = "test"  # live; never ends
    LAUNCH = "launch"  # whatever the description says; its EOS is the end


@dataclass(frozen=True)
class Source:
    """A source that has been understood."""

    kind: SourceKind
    locator: str  # FILE, NETWORK, DEVICE: URI, credentials included; TEST, LAUNCH: gst-launch description
    name: str  # default stream name: [A-Za-z0-9._-]{1,64}, never a credential
    shown: str  # what the user wrote, secrets masked: the only form for messages and logs
    path: Path | None = None  # FILE only


@dataclass(frozen=True)
class SourceStatus:
    """What happened to a source. connected: pictures flow; reconnecting: they stopped; ended: no more will come."""

    state: Literal["connected", "reconnecting", "ended"]
    reason: str | None = None  # why it stopped, in words; None for a plain end and for `connected`
    retry_s: float | None = None  # `reconnecting` only: seconds until the next try


def parse_source(text: str) -> Source:
    """Understand `text` as a video source; see `UNDERSTOOD` for the forms.

    Raises:
        SourceError: the form is unknown, or the file or device named is not there or cannot be read.
    """
    text = text.strip()
    if " ! " in text or _ONE_ELEMENT.match(text):
        # The masked text is what the name comes from, so that no secret of the description can get in.
        return Source(SourceKind.LAUNCH, text, _slug(text.split()[0]), mask(text))
    if text.startswith("test:"):
        return _test_source(text)
    if device := _DEVICE.fullmatch(text):
        return _device_source(text, device[1])
    if not (scheme := _SCHEME.match(text)):
        return _file_source(text, Path(os.path.expanduser(text)))  # noqa: PTH111 - leaves a user it does not know
    if scheme[1].lower() == "file":
        return _file_source(text, Path(unquote(urlsplit(text).path)))
    if scheme[1].lower() in _NETWORK:
        return _network_source(text)
    raise SourceError(f"cannot read {mask(text)}: {scheme[1]}:// is none of {UNDERSTOOD}")


def mask(text: str) -> str:
    """Take the passwords, tokens and keys out of a URL, a description, or a message that quotes one."""
    text = _USER.sub(lambda m: f"{m[1]}{m[2]}:***@" if m[3] else (f"{m[1]}***@" if m[2] else m[0]), text)
    return _SECRET.sub(r"\1***", text)


def cannot_open(source: Source, problem: str) -> str:
    """The line for a source that gave no picture. A server is knocked at, for a better reason than GStreamer's."""
    if problem == NO_VIDEO:
        return f"no video in {source.shown}"
    if source.kind is SourceKind.FILE:
        return f"{source.shown} is not a video that GStreamer can read: {problem}"
    if source.kind is SourceKind.NETWORK:
        problem = _unreachable(source.locator) or problem
    return f"cannot open {source.shown}: {problem}"


def explain(message: str, debug: str | None) -> str:
    """A GStreamer error in one line: its message, and the detail that hides at the end of its debug text."""
    lines = (debug or "").splitlines()
    missing = [line.removeprefix("Missing decoder: ") for line in lines if line.startswith("Missing decoder: ")]
    if pictures := [line for line in missing if "(video/" in line or "(image/" in line]:
        names = ", ".join(line.split(" (")[0] for line in pictures)
        return f"no decoder for {names} (apt install gstreamer1.0-libav, or the plugin of your hardware)"
    if missing:
        return NO_VIDEO  # what could not be decoded is not even video
    detail = lines[-1] if len(lines) > 1 and not lines[-1].startswith("streaming stopped") else ""
    message, detail = message.rstrip("."), detail.split(", URL:")[0].rstrip(".")
    if not detail or detail.lower().startswith(message.lower()):
        return one_line(detail or message)
    return one_line(f"{message} ({detail})")


def one_line(text: str) -> str:
    """Fit to be shown: no secrets, no line breaks, no endless text."""
    return mask(" ".join(text.split()))[:300]


def _file_source(text: str, path: Path) -> Source:
    if not text:
        raise SourceError(f"no source given: expected {UNDERSTOOD}")
    try:
        found = path.exists()
    except (OSError, ValueError) as error:  # a name too long for the file system, or no name at all
        raise SourceError(f"cannot read {text[:60]}: {error}") from None
    if not found:
        raise SourceError(f"no such file: {text} (a source is {UNDERSTOOD})")
    if path.is_dir():
        raise SourceError(f"{text} is a directory, not a video file")
    if not path.is_file():
        raise SourceError(f"{text} is not a regular file")
    if not os.access(path, os.R_OK):
        raise SourceError(f"{text} cannot be read: permission denied")
    if path.stat().st_size == 0:
        raise SourceError(f"{text} is empty")
    path = path.resolve()
    return Source(SourceKind.FILE, path.as_uri(), _slug(path.stem), text, path)


def _device_source(text: str, device: str) -> Source:
    if not Path(device).exists():
        raise SourceError(f"no such device: {device}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise SourceError(f"{device} cannot be opened: permission denied (add the user to the group video)")
    return Source(SourceKind.DEVICE, f"v4l2://{device}", Path(device).name, text)


def _test_source(text: str) -> Source:
    pattern = text.removeprefix("test:") or "smpte"
    if not _PATTERN.fullmatch(pattern):
        raise SourceError(f"cannot read {text}: a test pattern is a word such as smpte, ball, snow or black")
    # Live and modest by default: it stands in for a camera.
    description = f"videotestsrc is-live=true pattern={pattern} ! video/x-raw,width=640,height=360,framerate=30/1"
    return Source(SourceKind.TEST, description, _slug(f"test-{pattern}"), text)


def _network_source(text: str) -> Source:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        # The usual cause is a password with / # or ? in it, which masking would miss: show nothing of the text.
        raise SourceError(
            "cannot read the address: its host or port is malformed "
            "(special characters of a password must be %-encoded)"
        ) from error
    if not parts.hostname and parts.scheme not in ("udp", "srt"):  # those may listen on every interface
        raise SourceError(f"cannot read {mask(text)}: it names no host")
    if parts.scheme == "udp" and port is None:
        raise SourceError(f"cannot read {mask(text)}: udp needs a port, udp://host:port")
    return Source(SourceKind.NETWORK, text, _network_name(parts, port), mask(text))


def _network_name(parts: SplitResult, port: int | None) -> str:
    """Host, port and path alone: user, password and query string may all hold secrets."""
    return _slug(f"{parts.hostname or 'any'}-{port or ''}-{unquote(parts.path).removesuffix('.m3u8')}")


def _slug(text: str) -> str:
    """Safe as a part of a topic, a URL path and a file name: [A-Za-z0-9._-]{1,64}."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", ascii_text).strip("-.")[:64].rstrip("-.") or "stream"


def _unreachable(uri: str) -> str | None:
    """Why the server cannot be reached: GStreamer's own word for it is "Failed to connect", or worse."""
    parts = urlsplit(uri)
    if parts.scheme not in _PORTS:
        return None
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout=3).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
