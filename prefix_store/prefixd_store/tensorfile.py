"""The safetensors container: reading its header with suspicion, writing it reproducibly.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, …}
    the rest  the tensors, back to back, covering every byte

Source: https://github.com/huggingface/safetensors#format. Nothing here knows what a prefix is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixd_store import strict_json
from prefixd_store.arrays import STORAGE, DType, PrefixArray, check_finite
from prefixd_store.errors import InvalidPrefix

__all__ = ["TAGS", "TensorFile", "TensorSpec", "encode_header", "read_header", "write_tensors"]

TAGS: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TAG_OF = {dtype: tag for tag, dtype in TAGS.items()}

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
_MAX_RANK = 16
_MAX_INT = 2**63


@dataclass(frozen=True)
class TensorSpec:
    tag: str
    """safetensors' word for the dtype: ``F32``, ``BF16`` …"""
    shape: tuple[int, ...]
    begin: int
    end: int
    """the tensor's bytes are ``file[begin:end]``"""


@dataclass(frozen=True)
class TensorFile:
    """A header whose tensors are known to tile the rest of the file exactly."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]
    data_start: int


def read_header(path: Path, *, max_header_bytes: int, what: str | None = None) -> TensorFile:
    """Raises :class:`InvalidPrefix`, its message starting with ``what`` (the file's name)."""
    what = what or path.name
    with path.open("rb") as file:
        size = path.stat().st_size
        length = header_length(file.read(8), size, max_header_bytes, what)
        return parse_header(file.read(length), size, what)


def header_length(head: bytes, size: int, max_header_bytes: int, what: str) -> int:
    """The header's length, from the first eight bytes of a file of ``size`` bytes."""
    if len(head) < 8 or size < 10:
        raise InvalidPrefix(f"{what}: {size} bytes is too short for a safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise InvalidPrefix(
            f"{what}: not a safetensors file, or truncated: "
            f"its header should take {length} bytes, the file has {size}"
        )
    if length > max_header_bytes:
        raise InvalidPrefix(f"{what}: header of {length} bytes, at most {max_header_bytes} allowed")
    return length


def parse_header(raw: bytes, size: int, what: str) -> TensorFile:
    """``raw`` is the JSON of a file of ``size`` bytes in all."""
    if not raw.startswith(b"{"):
        raise InvalidPrefix(f"{what}: not a safetensors file: its header is not a JSON object")
    header = strict_json.loads(raw, what=f"{what}: header")
    metadata = _metadata(header.pop("__metadata__", {}), what)
    start = 8 + len(raw)
    tensors = {
        name: _spec(f"{what}: {name[:200]!r}", entry, start) for name, entry in header.items()
    }
    _check_tiling(tensors, start, size, what)
    return TensorFile(metadata, tensors, start)


def _metadata(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidPrefix(f"{what}: __metadata__ must map strings to strings")
    return value


def _spec(what: str, entry: Any, start: int) -> TensorSpec:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidPrefix(f"{what} must have exactly dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str):
        raise InvalidPrefix(f"{what}: dtype must be a string")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise InvalidPrefix(f"{what}: shape must be up to {_MAX_RANK} integers of 0 or more")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidPrefix(f"{what}: data_offsets must be two integers, begin <= end")
    begin, end = offsets
    if tag in _BITS and math.prod(shape) * _BITS[tag] != (end - begin) * 8:
        needed = math.prod(shape) * _BITS[tag] // 8
        raise InvalidPrefix(
            f"{what}: {tag} {shape} takes {needed} bytes, data_offsets span {end - begin}"
        )
    return TensorSpec(tag, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _MAX_INT for v in value)


def _check_tiling(tensors: dict[str, TensorSpec], start: int, size: int, what: str) -> None:
    position = start
    for name, spec in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if spec.begin != position:
            fault = "overlaps the tensor before it" if spec.begin < position else "leaves a gap"
            raise InvalidPrefix(f"{what}: {name[:200]!r} {fault}: it starts at byte {spec.begin}")
        position = spec.end
    if position != size:
        raise InvalidPrefix(
            f"{what}: truncated or padded: {size} bytes, header tells of {position}"
        )


def encode_header(tensors: Mapping[str, PrefixArray], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a file of ``tensors`` in order of name, their data aligned to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, array in sorted(tensors.items()):
        end = position + array.nbytes
        header[name] = {
            "data_offsets": [position, end],
            "dtype": TAG_OF[array.dtype],
            "shape": list(array.shape),
        }
        position = end
    raw = strict_json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(
    path: Path, tensors: Mapping[str, PrefixArray], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file and return its SHA-256; the same arguments give the same bytes.

    Arrays may be strided views of a memory map: one slice of the first axis is in memory at a time.
    Raises :class:`InvalidPrefix` for a value that is not finite; no file is left behind then.
    """
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for part in _parts(tensors, metadata):
                file.write(part)
                digest.update(part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _parts(
    tensors: Mapping[str, PrefixArray], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    yield encode_header(tensors, metadata)
    for name, array in sorted(tensors.items()):
        for i, row in enumerate(array.data):
            part = PrefixArray(np.ascontiguousarray(row, STORAGE[array.dtype]), array.dtype)
            check_finite(name, part, i * part.data.size, array.shape)
            yield part.data.reshape(-1).view(np.uint8).data
