"""Files that must survive a crash: each call of the operating system that writes one is here.

What was written is on disk when a function returns, or it raises OSError. A caller whose power
fails in between finds the old state or the new one. Only calls of ``os`` are used, without buffers,
so that a test can let each of them fail, or drop what was not synced before it. One process at a
time writes a file.

Some file systems (SMB, some of FUSE) cannot sync a folder. There a kill loses nothing still, and a
power failure no content of a file, but it may take the newest names: a file that was written anew
may be the old one, and one that was made may be gone. A ledger is made once and then only appended
to, so that it counts every step as long as it is there, and a run without it is refused.
"""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MODE = 0o644

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}
"""What file systems answer that cannot sync a folder; errors of a disk are others."""


def check_system() -> None:
    """Raise OSError where files cannot be kept as a ledger must be."""
    if not all(hasattr(os, name) for name in ("O_NOFOLLOW", "pread", "fork")):
        raise OSError(
            "runs need Linux or macOS, where files are locked and synced as a ledger must be; on "
            "Windows work in WSL"
        )


def lock(descriptor: int) -> None:
    """Lock an open file for this process. Raises BlockingIOError where another one has it."""
    import fcntl  # not on every system that can read a ledger

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Let an OSError say which file it is about, where the system knew a descriptor alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise


def check_writable(name: str, folder: Path) -> None:
    """Raise ValueError, which names the option ``name``, where ``folder`` takes no new file."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} folder {str(folder)!r} takes no file ({error.strerror}); name another"
        ) from error


def check_new_file(name: str, path: str, suffix: str = "") -> Path:
    """The path of a file that is to be written in the end, checked before any work.

    Raises ValueError, which names the option ``name``, where the path does not end in ``suffix``,
    where something is there already, and where its folder is missing or takes no file.
    """
    check_system()
    file = Path(path)
    if suffix and file.suffix.lower() != suffix:
        raise ValueError(f"{name} must end in {suffix}, got {path!r}")
    if os.path.lexists(file):
        raise ValueError(f"{name} {path!r} exists; name a new file, or move the old one away")
    if not file.parent.is_dir():
        raise ValueError(f"{name} folder {str(file.parent)!r} does not exist, or is none")
    check_writable(name, file.parent)
    return file


def write(file: Path, content: bytes) -> None:
    """Put ``content`` in ``file``: all on disk when this returns, or the old file as it was."""
    check_system()
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with naming(file):
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
    check_system()
    descriptor = os.open(
        file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW, _MODE
    )
    try:
        with naming(file):
            append(descriptor, content)
        sync_folder(file.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_log(file: Path) -> int:
    """The descriptor of an existing file, for reading and appending."""
    check_system()
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
    check_system()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if at_most is not None and size > at_most:
            raise ValueError(f"{file} has {size} bytes and should have at most {at_most}")
        with naming(file):
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
    """Make the names in ``folder`` durable, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # it may be written and not listed
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
