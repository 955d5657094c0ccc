"""Which prefixes own pages of the KV pool, least recently used first. Integers only; engine thread.

An entry owns its pages from the moment they are reserved for the copy until it is evicted or gone.
One that is leased or being copied is in use; all others are idle, and only those are evicted. What
an eviction costs depends on its victims alone, not on how many prefixes are here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

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
        self._allocator = allocator
        self._max_prefixes = max_prefixes
        self._evicted = evicted
        self.num_pages = 0
        """that the entries own"""
        self._entries: dict[PrefixKey, Entry] = {}
        self._pinned: set[PrefixKey] = set()
        """the prefixes of pinned tasks, here or not"""
        self._resident_pinned = _Group()
        self._idle = _Group()
        """of tasks that are not pinned; the longest idle first"""
        self._idle_pinned = _Group()

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, entry: Entry, *, force: bool) -> bool:
        """Give ``entry`` the pages it needs, evicting others. All or nothing. It is in use."""
        assert not entry.pages
        if not self.make_room(entry.num_pages, 1, force=force):
            return False
        pages = self._allocator.allocate(entry.num_pages)
        assert pages is not None
        entry.pages = tuple(pages)
        self.num_pages += entry.num_pages
        self._entries[entry.key] = entry
        if entry.key in self._pinned:
            self._resident_pinned.add(entry)
        return True

    def give_back(self, entry: Entry) -> None:
        """Take an entry's pages, if it has any."""
        if entry.pages:
            assert not entry.leases, f"{entry.key} loses leased pages"
            del self._entries[entry.key]
            self._leave_groups(entry)
            self.num_pages -= entry.num_pages
            self._allocator.release(entry.pages)
            entry.pages = ()

    def use(self, entry: Entry) -> None:
        """It is leased from now on: not to be evicted."""
        self._idle_group(entry.key).discard(entry)

    def rest(self, entry: Entry) -> None:
        """It is idle from now on, and the most recently used."""
        self._idle_group(entry.key).add(entry)

    def set_pinned(self, key: PrefixKey, pinned: bool) -> None:
        """Whether it is the prefix of a pinned task. One that is idle is the most recent then."""
        entry, idle = self._entries.get(key), key in self._idle_group(key)
        if entry is not None:
            self._leave_groups(entry)
        (self._pinned.add if pinned else self._pinned.discard)(key)
        if entry is not None and pinned:
            self._resident_pinned.add(entry)
        if entry is not None and idle:
            self.rest(entry)

    def make_room(self, num_pages: int, num_prefixes: int = 0, *, force: bool = False) -> bool:
        """Evict until so much is free; False, evicting nothing, if that cannot be had.

        Prefixes of pinned tasks go last, and only with ``force`` or where they leave no room that
        others could ever make.
        """
        short_pages = num_pages - self._allocator.num_free
        short_prefixes = num_prefixes + len(self._entries) - self._max_prefixes
        if short_pages <= 0 and short_prefixes <= 0:
            return True
        groups = [self._idle]
        if force or not self._fits_beside_pinned(num_pages, num_prefixes):
            groups.append(self._idle_pinned)
        if short_pages > sum(group.num_pages for group in groups):
            return False
        if short_prefixes > sum(map(len, groups)):
            return False
        victims: list[Entry] = []
        for entry in chain.from_iterable(groups):
            if short_pages <= 0 and short_prefixes <= 0:
                break
            victims.append(entry)
            short_pages -= len(entry.pages)
            short_prefixes -= 1
        for entry in victims:
            self.give_back(entry)
            self._evicted(entry)
        return True

    def _fits_beside_pinned(self, num_pages: int, num_prefixes: int) -> bool:
        pinned = self._resident_pinned
        return (
            pinned.num_pages + num_pages <= self._allocator.num_pages
            and len(pinned) + num_prefixes <= self._max_prefixes
        )

    def _leave_groups(self, entry: Entry) -> None:
        for group in (self._idle, self._idle_pinned, self._resident_pinned):
            group.discard(entry)

    def _idle_group(self, key: PrefixKey) -> _Group:
        return self._idle_pinned if key in self._pinned else self._idle

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
            idle = entry.place is PrefixState.DEVICE and not entry.leases
            pinned = key in self._pinned
            assert (key in self._idle) == (idle and not pinned), f"{key}: {entry.life}"
            assert (key in self._idle_pinned) == (idle and pinned), f"{key}: {entry.life}"
            assert (key in self._resident_pinned) == pinned
        for group in (self._idle, self._idle_pinned, self._resident_pinned):
            group.check(self._entries)
        pages = [page for entry in self._entries.values() for page in entry.pages]
        assert len(set(pages)) == len(pages) == self.num_pages, "two prefixes own one page"


class _Group:
    """Entries in the order in which they came, and how many pages they own."""

    def __init__(self) -> None:
        self.num_pages = 0
        self._entries: OrderedDict[PrefixKey, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def add(self, entry: Entry) -> None:
        if entry.key not in self._entries:
            self._entries[entry.key] = entry
            self.num_pages += entry.num_pages

    def discard(self, entry: Entry) -> None:
        if self._entries.pop(entry.key, None) is not None:
            self.num_pages -= entry.num_pages

    def check(self, resident: dict[PrefixKey, Entry]) -> None:
        assert all(resident.get(key) is entry for key, entry in self._entries.items())
        assert self.num_pages == sum(entry.num_pages for entry in self)
