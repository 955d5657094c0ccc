"""Blobs in Redis: chunks under keys of their own, listed in the metadata of redis_scripts.py."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prefixd_store.buffers import new_buffer
from prefixd_store.errors import CorruptBlob
from prefixd_store.redis_scripts import RETIRE, TOUCH

__all__ = ["Blobs", "Copy"]

_RETIRE_LIMIT = 1000
# A copy given up stays listed so long: a writer that did not know may have added a chunk.
_DEAD_SECONDS = 60.0


class Copy(NamedTuple):
    """One upload of one blob."""

    tenant: str
    sha256: str
    upload: str
    chunks: int
    bytes: int

    @classmethod
    def parse(cls, text: str) -> Copy:
        tenant, sha256, upload, chunks, size = text.split(":")
        return cls(tenant, sha256, upload, int(chunks), int(size))

    @property
    def field(self) -> str:
        return f"{self.tenant}:{self.sha256}"

    @property
    def meta(self) -> str:
        return f"{self.upload}:{self.chunks}:{self.bytes}"

    def __str__(self) -> str:
        return f"{self.field}:{self.meta}"


class Blobs:
    def __init__(self, client: Any, namespace: str, keys: dict[str, str], chunk_bytes: int) -> None:
        self._client = client
        self._namespace = namespace
        self._keys = keys
        self._chunk_bytes = chunk_bytes

    def find(self, tenant: str, sha256: str) -> Copy | None:
        field = f"{tenant}:{sha256}"
        meta = self._client.hget(self._keys["blobs"], field)
        return Copy.parse(f"{field}:{meta.decode()}") if meta else None

    def is_whole(self, copy: Copy) -> bool:
        """Whether every chunk is there, by their lengths."""
        lengths: list[int] = [self._client.strlen(key) for key in self._chunk_keys(copy)]
        return sum(lengths) == copy.bytes

    def upload(self, tenant: str, sha256: str, source: Path) -> Copy | None:
        """Write ``source`` as a copy that nothing uses yet; None if it was collected meanwhile.

        It is listed before its first chunk, so that garbage collection finds what a writer that
        dies, or whose publication is refused, leaves behind.
        """
        with source.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            chunks = -(-size // self._chunk_bytes)
            copy = Copy(tenant, sha256, uuid.uuid4().hex, chunks, size)
            self._touch(copy, "start")
            digest = hashlib.sha256()
            for key in self._chunk_keys(copy):
                chunk = stream.read(self._chunk_bytes)
                digest.update(chunk)
                self._client.set(key, chunk)
                if not self._touch(copy, "alive"):
                    self.unlink(copy)
                    return None
        if digest.hexdigest() != sha256:
            self.unlink(copy)
            raise CorruptBlob(f"{source} hashes to {digest.hexdigest()}, its record says {sha256}")
        return copy

    def read(self, copy: Copy, progress: Callable[[int], None] | None) -> memoryview | None:
        """The bytes, None if a chunk is missing; CorruptBlob if they are not those of the hash."""
        digest = hashlib.sha256()
        data = new_buffer(copy.bytes)
        done = 0
        for key in self._chunk_keys(copy):
            chunk = self._client.get(key)
            if chunk is None:
                return None
            digest.update(chunk)
            room = data[done : done + len(chunk)]
            room[:] = chunk[: len(room)]  # a longer one is damaged, which the hash tells
            done += len(chunk)
            if progress:
                progress(len(chunk))
        if digest.hexdigest() != copy.sha256:
            raise CorruptBlob(
                f"blob {copy.sha256} of tenant {copy.tenant} ({done} bytes in {copy.chunks} chunks "
                f"{self._chunk_key(copy, '*')}) hashes to {digest.hexdigest()}, not to its name"
            )
        return data

    def collect(self, grace_seconds: float) -> int:
        """Free the chunks of blobs released and uploads silent for so long; returns bytes freed."""
        handled, now = self._retire(grace_seconds)
        while handled:
            handled, now = self._retire(grace_seconds)
        freed = 0
        for member, given_up in self._client.zrange(self._keys["dead"], 0, -1, withscores=True):
            freed += self.unlink(Copy.parse(member.decode()))
            if given_up < now - _DEAD_SECONDS:
                self._client.zrem(self._keys["dead"], member)
        return freed

    def unlink(self, copy: Copy) -> int:
        freed = 0
        for key in self._chunk_keys(copy):
            size = self._client.strlen(key)
            freed += size if self._client.unlink(key) else 0
        return freed

    def _retire(self, grace_seconds: float) -> tuple[int, float]:
        handled, now = self._eval(RETIRE, grace_seconds, _RETIRE_LIMIT)
        return int(handled), float(now)

    def _touch(self, copy: Copy, what: str) -> bool:
        return bool(self._eval(TOUCH, str(copy), what))

    def _eval(self, script: str, *args: Any) -> Any:
        return self._client.eval(script, len(self._keys), *self._keys.values(), *args)

    def _chunk_keys(self, copy: Copy) -> list[str]:
        return [self._chunk_key(copy, i) for i in range(copy.chunks)]

    def _chunk_key(self, copy: Copy, index: int | str) -> str:
        return f"{self._namespace}:blob:{copy.tenant}:{copy.sha256}:{copy.upload}:{index}"
