"""Random prefixes of a real one's size, and stores that hold many of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prefixd_store import PrefixArray, write_prefix
from prefixd_store.geometry import Geometry
from prefixd_store.importers import import_checkpoint
from prefixd_store.records import DEFAULT_TENANT
from prefixd_store.store import Store, open_store

__all__ = ["fill_store", "task_names"]


def task_names(number: int, stem: str = "task") -> list[str]:
    return [f"{stem}-{n}" for n in range(number)]


def fill_store(
    folder: Path,
    names: Sequence[str],
    geometry: Geometry,
    num_virtual_tokens: int,
    *,
    versions: int = 1,
    dtype: type[np.floating] = np.float32,
) -> None:
    """Publish a distinct prefix (another file, another hash) as each version of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f"{folder.name}-upload.safetensors"
    store = open_store(str(folder))
    try:
        with _without_fsync():
            for number, name in enumerate(names):
                for version in range(versions):
                    seed = (number, version)
                    _publish(store, name, scratch, seed, geometry, num_virtual_tokens, dtype)
    finally:
        store.close()
        scratch.unlink(missing_ok=True)


def _publish(
    store: Store,
    name: str,
    scratch: Path,
    seed: tuple[int, int],
    geometry: Geometry,
    num_virtual_tokens: int,
    dtype: type[np.floating],
) -> None:
    site = geometry.decoder
    shape = (site.num_layers, site.num_kv_heads, num_virtual_tokens, site.head_dim)
    draw = np.random.default_rng(seed).standard_normal(size=(2, *shape), dtype=np.float32)
    key, value = (draw / 2).astype(dtype)
    tensors = {"decoder.key": PrefixArray.of(key), "decoder.value": PrefixArray.of(value)}
    source = scratch.with_suffix(".source.safetensors")
    write_prefix(source, tensors, query_offset=num_virtual_tokens)
    try:
        found = import_checkpoint({source.name: source}, scratch, geometry=geometry)
        record = found.manifest.version_record(found.sha256, found.bytes)
        store.put_version(DEFAULT_TENANT, name, scratch, record)
    finally:
        source.unlink()


@contextmanager
def _without_fsync() -> Iterator[None]:
    """A benchmark's store need not survive a power cut, and ten thousand uploads need not take
    minutes. The server itself runs with fsync."""
    real = os.fsync
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        os.fsync = real
