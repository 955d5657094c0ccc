"""Our own file, passed through unchanged once it is found sound."""

from __future__ import annotations

import hashlib
from pathlib import Path

from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, validate_file
from prefixd_store.geometry import Geometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.manifest import FORMAT

NAME = "a prefixd safetensors file"

_COPY_BYTES = 4 << 20


def recognise(files: CheckpointFiles) -> bool:
    return bool(_ours(files))


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    found = _ours(files)
    if len(found) > 1:
        raise InvalidPrefix(f"{len(found)} prefixes ({', '.join(found)}); upload one at a time")
    try:
        sha256 = _copy(files.safetensors[found[0]], out)
        # The copy is what gets served, so the copy is what is checked.
        validate_file(out, limits)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return sha256


def _ours(files: CheckpointFiles) -> list[str]:
    return [n for n in files.safetensors if files.header(n).metadata.get("format") == FORMAT]


def _copy(source: Path, out: Path) -> str:
    # A copy, not a hard link: a caller who later edits the source must not change the prefix.
    digest = hashlib.sha256()
    with source.open("rb") as reader, out.open("wb") as writer:
        while chunk := reader.read(_COPY_BYTES):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()
