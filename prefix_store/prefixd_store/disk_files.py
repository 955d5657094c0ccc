"""Files that are whole or absent: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixd_store.buffers import READ_PIECE, new_buffer
from prefixd_store.errors import CorruptBlob

__all__ = [
    "PIECE",
    "TempFile",
    "fsync_folder",
    "make_folder",
    "read_hashed",
    "stage_copy",
    "sweep",
    "temp_file",
]

PIECE = 8 << 20
"""bytes moved at a time; bounds the memory of a copy"""


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents; the entry of each is durable."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


class TempFile:
    """A file in ``tmp/`` that its writer holds a flock on for as long as it lives."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.published = False

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def publish(self, target: Path) -> None:
        """Make the file durable under its final name, replacing what was there."""
        os.fsync(self.fd)
        os.rename(self.path, target)
        self.published = True
        fsync_folder(target.parent)


@contextmanager
def temp_file(folder: Path) -> Iterator[TempFile]:
    """A new temporary file; gone at the end unless it was published."""
    path, fd = _create_locked(folder)
    file = TempFile(path, fd)
    try:
        yield file
    finally:
        if not file.published:
            path.unlink(missing_ok=True)
        os.close(fd)


def _create_locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / uuid.uuid4().hex
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # a sweep came between the open and the flock


def sweep(folder: Path) -> int:
    """Remove temporary files whose writers are dead; returns bytes freed.

    The kernel drops a flock with its process, so a file that can be locked has no living writer:
    no process ids to be reused, no age to guess.
    """
    freed = 0
    for path in folder.iterdir():
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink and _same_file(path, fd):
                freed += os.fstat(fd).st_size
                path.unlink()
        except (BlockingIOError, FileNotFoundError):
            continue
        finally:
            os.close(fd)
    return freed


def _same_file(path: Path, fd: int) -> bool:
    # False: opened as temporary, but published (renamed away) before it could be locked.
    return path.exists() and os.path.samestat(path.stat(), os.fstat(fd))


def stage_copy(source: Path, file: TempFile, sha256: str) -> None:
    """Copy ``source`` into ``file`` and onto the device; what is published is what was hashed.

    A hard link would be cheaper, but the source stays its owner's to change.
    """
    digest = hashlib.sha256()
    with source.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != sha256:
        raise CorruptBlob(f"{source} hashes to {digest.hexdigest()}, its record says {sha256}")
    os.fsync(file.fd)  # the slow one, before the store's lock is taken


def read_hashed(path: Path, progress: Callable[[int], None] | None) -> tuple[memoryview, str]:
    """The bytes of the file, read once, and their SHA-256. ``progress`` gets each piece's size."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        data = new_buffer(os.fstat(file.fileno()).st_size)
        done = 0
        while done < len(data) and (count := file.readinto(data[done : done + READ_PIECE])):
            digest.update(data[done : done + count])
            done += count
            if progress:
                progress(count)
    return data, digest.hexdigest()
