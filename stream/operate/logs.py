"""What the service says, on stderr: lines for people, or JSON, one object a line, for what collects logs."""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

from stream.sources import mask

FORMATS = ("text", "json")
log = logging.getLogger(__name__)


class Json(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message; and exception, the traceback, where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        if record.exc_info:
            said["exception"] = mask(self.formatException(record.exc_info))
        return json.dumps(said)


@contextlib.contextmanager
def spoken(kind: str, news: logging.Logger) -> Iterator[None]:
    """Meanwhile everything that is logged is said as one of FORMATS; of `news` that is all, of others what is wrong.

    As text the news are plain lines, and the rest is said as by any other command.
    """
    handler, at = logging.StreamHandler(), logging.getLogger() if kind == "json" else news
    handler.setFormatter(Json() if kind == "json" else logging.Formatter("%(message)s"))
    before = at.handlers, news.propagate, news.level, threading.excepthook
    at.handlers, news.propagate = [handler], kind == "json"
    news.setLevel(logging.INFO)
    if kind == "json":
        threading.excepthook = _thread_died
    try:
        yield
    finally:
        at.handlers, news.propagate, level, threading.excepthook = before
        news.setLevel(level)


def _thread_died(died: threading.ExceptHookArgs) -> None:
    name = died.thread.name if died.thread else "a thread"
    info = (died.exc_type, died.exc_value or died.exc_type(), died.exc_traceback)
    log.critical("%s has died", name, exc_info=info)
