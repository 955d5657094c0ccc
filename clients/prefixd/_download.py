"""The other end of a pull: a temporary file that becomes the real one only when it is right."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from prefixd._errors import DownloadError, InvalidArgumentError
from prefixd._models import Version
from prefixd._upload import Progress

__all__ = ["Download", "PullFormat"]

PullFormat = Literal["prefixd", "peft"]

# A PEFT folder holds the same tensors, at most in float32, and a small JSON.
_ZIP_GROWTH, _ZIP_SLACK = 4, 1 << 20
# Damaged, encrypted, of an unknown compression, or with one name twice.
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, FileExistsError)


class Download:
    """A context that takes the bytes of ``version`` and leaves ``path`` whole, or untouched.

    ``prefixd`` makes the file ``path`` (replacing one that is there), checked against the version's
    SHA-256. ``peft`` makes the folder ``path``, which must be new or empty.
    """

    def __init__(
        self,
        path: str | Path,
        version: Version,
        format: PullFormat,
        progress: Progress | None = None,
    ) -> None:
        self.path = _destination(Path(path).expanduser(), version, format)
        self._version, self._format, self._progress = version, format, progress
        self._digest = hashlib.sha256()
        self._done = 0
        self._total: int | None = version.bytes if format == "prefixd" else None

    def __enter__(self) -> Download:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the destination, so that the rename at the end stays on one file system.
        self._scratch = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self._file: IO[bytes] = (self._scratch / "download").open("wb")
        self._report()
        return self

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self._done += len(chunk)
        self._report()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            if error is None:
                self._publish(self._scratch / "download")
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _publish(self, downloaded: Path) -> None:
        if self._format == "peft":
            folder = self._scratch / "folder"
            _extract(downloaded, folder, limit=self._version.bytes * _ZIP_GROWTH + _ZIP_SLACK)
            os.replace(folder, self.path)
            return
        if self._digest.hexdigest() != self._version.sha256:
            raise DownloadError(
                f"{self._version.task}@{self._version.version}: the {self._done} bytes received "
                f"have SHA-256 {self._digest.hexdigest()}, expected {self._version.sha256}"
            )
        os.replace(downloaded, self.path)


def _destination(path: Path, version: Version, format: PullFormat) -> Path:
    if format == "prefixd":
        return path / f"{version.task}@{version.version}.safetensors" if path.is_dir() else path
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InvalidArgumentError(f"{path} exists; format 'peft' makes a new folder")
    return path


def _extract(archive: Path, folder: Path, *, limit: int) -> None:
    """Unpack a flat zip of at most ``limit`` bytes; anything else is a DownloadError."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            total = sum(member.file_size for member in members)
            if total > limit:
                raise DownloadError(f"the zip unpacks to {total} bytes, expected at most {limit}")
            for member in members:
                _extract_member(packed, member, folder)
    except _BAD_ZIP as error:
        raise DownloadError(f"the server sent a damaged zip: {error}") from error


def _extract_member(packed: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    name = member.filename
    if member.is_dir() or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise DownloadError(f"the zip holds {name!r}, expected plain file names")
    # Opened and copied rather than extracted: no links, no permissions from the archive.
    with packed.open(member) as source, (folder / name).open("xb") as target:
        shutil.copyfileobj(source, target)
