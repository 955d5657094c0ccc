"""Our file: one safetensors file that holds a prefix. ``docs/formats.md`` shows it byte for byte.

Tensors ``<site>.key`` and ``<site>.value`` of shape [L, H_kv, P, D], keys as attention sees them
(after RoPE). Everything but NaN and infinity is checked from the header alone, before any tensor is
read. What is wrong with a file raises :class:`~prefixd_store.errors.InvalidPrefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixd_store import strict_json
from prefixd_store.arrays import STORAGE, PrefixArray, check_finite
from prefixd_store.errors import InvalidPrefix
from prefixd_store.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TENSOR_SITES,
    Limits,
    PrefixManifest,
    Shape,
    check_size,
    leading_length,
    manifest_of,
)
from prefixd_store.tensorfile import (
    encode_header,
    header_length,
    parse_header,
    read_header,
    write_tensors,
)

__all__ = [
    "Limits",
    "Prefix",
    "PrefixManifest",
    "Shape",
    "leading_length",
    "parse_prefix",
    "read_manifest",
    "validate_file",
    "write_prefix",
]

_SCAN_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Prefix:
    """A parsed file. ``arrays`` are views of the buffer, named ``decoder.key`` and so on."""

    manifest: PrefixManifest
    arrays: dict[str, PrefixArray]


def read_manifest(path: Path, limits: Limits | None = None) -> PrefixManifest:
    """Check all that the header can tell. Raises TooLarge over ``limits.max_bytes``."""
    limits = limits or Limits()
    check_size(path.stat().st_size, limits)
    header = read_header(path, max_header_bytes=limits.max_header_bytes, what="prefix")
    return manifest_of(header, limits)


def validate_file(path: Path, limits: Limits | None = None) -> PrefixManifest:
    """As :func:`read_manifest`, then refuse NaN and infinity, reading a few megabytes at a time."""
    manifest = read_manifest(path, limits)
    chunk = bytearray(_SCAN_BYTES)
    with path.open("rb") as file:
        for name, (begin, end) in sorted(manifest.offsets.items()):
            file.seek(begin)
            for position in range(begin, end, _SCAN_BYTES):
                part = memoryview(chunk)[: min(_SCAN_BYTES, end - position)]
                if file.readinto(part) != part.nbytes:
                    raise InvalidPrefix(f"prefix: the file ends inside {name}")
                array = PrefixArray(np.frombuffer(part, STORAGE[manifest.dtype]), manifest.dtype)
                start = (position - begin) // array.data.itemsize
                check_finite(name, array, start, manifest.sites[TENSOR_SITES[name]])
    return manifest


def parse_prefix(buffer: bytes | bytearray | memoryview, limits: Limits | None = None) -> Prefix:
    """Zero-copy: the arrays share ``buffer``'s memory, and are writable if it is.

    Values are not looked at: whoever stored the bytes ran :func:`validate_file`.
    """
    limits = limits or Limits()
    view = memoryview(buffer).cast("B")
    check_size(view.nbytes, limits)
    length = header_length(bytes(view[:8]), view.nbytes, limits.max_header_bytes, "prefix")
    header = parse_header(bytes(view[8 : 8 + length]), view.nbytes, "prefix")
    manifest = manifest_of(header, limits)
    storage = STORAGE[manifest.dtype]
    arrays = {
        name: PrefixArray(
            np.frombuffer(view[begin:end], storage).reshape(manifest.sites[TENSOR_SITES[name]]),
            manifest.dtype,
        )
        for name, (begin, end) in manifest.offsets.items()
    }
    return Prefix(manifest, arrays)


def write_prefix(
    path: Path,
    tensors: Mapping[str, PrefixArray],
    *,
    query_offset: int,
    base_fingerprint: str | None = None,
    base_model: str | None = None,
    source_format: str = FORMAT,
    provenance: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> str:
    """Write a prefix and return the file's SHA-256; the same arguments give the same bytes.

    ``tensors`` may be strided views ([L, H_kv, P, D] each, P the site's own); one layer is copied
    at a time. ``query_offset`` is 0 or the :func:`leading_length`. Raises :class:`InvalidPrefix`
    for whatever :func:`validate_file` would refuse, leaving no file.
    """
    lengths = {
        TENSOR_SITES[name]: array.shape[2]
        for name, array in tensors.items()
        if name in TENSOR_SITES and len(array.shape) == 4
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_virtual_tokens": str(leading_length(lengths)),
        "query_offset": str(query_offset),
        "source_format": source_format,
        "provenance": strict_json.dumps(dict(provenance or {})),
    }
    if base_fingerprint is not None:
        metadata["base_fingerprint"] = base_fingerprint
    if base_model is not None:
        metadata["base_model"] = base_model
    _check_writable(tensors, metadata, limits or Limits())
    return write_tensors(path, tensors, metadata)


def _check_writable(
    tensors: Mapping[str, PrefixArray], metadata: Mapping[str, str], limits: Limits
) -> None:
    # The reader's own checks, run on the header that is about to be written.
    head = encode_header(tensors, metadata)
    size = len(head) + sum(array.nbytes for array in tensors.values())
    check_size(size, limits)
    header_length(head, size, limits.max_header_bytes, "prefix")
    manifest_of(parse_header(head[8:], size, "prefix"), limits)
