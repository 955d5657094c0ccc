"""The body of a push, read from disk as it is sent and never held in memory."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefixd._checkpoint import files_to_send, is_pickle
from prefixd._errors import CheckpointError

__all__ = ["Progress", "Upload"]

Progress = Callable[[int, int | None], None]
"""Called with the bytes moved so far and their total (None if the server does not say)."""

CHUNK_BYTES = 1 << 20


class Upload:
    """What a push sends: the files, those converted for it, and open handles until ``close``.

    One ``.safetensors`` file goes as it is (``application/octet-stream``). A folder goes as
    ``multipart/form-data``, each file under its own name.
    """

    def __init__(self, path: str | Path, progress: Progress | None = None) -> None:
        self._path = Path(path).expanduser()
        self._progress = progress
        self._resources = ExitStack()
        self._files: list[Path] = []
        self._multipart = False

    def open(self) -> Upload:
        """Select and convert; raises CheckpointError. Slow for pickled weights."""
        if not self._path.exists():
            raise CheckpointError(f"{self._path} does not exist")
        self._multipart = self._path.is_dir() or is_pickle(self._path)
        if not self._multipart:
            self._files = [self._path]
            return self
        with ExitStack() as undo:
            scratch = undo.enter_context(tempfile.TemporaryDirectory(prefix="prefixd-"))
            self._files = files_to_send(self._path, Path(scratch))
            self._resources = undo.pop_all()
        return self

    def close(self) -> None:
        self._resources.close()

    def request(self, *, asynchronous: bool) -> dict[str, Any]:
        """``httpx`` arguments for one attempt: every attempt reads the files from their start."""
        total = sum(file.stat().st_size for file in self._files)
        meter = _Meter(total, self._progress)
        readers = [self._resources.enter_context(_Reader(file, meter)) for file in self._files]
        if self._multipart:
            octets = "application/octet-stream"
            parts = zip(self._files, readers, strict=True)
            return {"files": [("file", (file.name, reader, octets)) for file, reader in parts]}
        (reader,) = readers
        return {
            "content": _chunks_async(reader) if asynchronous else _chunks(reader),
            "headers": {"content-type": "application/octet-stream", "content-length": str(total)},
        }


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Reader(io.FileIO):
    """A file that counts what is read from it."""

    def __init__(self, path: Path, meter: _Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self._meter.add(len(data))
        return data


def _chunks(reader: _Reader) -> Iterator[bytes]:
    while chunk := reader.read(CHUNK_BYTES):
        yield chunk


async def _chunks_async(reader: _Reader) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(reader.read, CHUNK_BYTES):
        yield chunk
