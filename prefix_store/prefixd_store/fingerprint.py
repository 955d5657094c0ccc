"""Which frozen LM is this? A digest of its weights that does not read them all.

Every tensor counts with its name, dtype, shape and the first and last 4 KiB of its bytes, so that
two fine-tunes of one architecture differ, and the same weights in other shards do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from prefixd_store import strict_json
from prefixd_store.errors import InvalidPrefix, InvalidRequest
from prefixd_store.tensorfile import TensorSpec, read_header

__all__ = ["SAMPLE_BYTES", "TensorSample", "fingerprint_folder", "fingerprint_tensors"]

SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_INDEX_BYTES = 100_000_000


class TensorSample(NamedTuple):
    dtype: str
    """as safetensors spells it: ``F32``, ``BF16`` …"""
    shape: tuple[int, ...]
    head: bytes
    """the first SAMPLE_BYTES bytes, little-endian and row-major"""
    tail: bytes
    """the last SAMPLE_BYTES bytes; of a small tensor both are all of it"""


def fingerprint_tensors(tensors: Mapping[str, TensorSample]) -> str:
    """64 hexadecimal digits; the order of ``tensors`` does not matter."""
    digest = hashlib.sha256(b"prefixd base fingerprint 1\n")
    for name, sample in sorted(tensors.items()):
        label = strict_json.dumps([name, sample.dtype, list(sample.shape)]).encode()
        for part in (label, sample.head, sample.tail):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def fingerprint_folder(path: Path) -> str:
    """Fingerprint the safetensors weights of a model folder.

    They are the shards that ``model.safetensors.index.json`` names, else ``model.safetensors``,
    else all ``*.safetensors``. Raises :class:`InvalidRequest` if there are none or one is damaged.
    """
    shards = _shards(path)
    if not shards:
        raise InvalidRequest(f"{path} has no *.safetensors to fingerprint", param="model")
    samples: dict[str, TensorSample] = {}
    for shard in shards:
        for name, sample in _read_samples(shard).items():
            if name in samples:
                raise InvalidRequest(f"{shard}: tensor {name!r} is in two shards", param="model")
            samples[name] = sample
    return fingerprint_tensors(samples)


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in _index_shards(index)]
    single = path / "model.safetensors"
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


def _index_shards(index: Path) -> list[str]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise InvalidRequest(f"{index} is over {_MAX_INDEX_BYTES} bytes", param="model")
    try:
        weight_map = strict_json.loads(index.read_bytes(), what=str(index)).get("weight_map")
    except InvalidPrefix as error:
        raise InvalidRequest(error.message, param="model") from None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise InvalidRequest(f"{index}: weight_map must map tensors to file names", param="model")
    return sorted(set(weight_map.values()))


def _read_samples(shard: Path) -> dict[str, TensorSample]:
    try:
        header = read_header(shard, max_header_bytes=_MAX_HEADER_BYTES, what=str(shard))
        with shard.open("rb") as file:
            return {
                name: TensorSample(
                    spec.tag,
                    spec.shape,
                    _read(file, spec, spec.begin),
                    _read(file, spec, max(spec.begin, spec.end - SAMPLE_BYTES)),
                )
                for name, spec in header.tensors.items()
            }
    except InvalidPrefix as error:
        raise InvalidRequest(error.message, param="model") from None
    except OSError as error:
        raise InvalidRequest(f"cannot read {shard}: {error.strerror}", param="model") from error


def _read(file: BinaryIO, spec: TensorSpec, begin: int) -> bytes:
    file.seek(begin)
    return file.read(min(SAMPLE_BYTES, spec.end - begin))
