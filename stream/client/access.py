"""How a program gets into a server, over WebSocket or HTTP: the options that say so, and what they hold. No socket."""

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from kernels.errors import InputError

DEFAULT_URL = "ws://127.0.0.1:8765"


@dataclass(frozen=True)
class Access:
    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None  # PEM, whom to trust beside the system's authorities


def add_access_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--token", metavar="TEXT", help="what the server asks for; lists of processes show it")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the same, in a file")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="for wss:// or https://: whom to trust, as PEM"
    )


def access(args: argparse.Namespace, url: str) -> Access:
    """What the options say, for a server at `url`. InputError if they cannot be meant so."""
    if args.token is not None and args.token_file is not None:
        raise InputError("--token and --token-file are both given: keep one")
    if args.certificate is not None and not url.startswith(("wss:", "https:")):
        raise InputError(f"--certificate is for wss:// and https://, and {url} is not encrypted")
    token = args.token if args.token_file is None else secret("--token-file", args.token_file)
    if token is not None and not re.fullmatch(r"[!-~]+", token):  # it travels in a header of HTTP
        raise InputError("the token must be letters, digits and signs of ASCII, without spaces")
    return Access(token, args.certificate)


def secret(option: str, path: Path) -> str:
    """What a file holds, without the space around it. InputError if that is nothing; the text does not show it."""
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "it is no file of text").lower()
        raise InputError(f"{option}: {path} cannot be read ({reason})") from None
    if not text:
        raise InputError(f"{option}: {path} is empty")
    return text
