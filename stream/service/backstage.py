"""What the page shows of a service, beside what any client may ask. Any thread may call."""

from pathlib import Path
from typing import TYPE_CHECKING

from stream.config.schema import ServerConfig
from stream.page.server import Page

if TYPE_CHECKING:
    from stream.service.service import Service


class Backstage:
    """A `page.server.Program`."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def picture(self, stream: str) -> bytes | None:
        return None

    def picture_at(self, stream: str, utc_ns: int) -> bytes | None:
        return None

    def clip(self, name: str) -> Path | None:
        return None

    def export(self, stream: str, kind: str) -> bytes | None:
        return None

    def metrics(self) -> tuple[bytes, str]:
        return b"", "text/plain"

    def health(self) -> tuple[bool, list[str]]:
        return True, []

    def readiness(self) -> tuple[bool, list[str]]:
        return True, []


def page_of(server: ServerConfig, program: Backstage) -> Page | None:
    """The page that a config asks for.

    Raises:
        InputError: its address cannot be used.
    """
    if server.page_port is None:
        return None
    tls = (server.tls_cert, server.tls_key) if server.tls_cert and server.tls_key else None
    return Page(program, port=server.page_port, host=server.bind, token=server.token, tls=tls)
