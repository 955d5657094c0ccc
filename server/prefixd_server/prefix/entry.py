"""What residency keeps for one prefix, and what it hands to the engine."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from prefixd_server.errors import InvalidRequest, PrefixdError
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.prefix.lifecycle import NEW, LifeEvent, advance
from prefixd_server.types import PrefixKey, PrefixState, PrefixVersion

__all__ = [
    "Blocked",
    "Entry",
    "Lease",
    "NoObserver",
    "ResidencyObserver",
    "SitePages",
    "Tier",
    "check_size",
    "num_prefix_pages",
]

Tier = Literal["device", "host", "store"]


class ResidencyObserver(Protocol):
    """Told on the engine thread what metrics count; must not block."""

    def hit(self, tier: Tier) -> None:
        """A request arrived and found its prefix no nearer than in ``tier``."""

    def load_seconds(self, tier: Tier, seconds: float) -> None:
        """A load out of ``tier`` took so long: ``store`` → host memory, ``host`` → pages."""

    def eviction(self, tier: Tier) -> None:
        """A prefix lost its pages (``device``) or its host copy (``host``) to others."""


class NoObserver:
    def hit(self, tier: Tier) -> None: ...

    def load_seconds(self, tier: Tier, seconds: float) -> None: ...

    def eviction(self, tier: Tier) -> None: ...


class Blocked(enum.Enum):
    """Why a prefix has no pages yet."""

    LOADING = "it is on its way; others may pass"
    NO_PAGES = "it waits for pages that others lease; whoever comes later should wait too"


class SitePages(NamedTuple):
    """The page list of each site: no page holds tokens of two."""

    decoder: tuple[int, ...] = ()
    encoder: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()


def num_prefix_pages(version: PrefixVersion, page_size: int) -> int:
    return sum(pages_for(length, page_size) for length in version.sites)


def check_size(version: PrefixVersion, allocator: PageAllocator) -> None:
    """Raise InvalidRequest for a prefix that is larger than the whole pool."""
    if num_prefix_pages(version, allocator.page_size) > allocator.num_pages:
        raise InvalidRequest(
            f"version {version.version} of task {version.task!r} has {sum(version.sites)} virtual"
            " tokens; the whole KV cache has room for"
            f" {allocator.num_pages * allocator.page_size}",
            param="task",
        )


class Entry:
    """One prefix of one tenant, however many of its tasks name it."""

    __slots__ = (
        "error",
        "failed_at",
        "leases",
        "life",
        "num_pages",
        "page_size",
        "pages",
        "pins",
        "version",
    )

    def __init__(self, version: PrefixVersion, page_size: int) -> None:
        self.version = version
        """the first that named these bytes; others of the tenant may too"""
        self.life = NEW
        self.pins = 0
        self.leases = 0
        self.pages: tuple[int, ...] = ()
        self.page_size = page_size
        self.num_pages = num_prefix_pages(version, page_size)
        self.error: PrefixdError | None = None
        """why it FAILED"""
        self.failed_at = 0.0
        """time.monotonic()"""

    @property
    def key(self) -> PrefixKey:
        return self.version.key

    @property
    def site_pages(self) -> SitePages:
        lists, start = [], 0
        for length in self.version.sites:
            stop = start + pages_for(length, self.page_size)
            lists.append(self.pages[start:stop])
            start = stop
        return SitePages(*lists)

    @property
    def place(self) -> PrefixState:
        return self.life.place

    @property
    def copying(self) -> bool:
        return self.place is PrefixState.LOADING and bool(self.pages)

    @property
    def fetching(self) -> bool:
        return self.place is PrefixState.LOADING and not self.pages

    @property
    def nearest_tier(self) -> Tier:
        if self.place is PrefixState.DEVICE:
            return "device"
        return "host" if self.copying or self.place is PrefixState.HOST else "store"

    @property
    def held(self) -> bool:
        """A request or a loader thread still counts on it."""
        return bool(self.pins or self.leases) or self.place is PrefixState.LOADING

    def advance(self, event: LifeEvent) -> None:
        life = advance(self.life, event)
        assert life is not None, "who lets an entry vanish removes it"
        self.life = life

    def check(self) -> None:
        assert min(self.pins, self.leases) >= 0
        assert self.pages == () or len(self.pages) == self.num_pages
        assert bool(self.pages) == (self.copying or self.place is PrefixState.DEVICE), self.life
        assert not self.leases or self.place is PrefixState.DEVICE, f"leased, but {self.life}"
        assert self.error is not None or self.place is not PrefixState.FAILED
        assert self.held or not self.life.retiring, f"{self.key} should have vanished"


class Lease:
    """A request's right to attend to a prefix: until :meth:`release`, its pages stay as they are.

    ``pages`` hold the ``num_tokens`` = P tokens of the decoder's self-attention in order, the last
    page mostly in part; ``sites`` has the other sites' page lists too. Engine thread.
    """

    __slots__ = ("_on_release", "key", "num_tokens", "sites")

    def __init__(self, entry: Entry, on_release: Callable[[Entry], None]) -> None:
        self.key = entry.key
        self.sites = entry.site_pages
        self.num_tokens = entry.version.sites.decoder
        self._on_release: Callable[[], None] | None = lambda: on_release(entry)

    @property
    def pages(self) -> tuple[int, ...]:
        return self.sites.decoder

    def release(self) -> None:
        """Idempotent."""
        if self._on_release is not None:
            on_release, self._on_release = self._on_release, None
            on_release()
