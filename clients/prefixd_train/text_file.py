"""Files that a user names: texts whole, in UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

from prefixd_train.errors import DataError

__all__ = ["check_is_file", "read_text", "without_mark"]


def read_text(path: Path) -> str:
    """Raises DataError for a folder, what is not UTF-8 and nothing but space; OSError."""
    check_is_file(path)
    try:
        text = without_mark(path.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def check_is_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder; a file is needed")


def without_mark(data: bytes) -> bytes:
    """Some editors begin a file with U+FEFF, which is no part of its text."""
    return data.removeprefix(codecs.BOM_UTF8)
