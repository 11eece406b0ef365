"""What the page shows of a service, beside what any client may ask. Any thread may call."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stream.config.schema import ServerConfig
from stream.export.formats import Format, export
from stream.operate.health import healthy, ready
from stream.operate.metrics import render
from stream.page.server import Page

if TYPE_CHECKING:
    from stream.service.service import Service


class Backstage:
    """A `page.server.Program`."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def picture(self, stream: str) -> bytes | None:
        pictures = self._service.recorder.pictures(stream) if self._service.recorder else None
        return pictures.newest() if pictures else None

    def picture_at(self, stream: str, utc_ns: int) -> bytes | None:
        pictures = self._service.recorder.pictures(stream) if self._service.recorder else None
        return pictures.at(utc_ns) if pictures else None

    def clip(self, name: str) -> Path | None:
        shelf = self._service.recorder.shelf if self._service.recorder else None
        return shelf.find(name) if shelf else None

    def export(self, stream: str, kind: Format, given: Mapping[str, str], base: str) -> bytes:
        return export(self._service.log, stream, kind, given, base)

    def metrics(self) -> tuple[bytes, str]:
        return render(self._service)

    def health(self) -> tuple[bool, list[str]]:
        return healthy(self._service)

    def readiness(self) -> tuple[bool, list[str]]:
        return ready(self._service)


def page_of(server: ServerConfig, program: Backstage) -> Page | None:
    """The page that a config asks for.

    Raises:
        InputError: its address cannot be used.
    """
    if server.page_port is None:
        return None
    tls = (server.tls_cert, server.tls_key) if server.tls_cert and server.tls_key else None
    return Page(program, port=server.page_port, host=server.bind, token=server.token, tls=tls)
