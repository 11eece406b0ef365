"""Files that a command leaves behind: refused before the work, and written whole or not at all."""

import os
import sys
from pathlib import Path

from kernels.errors import InputError


def check_writable(path: Path, *, source: Path | None = None) -> None:
    """Say before the work what would fail after it.

    Raises:
        InputError: `path` cannot be written, or is the very file that is read.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: the folder must exist and be writable, and the name must be a file's")
    if source and path.exists() and path.samefile(source):
        raise InputError(f"cannot write {path}: it is the video that is read")


def check_folder(folder: Path) -> None:
    """Make a folder for what comes.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None


def write(out: Path | None, text: str) -> None:
    """All of it or nothing: a file appears when it is whole. None is stdout; pipes and devices are written as they are.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if out is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif out.exists() and not out.is_file():
            out.write_text(text, encoding="utf-8")
        else:
            part = out.with_name(f".part-{os.getpid()}")
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(out)
            finally:
                part.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {out or 'stdout'}: {error.strerror}") from None
