"""Which prefixes own pages of the KV pool, least recently used first. Integers only; engine thread.

An entry owns its pages from the moment they are reserved for the copy until it is evicted or gone.
A leased one, or one that is being copied, is never evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.prefix.entry import Entry
from prefixd_server.types import PrefixKey, PrefixState

__all__ = ["DeviceTier"]


class DeviceTier:
    """At most ``max_prefixes`` entries. ``evicted`` is called for each that had to go."""

    def __init__(
        self, allocator: PageAllocator, max_prefixes: int, evicted: Callable[[Entry], None]
    ) -> None:
        assert max_prefixes > 0
        self.pinned: frozenset[PrefixKey] = frozenset()
        """the prefixes of pinned tasks"""
        self._allocator = allocator
        self._max_prefixes = max_prefixes
        self._evicted = evicted
        self._entries: OrderedDict[PrefixKey, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, entry: Entry, *, force: bool) -> bool:
        """Give ``entry`` the pages it needs, evicting others. All or nothing."""
        assert not entry.pages
        if not self.make_room(entry.num_pages, 1, force=force):
            return False
        pages = self._allocator.allocate(entry.num_pages)
        assert pages is not None
        entry.pages = tuple(pages)
        self._entries[entry.key] = entry
        return True

    def give_back(self, entry: Entry) -> None:
        """Take an entry's pages, if it has any."""
        if entry.pages:
            assert not entry.leases, f"{entry.key} loses leased pages"
            del self._entries[entry.key]
            self._allocator.release(entry.pages)
            entry.pages = ()

    def touch(self, entry: Entry) -> None:
        self._entries.move_to_end(entry.key)

    def make_room(self, num_pages: int, num_prefixes: int = 0, *, force: bool = False) -> bool:
        """Evict until so much is free; False, evicting nothing, if that cannot be had."""
        short_pages = num_pages - self._allocator.num_free
        short_prefixes = num_prefixes + len(self._entries) - self._max_prefixes
        victims: list[Entry] = []
        if short_pages > 0 or short_prefixes > 0:
            for entry in self._idle(num_pages, num_prefixes, force):
                victims.append(entry)
                short_pages -= len(entry.pages)
                short_prefixes -= 1
                if short_pages <= 0 and short_prefixes <= 0:
                    break
            else:
                return False
        for entry in victims:
            self.give_back(entry)
            self._evicted(entry)
        return True

    def _idle(self, num_pages: int, num_prefixes: int, force: bool) -> Iterator[Entry]:
        """Whom to evict, in order: pinned tasks' prefixes last, and only if they must."""
        entries = self._entries.values()
        idle = [e for e in entries if e.place is PrefixState.DEVICE and not e.leases]
        yield from (entry for entry in idle if entry.key not in self.pinned)
        if force or not self._fits_beside_pinned(num_pages, num_prefixes):
            yield from (entry for entry in idle if entry.key in self.pinned)

    def _fits_beside_pinned(self, num_pages: int, num_prefixes: int) -> bool:
        pinned = [entry for entry in self._entries.values() if entry.key in self.pinned]
        taken = sum(len(entry.pages) for entry in pinned)
        return (
            taken + num_pages <= self._allocator.num_pages
            and len(pinned) + num_prefixes <= self._max_prefixes
        )

    def owned_pages(self) -> Iterator[tuple[int, ...]]:
        """One page list per entry, for :meth:`PageAllocator.check`."""
        return iter([entry.pages for entry in self._entries.values()])

    def check(self) -> None:
        assert len(self._entries) <= self._max_prefixes
        for key, entry in self._entries.items():
            assert entry.key == key
            assert entry.copying or entry.place is PrefixState.DEVICE, f"{key}: {entry.life}"
            assert len(entry.pages) == entry.num_pages, f"{key} owns {entry.pages}"
            assert all(self._allocator.references(page) > 0 for page in entry.pages)
        pages = [page for entry in self._entries.values() for page in entry.pages]
        assert len(set(pages)) == len(pages), "two prefixes own one page"
