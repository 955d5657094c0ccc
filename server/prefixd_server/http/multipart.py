"""Uploads on their way to disk: checked for size as they arrive, never held in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from prefixd_server.errors import InvalidPrefix
from prefixd_server.http.errors import Malformed, UnsupportedMediaType, shown
from prefixd_server.http.route import limited_body
from prefixd_store.importers import check_file_name

__all__ = ["spool_upload"]

MAX_PARTS = 16
_BATCH = 1 << 20


async def spool_upload(request: Request, folder: Path, limit: int) -> dict[str, Path]:
    """Write the body's files into ``folder``; returns the client's name of each → its path.

    The names are only labels: the files are called part-0, part-1 … on disk. Raises
    UnsupportedMediaType, TooLarge, Malformed, InvalidPrefix, ClientDisconnected.
    """
    sink = _sink(request.headers.get("content-type", ""), folder)
    try:
        async for batch in _batched(limited_body(request, limit)):
            await asyncio.to_thread(sink.feed, batch)
        return sink.finish()
    finally:
        sink.close()


async def _batched(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A thread hop for each chunk off the socket would cost more than the writing."""
    batch = bytearray()
    async for chunk in chunks:
        batch += chunk
        if len(batch) >= _BATCH:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)


class _Sink(Protocol):
    def feed(self, data: bytes) -> None: ...
    def finish(self) -> dict[str, Path]: ...
    def close(self) -> None: ...


def _sink(content_type: str, folder: Path) -> _Sink:
    kind, options = parse_options_header(content_type)
    if kind == b"application/octet-stream":
        return _FileSink(folder / "part-0")
    if kind == b"multipart/form-data":
        return _MultipartSink(folder, options.get(b"boundary", b""))
    raise UnsupportedMediaType(
        f"content type {shown(content_type)}; expected application/octet-stream (a prefix file) "
        "or multipart/form-data (a checkpoint's files)"
    )


class _FileSink:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def feed(self, data: bytes) -> None:
        self._file.write(data)

    def finish(self) -> dict[str, Path]:
        self._file.close()
        return {"prefix.safetensors": self._path}

    def close(self) -> None:
        self._file.close()


class _MultipartSink:
    """One file a part, written while it is parsed."""

    def __init__(self, folder: Path, boundary: bytes) -> None:
        if not boundary:
            raise Malformed("multipart/form-data needs a boundary", param="body")
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._file: BinaryIO | None = None
        self._field, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._add(
                        self._field, data[start:end]
                    ),
                    "on_header_value": lambda data, start, end: self._add(
                        self._value, data[start:end]
                    ),
                    "on_header_end": self._header,
                    "on_headers_finished": self._open,
                    "on_part_data": self._write,
                    "on_part_end": self.close,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise Malformed(f"multipart boundary: {error}", param="body") from None

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Malformed(f"malformed multipart body: {error}", param="body") from None

    def finish(self) -> dict[str, Path]:
        if not self._ended:
            raise Malformed("the multipart body ends before its last boundary", param="body")
        if not self._files:
            raise InvalidPrefix("the upload has no files", param="body")
        return self._files

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        if len(self._files) >= MAX_PARTS:
            raise InvalidPrefix(f"over {MAX_PARTS} parts in one upload", param="body")
        self._disposition = b""

    @staticmethod
    def _add(to: bytearray, data: bytes) -> None:
        to += data

    def _header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _open(self) -> None:
        name = _file_name(self._disposition)
        if name in self._files:
            raise InvalidPrefix(f"two files are called {shown(name)}", param="filename")
        path = self._folder / f"part-{len(self._files)}"
        self._files[name] = path
        self._file = path.open("wb")

    def _write(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._ended = True


def _file_name(disposition: bytes) -> str:
    options = parse_options_header(disposition)[1]
    raw = options.get(b"filename")
    if raw is None:
        field = options.get(b"name", b"").decode("utf-8", "replace")
        raise InvalidPrefix(
            f"part {shown(field)} has no file name; every part is a file", param="filename"
        )
    try:
        return check_file_name(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InvalidPrefix(f"file name {shown(raw)} is not UTF-8", param="filename") from None
