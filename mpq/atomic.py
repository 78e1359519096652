"""Files appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there; meant to be asked before long work.

    Raises:
        ValueError: if the folder is missing or cannot be written to, or the path is a folder.

    Example:
        >>> check_writable("/no/such/folder/plan.json")
        Traceback (most recent call last):
        ...
        ValueError: cannot write '/no/such/folder/plan.json': the folder '/no/such/folder' does not exist
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {str(target)!r}: the folder {str(folder)!r} does not exist")
    if target.is_dir():
        raise ValueError(f"cannot write {str(target)!r}: it is a folder")
    try:
        os.remove(_beside(target))
    except OSError as error:
        raise ValueError(f"cannot write {str(target)!r}: {error.strerror}") from error
    return target


def _beside(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(handle)
    return Path(name)


def write_atomically(path: str | Path, write: Callable[[Path], object] | str | bytes) -> None:
    """Write a file beside its place and rename it, so that a reader or a crash never sees half of it.

    Args:
        path: where the file shall stand.
        write: its content, or a function that writes it to the path it is given.
    """
    target = check_writable(path)
    partial = _beside(target)
    try:
        if isinstance(write, str):
            partial.write_text(write, encoding="utf-8")
        elif isinstance(write, bytes):
            partial.write_bytes(write)
        else:
            write(partial)
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
