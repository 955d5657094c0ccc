"""Full pages that can be found again by what they hold. Integers and digests, no tensors.

A page is named by a chained SHA-256: of its own tokens, the name of the page before it and, at the
beginning of the chain, of all else that its keys and values depend on (the ``root``). So one name
stands for the whole history up to the page's end, as in vLLM's automatic prefix caching.

The cache owns no page. While some sequence does, others may share it; after that it stays until the
allocator gives it to somebody else.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from prefixd_server.kv.allocator import PageAllocator

__all__ = ["PageCache", "page_key"]


def page_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a page that holds ``token_ids`` after the page, or the root, ``previous``."""
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()


class PageCache:
    def __init__(self, allocator: PageAllocator) -> None:
        self.num_evictions = 0
        self._allocator = allocator
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        allocator.forget = self._forget

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first so many ``keys`` that are here, each with one owner more."""
        pages: list[int] = []
        for key in keys:
            if key not in self._pages:
                break
            pages.append(self._pages[key])
        self._allocator.share(pages)
        return pages

    def put(self, key: bytes, page: int) -> None:
        """An owned page holds what ``key`` names, and is never written again while it is owned.

        Where another page is known to hold the same, that one stays the one to be found.
        """
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key
            self._allocator.keep(page)

    def drop(self, keys: Iterable[bytes]) -> None:
        """What ``keys`` name must not be found any more."""
        for key in keys:
            if key in self._pages:
                page = self._pages.pop(key)
                del self._keys[page]
                self._allocator.discard(page)

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
        self.num_evictions += 1

    def check(self) -> None:
        assert self._keys == {page: key for key, page in self._pages.items()}
        self._allocator.check_kept(self._keys)
