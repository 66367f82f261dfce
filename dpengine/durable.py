"""Files that must survive a crash: each call of the operating system that writes one is here.

What was written is on disk when a function returns, or it raises OSError. A caller whose power
fails in between finds the old state or the new one. Only calls of ``os`` are used, without buffers,
so that a test can let each of them fail, or drop what was not synced before it. One process at a
time writes a file.
"""

import contextlib
import os
import secrets
from pathlib import Path

_MODE = 0o644


def write(file: Path, content: bytes) -> None:
    """Put ``content`` in ``file``: all on disk when this returns, or the old file as it was."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, _MODE)
        try:
            append(descriptor, content)
        finally:
            os.close(descriptor)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(file.parent)


def create_log(file: Path, content: bytes) -> int:
    """Make ``file`` for appending, with a beginning. Returns its descriptor.

    Raises FileExistsError where there is one already.
    """
    descriptor = os.open(
        file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW, _MODE
    )
    try:
        append(descriptor, content)
        sync_folder(file.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_log(file: Path) -> int:
    """The descriptor of an existing file, for reading and appending."""
    return os.open(file, os.O_RDWR | os.O_APPEND)


def append(descriptor: int, content: bytes) -> None:
    """Write all of ``content`` and sync it. What was written before an error may stay."""
    rest = memoryview(content)
    while rest:
        written = os.write(descriptor, rest)
        if written == 0:
            raise OSError(f"the last {len(rest)} of {len(content)} bytes could not be written")
        rest = rest[written:]
    os.fsync(descriptor)


def cut(descriptor: int, size: int) -> None:
    """Drop what is behind the first ``size`` bytes."""
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def read(file: Path, at_most: int | None = None) -> bytes:
    """The content of ``file``; raises ValueError, with nothing read, beyond ``at_most`` bytes."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if at_most is not None and size > at_most:
            raise ValueError(f"{file} has {size} bytes and should have at most {at_most}")
        return read_log(descriptor, size)
    finally:
        os.close(descriptor)


def read_log(descriptor: int, size: int) -> bytes:
    """The first ``size`` bytes, or fewer where the file ends before."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, sum(map(len, pieces)))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def remove(file: Path) -> None:
    """Remove ``file``, if it is there. The removal is durable after ``sync_folder``."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, where they are missing.

    One that is there is synced as well: who made it may have been stopped before.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
    sync_folder(folder.parent)


def make_draft(folder: Path) -> Path:
    """A new hidden folder beside ``folder``, to be filled and then moved to its name."""
    draft = folder.with_name(f".run-{secrets.token_hex(8)}")
    os.mkdir(draft)
    return draft


def move_folder(draft: Path, folder: Path) -> None:
    """Give ``draft``, whose files are synced, its name. Raises OSError where it is in use."""
    os.rename(draft, folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
