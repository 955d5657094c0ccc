"""Where each prefix is: store → host memory → pages of the KV pool.

Who holds what, and who lets go::

    request ──pin───▶ entry      the identity: a retiring prefix stays usable, a load is wanted
    request ──lease─▶ pages      the memory: a leased prefix is never evicted
    device  ──owns──▶ pages      one reference each in the allocator, however many leases
    cache   ──owns──▶ host copy  up to ``host_cache_bytes``; the least recently used goes first
    transit ──owns──▶ host copy  one the cache has no room for, while a pinned request waits for
                                 pages; loads pause while there are ``load_threads`` of these

All of it runs on the engine thread but the loading itself (loader.py), which reports through an
inbox that :meth:`Residency.poll` empties. Nothing here blocks or holds a lock: a slow load delays
only the requests that want that prefix. At most ``load_threads`` loads from the store run at once;
more slow ones than that queue, first come, first served. Copies into pages have a thread of their
own, so that what is in host memory never waits for the store.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import NamedTuple, TypeVar

from prefixd_server.config import CacheConfig
from prefixd_server.errors import PrefixdError
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.prefix.device_tier import DeviceTier
from prefixd_server.prefix.entry import (
    Blocked,
    Entry,
    Lease,
    NoObserver,
    ResidencyObserver,
    Tier,
    check_size,
)
from prefixd_server.prefix.host_cache import HostCache, HostPrefix
from prefixd_server.prefix.lifecycle import LifeEvent, advance
from prefixd_server.prefix.load_queue import LoadQueue
from prefixd_server.prefix.loader import Completion, Copied, Fetched, Loader, LoadFailed, PrefixPool
from prefixd_server.types import PrefixKey, PrefixState, PrefixVersion
from prefixd_store.format import Limits
from prefixd_store.geometry import Geometry
from prefixd_store.store import Store

__all__ = ["Residency"]

_T = TypeVar("_T")


class _Retire(NamedTuple):
    key: PrefixKey


class _SetPinned(NamedTuple):
    key: PrefixKey
    pinned: bool


_Message = Completion | _Retire | _SetPinned


class Residency:
    """``wake`` is called on whatever thread has left something to :meth:`poll`.

    ``executor`` replaces the loader threads (tests run its jobs by hand); the caller shuts it down.
    """

    def __init__(
        self,
        store: Store,
        allocator: PageAllocator,
        pool: PrefixPool,
        *,
        geometry: Geometry,
        fingerprint: str | None = None,
        cache: CacheConfig,
        load_timeout_s: float = 30.0,
        limits: Limits | None = None,
        wake: Callable[[], None] = lambda: None,
        observer: ResidencyObserver | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._load_retry_s = cache.load_retry_s
        self._allocator = allocator
        self._wake = wake
        self._observer: ResidencyObserver = observer or NoObserver()
        self._entries: dict[PrefixKey, Entry] = {}
        self._device = DeviceTier(allocator, cache.max_device_prefixes, self._evicted)
        self._cache = HostCache(cache.host_cache_bytes)
        self._transit: dict[PrefixKey, HostPrefix] = {}
        self._failures: deque[Entry] = deque()
        """FAILED entries, kept so that their error is told until a retry is due; oldest first"""
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        loader = Loader(
            store, pool, geometry=geometry, fingerprint=fingerprint, limits=limits, done=self._post
        )
        self._loads = LoadQueue(
            loader, max_fetches=cache.load_threads, timeout_s=load_timeout_s, executor=executor
        )
        self._engine_thread: int | None = None
        self._closed = False

    # --- any thread ------------------------------------------------------------------------------
    def state(self, key: PrefixKey) -> PrefixState:
        entry = self._entries.get(key)
        return entry.life.state if entry else PrefixState.STORED

    @property
    def resident(self) -> dict[Tier, int]:
        """How many prefixes each tier holds; one with a copy in both counts in both."""
        return {"device": len(self._device), "host": len(self._cache) + len(self._transit)}

    @property
    def host_bytes(self) -> int:
        """What the prefixes in host memory take."""
        return self._cache.num_bytes + sum(p.nbytes for p in list(self._transit.values()))

    @property
    def device_pages(self) -> int:
        """Pages that prefixes own."""
        return self._device.num_pages

    @property
    def loads(self) -> dict[str, int]:
        return self._loads.counts

    def retire(self, key: PrefixKey) -> None:
        """No version names it any more: once nothing holds it, from the next poll on, it goes."""
        self._post(_Retire(key))

    def set_pinned(self, key: PrefixKey, pinned: bool) -> None:
        """Whether a pinned task's traffic goes to it, from the next poll on (:meth:`make_room`)."""
        self._post(_SetPinned(key, pinned))

    # --- the engine ------------------------------------------------------------------------------
    def pin(self, version: PrefixVersion) -> None:
        """A live request holds the identity; the prefix is fetched if it is only in the store.

        Raises InvalidRequest, holding nothing, for a prefix larger than the whole KV cache.
        """
        entry = self._enter(version)
        self._observer.hit(entry.nearest_tier)
        entry.pins += 1
        if entry.life.retiring:
            entry.advance(LifeEvent.REVIVE)  # it was resolved just now, so a version names it
        self._want(entry)

    def unpin(self, key: PrefixKey) -> None:
        self._assert_engine_thread()
        if self._closed:
            return
        entry = self._entries[key]
        assert entry.pins > 0, f"{key} is unpinned more often than pinned"
        entry.pins -= 1
        self._settle(entry)
        self._start_fetches()

    def prefetch(self, version: PrefixVersion) -> None:
        """Fetch the prefix into host memory, once however many ask. Raises as :meth:`pin`."""
        self._want(self._enter(version))

    def acquire(self, key: PrefixKey, *, force: bool = False) -> Lease | Blocked:
        """Lease a pinned prefix, or say why it has no pages yet (ask again after a poll).

        On HOST, reserves all pages it needs or none. Raises the load's error if that failed.
        """
        self._assert_engine_thread()
        entry = self._entries[key]
        assert entry.pins > 0, f"{key} is acquired without a pin"
        if entry.place is PrefixState.DEVICE:
            return self._lease(entry)
        if entry.place is PrefixState.FAILED:
            assert entry.error is not None
            raise copy.copy(entry.error)  # tracebacks must not pile up on the one we keep
        if entry.place is PrefixState.HOST and not self._start_copy(entry, force):
            return Blocked.NO_PAGES
        self._want(entry)
        return Blocked.LOADING

    def make_room(self, num_pages: int, *, force: bool = False) -> bool:
        """Have ``num_pages`` pages free, evicting prefixes that nobody leases, least recent first.

        False, evicting nothing, if that would not be enough. Prefixes of pinned tasks are spared as
        long as they and ``num_pages`` fit the pool together; ``force`` evicts them too, for a
        request that runs alone and could otherwise never go on.
        """
        self._assert_engine_thread()
        return self._device.make_room(num_pages, force=force)

    def poll(self) -> None:
        """Take in what threads have finished or asked for, and start the loads that waited."""
        self._assert_engine_thread()
        for message in _drain(self._inbox):
            match message:
                case _Retire(key):
                    self._retire(key)
                case _SetPinned(key, pinned):
                    self._device.set_pinned(key, pinned)
                case _:
                    self._complete(message)
        self._forget_failures()
        self._start_fetches()

    def owned_pages(self) -> Iterator[tuple[int, ...]]:
        """One page list per prefix that owns pages, for :meth:`PageAllocator.check`."""
        return self._device.owned_pages()

    def check(self) -> None:
        """Assert every invariant: when idle, and in tests after each operation."""
        self._device.check()
        self._cache.check()
        for key, entry in self._entries.items():
            entry.check()
            tiers = [key in self._loads, key in self._cache, key in self._transit]
            allowed = {
                PrefixState.STORED: ([True, False, False], [False, False, False]),
                PrefixState.HOST: ([False, True, False], [False, False, True]),
                PrefixState.DEVICE: ([False, True, False], [False, False, False]),
                PrefixState.FAILED: ([False, False, False],),
            }.get(entry.place)
            assert allowed is None or tiers in allowed, f"{key} {entry.life}: {tiers}"
        assert self._loads.num_fetching == sum(e.fetching for e in self._entries.values())
        assert self._loads.num_copying == sum(e.copying for e in self._entries.values())
        assert len(self._device) == sum(bool(e.pages) for e in self._entries.values())
        assert len(self._cache) == sum(key in self._cache for key in self._entries)
        for key in self._transit:
            assert self._entries[key].pins, f"{key} is in transit for nobody"
            assert self._entries[key].place is PrefixState.HOST

    def close(self) -> None:
        """Stop loading and give all pages back; leases still out are void. Idempotent."""
        self._assert_engine_thread()
        if self._closed:
            return
        self._closed = True
        self._loads.close()
        for entry in self._entries.values():
            entry.leases = 0
            self._device.give_back(entry)
            self._cache.discard(entry.key)
        self._entries.clear()
        self._transit.clear()

    # --- store → host ----------------------------------------------------------------------------
    def _enter(self, version: PrefixVersion) -> Entry:
        self._assert_engine_thread()
        assert not self._closed
        entry = self._entries.get(version.key)
        if entry is None:
            check_size(version, self._allocator)
            entry = self._entries[version.key] = Entry(version, self._allocator.page_size)
        return entry

    def _want(self, entry: Entry) -> None:
        if entry.place is PrefixState.FAILED and self._retry_is_due(entry.failed_at):
            entry.advance(LifeEvent.RETRY)
        if entry.place is PrefixState.STORED:
            self._loads.want(entry.version)
            self._start_fetches()

    def _start_fetches(self) -> None:
        for key in self._loads.start(num_held_back=len(self._transit)):
            self._entries[key].advance(LifeEvent.FETCH)

    def _keep(self, key: PrefixKey, prefix: HostPrefix) -> None:
        dropped = self._cache.put(key, prefix)
        for old_key, old in [(key, prefix)] if dropped is None else dropped:
            entry = self._entries[old_key]
            in_host = entry.place is PrefixState.HOST  # or in its pages, or on the way there
            if in_host and entry.pins:
                self._transit[old_key] = old
                continue
            self._observer.eviction("host")
            if in_host:
                entry.advance(LifeEvent.DROP_HOST)
                self._settle(entry)

    # --- host → device ---------------------------------------------------------------------------
    def _start_copy(self, entry: Entry, force: bool) -> bool:
        prefix = self._transit.get(entry.key) or self._cache.get(entry.key)
        assert prefix is not None
        if not self._device.reserve(entry, force=force):
            return False
        entry.advance(LifeEvent.COPY)
        self._transit.pop(entry.key, None)  # from here on the job holds it
        self._loads.copy(entry.key, entry.site_pages, prefix)
        return True

    def _lease(self, entry: Entry) -> Lease:
        entry.leases += 1
        self._device.use(entry)
        return Lease(entry, self._unlease)

    def _unlease(self, entry: Entry) -> None:
        self._assert_engine_thread()
        if not self._closed:
            entry.leases -= 1
            if not entry.leases:
                self._device.rest(entry)
            self._settle(entry)

    def _evicted(self, entry: Entry) -> None:
        self._observer.eviction("device")
        in_cache = entry.key in self._cache
        entry.advance(LifeEvent.EVICT if in_cache else LifeEvent.EVICT_ALL)
        self._settle(entry)

    # --- ends ------------------------------------------------------------------------------------
    def _complete(self, completion: Completion) -> None:
        entry = self._entries[completion.key]
        self._loads.num_fetching -= entry.fetching
        self._loads.num_copying -= entry.copying
        match completion:
            case Fetched(key, prefix, seconds):
                self._observer.load_seconds("store", seconds)
                entry.advance(LifeEvent.FETCHED)
                self._keep(key, prefix)
            case Copied(_, seconds):
                self._observer.load_seconds("host", seconds)
                entry.advance(LifeEvent.COPIED)
                self._device.rest(entry)
            case LoadFailed(_, error):
                self._fail(entry, error)
        self._settle(entry)

    def _fail(self, entry: Entry, error: PrefixdError) -> None:
        entry.advance(LifeEvent.FAIL)
        entry.error = error
        entry.failed_at = time.monotonic()
        self._failures.append(entry)
        self._device.give_back(entry)
        self._drop_host_copy(entry.key)

    def _retire(self, key: PrefixKey) -> None:
        entry = self._entries.get(key)
        if entry is not None and not entry.life.retiring:
            entry.advance(LifeEvent.RETIRE)
            self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Called whenever something lets go of ``entry``: drop what nothing holds any more."""
        if entry.held or self._entries.get(entry.key) is not entry:
            return
        if entry.life.retiring:
            assert advance(entry.life, LifeEvent.VANISH) is None
            self._device.give_back(entry)
            self._forget(entry)
            return
        if entry.key in self._transit:
            entry.advance(LifeEvent.DROP_HOST)
        if entry.place is PrefixState.FAILED and self._retry_is_due(entry.failed_at):
            entry.advance(LifeEvent.RETRY)
        if entry.place is PrefixState.STORED:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._drop_host_copy(entry.key)
        self._loads.discard(entry.key)
        del self._entries[entry.key]

    def _drop_host_copy(self, key: PrefixKey) -> None:
        self._cache.discard(key)
        self._transit.pop(key, None)

    def _forget_failures(self) -> None:
        while self._failures and self._retry_is_due(self._failures[0].failed_at):
            self._settle(self._failures.popleft())

    def _retry_is_due(self, failed_at: float) -> bool:
        return time.monotonic() >= failed_at + self._load_retry_s

    # --- threads ---------------------------------------------------------------------------------
    def _post(self, message: _Message) -> None:
        self._inbox.put(message)
        self._wake()

    def _assert_engine_thread(self) -> None:
        me = threading.get_ident()
        if self._engine_thread is None:
            self._engine_thread = me
        assert self._engine_thread == me, "residency belongs to the engine thread"


def _drain(inbox: queue.SimpleQueue[_T]) -> Iterator[_T]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()
