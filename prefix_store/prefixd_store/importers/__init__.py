"""Checkpoints that other libraries save, turned into our format. One module a format.

To add a format, write a module with the members of :class:`Importer` and list it in
:data:`IMPORTERS`. Recognising looks at content; a file's name is only a label. An importer reads
safetensors and JSON: nothing is ever unpickled here, the client converts pickles before it uploads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, PrefixManifest, read_manifest
from prefixd_store.geometry import Geometry, check_fits
from prefixd_store.importers import (
    adapterhub,
    cartridges,
    fastertransformer,
    native,
    paper_bart,
    paper_gpt2,
    peft,
)
from prefixd_store.importers.files import CheckpointFiles, check_file_name

__all__ = ["CheckpointFiles", "ImportResult", "Importer", "check_file_name", "import_checkpoint"]


class Importer(Protocol):
    """What a module of this package offers."""

    @property
    def NAME(self) -> str:
        """The format, in words, for messages."""

    def recognise(self, files: CheckpointFiles) -> bool:
        """Is this checkpoint in this importer's format? True also for one that convert refuses."""

    def convert(self, files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
        """Write ``out`` in our format, all values checked; its SHA-256. Raises InvalidPrefix."""


IMPORTERS: tuple[Importer, ...] = (
    native,
    peft,
    cartridges,
    paper_gpt2,
    paper_bart,
    adapterhub,
    fastertransformer,
)


@dataclass(frozen=True)
class ImportResult:
    manifest: PrefixManifest
    sha256: str
    bytes: int
    verified: bool
    """the prefix names the model's fingerprint; False: it names none"""
    recognised: str
    """the format that the files were found to be in, in words"""


def import_checkpoint(
    files: Mapping[str, Path],
    out: Path,
    *,
    geometry: Geometry,
    fingerprint: str | None = None,
    limits: Limits | None = None,
) -> ImportResult:
    """Write the checkpoint ``files`` (own name → where its bytes are) to ``out`` in our format.

    ``geometry`` and ``fingerprint`` are the frozen LM's. Files that no format needs, such as a
    README.md, are ignored. Raises :class:`InvalidPrefix` (damaged, unknown, unsafe, does not fit)
    or :class:`TooLarge`; ``out`` does not exist then.
    """
    limits = limits or Limits()
    checkpoint = CheckpointFiles(files, limits)
    importer = _importer(checkpoint)
    sha256 = importer.convert(checkpoint, out, geometry, limits)
    try:
        manifest = read_manifest(out, limits)
        verified = check_fits(manifest, geometry, fingerprint)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return ImportResult(manifest, sha256, out.stat().st_size, verified, importer.NAME)


def _importer(files: CheckpointFiles) -> Importer:
    found = [importer for importer in IMPORTERS if importer.recognise(files)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(importer.NAME for importer in found)
        raise InvalidPrefix(f"these files are more than one checkpoint: {names}; upload one")
    known = "; ".join(importer.NAME for importer in IMPORTERS)
    raise InvalidPrefix(f"no known checkpoint among {files.listing()}; known are: {known}")
