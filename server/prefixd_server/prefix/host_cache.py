"""Prefixes in host memory: a byte-bounded LRU. Engine thread only; knows no states and no pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from prefixd_server.types import PrefixKey
from prefixd_store.records import Site

__all__ = ["HostCache", "HostPrefix"]


@dataclass(frozen=True, eq=False)
class HostPrefix:
    """The KV of a prefix, ready to be copied into pages.

    ``sites`` maps a site to its key and value, each a [L, H_kv, P, D] view of one buffer of
    ``nbytes`` bytes (the file, which they keep alive); bfloat16 is held as uint16 bit patterns.
    """

    sites: Mapping[Site, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    dtype: str
    nbytes: int


class HostCache:
    def __init__(self, max_bytes: int) -> None:
        assert max_bytes >= 0
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._prefixes: OrderedDict[PrefixKey, HostPrefix] = OrderedDict()

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def put(self, key: PrefixKey, prefix: HostPrefix) -> list[tuple[PrefixKey, HostPrefix]] | None:
        """Keep ``prefix`` as the most recent; returns what had to go, least recent first.

        None, with nothing changed, if it is larger than the whole cache.
        """
        assert key not in self._prefixes, f"{key} is cached twice"
        if prefix.nbytes > self.max_bytes:
            return None
        self._prefixes[key] = prefix
        self.num_bytes += prefix.nbytes
        dropped = []
        while self.num_bytes > self.max_bytes:
            old_key, old = self._prefixes.popitem(last=False)
            self.num_bytes -= old.nbytes
            dropped.append((old_key, old))
        return dropped

    def get(self, key: PrefixKey) -> HostPrefix | None:
        """The prefix, now the most recent; None if it is not here."""
        prefix = self._prefixes.get(key)
        if prefix is not None:
            self._prefixes.move_to_end(key)
        return prefix

    def discard(self, key: PrefixKey) -> None:
        prefix = self._prefixes.pop(key, None)
        if prefix is not None:
            self.num_bytes -= prefix.nbytes

    def check(self) -> None:
        """Assert that the bytes are accounted for and within bounds."""
        assert self.num_bytes == sum(prefix.nbytes for prefix in self._prefixes.values())
        assert 0 <= self.num_bytes <= self.max_bytes
