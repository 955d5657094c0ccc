"""The folder where uploads and downloads lie while they are on their way.

A server that is killed cannot tidy up, and what it leaves may be gigabytes. Each holds a flock on
its own folder, which the kernel drops with the process, so the next one to start knows which are
nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["Spool"]

_PREFIX = "prefixd-spool-"


class Spool:
    """A new, locked folder in ``parent`` (by default the system's for temporary files)."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        _sweep(parent)
        self.path, self._fd = _create_locked(parent)

    def close(self) -> None:
        """Remove the folder and all in it. Idempotent."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def _create_locked(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)
        # A sweep came between the making and the lock.


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        # Somebody is at work in it, it is just being removed, or it is another user's.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
