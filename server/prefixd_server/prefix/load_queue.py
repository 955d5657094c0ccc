"""Which loads run now and which wait. Engine thread only; the jobs themselves are in loader.py."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

from prefixd_server.prefix.entry import SitePages
from prefixd_server.prefix.host_cache import HostPrefix
from prefixd_server.prefix.loader import Loader
from prefixd_server.types import PrefixKey, PrefixVersion

__all__ = ["LoadQueue"]


class LoadQueue:
    """At most ``max_fetches`` fetches at a time; the others wait here, first come first, so that
    one that nobody wants any more can leave. Copies have a thread of their own.

    ``executor`` replaces the threads; the caller shuts it down.
    """

    def __init__(
        self, loader: Loader, *, max_fetches: int, timeout_s: float, executor: Executor | None
    ) -> None:
        self.num_fetching = 0
        self.num_copying = 0
        self._loader = loader
        self._max_fetches = max_fetches
        self._timeout_s = timeout_s
        self._waiting: OrderedDict[PrefixKey, tuple[PrefixVersion, float]] = OrderedDict()
        self._threads: list[ThreadPoolExecutor] = []
        self._fetcher = executor or self._start_threads(max_fetches, "prefix-load")
        self._copier = executor or self._start_threads(1, "prefix-copy")

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._waiting

    @property
    def counts(self) -> dict[str, int]:
        """Loads that wait for their turn, read from the store, and copy into pages."""
        return {
            "queued": len(self._waiting),
            "fetching": self.num_fetching,
            "copying": self.num_copying,
        }

    def want(self, version: PrefixVersion) -> None:
        """Queue a fetch, once; its time starts to run now."""
        self._waiting.setdefault(version.key, (version, time.monotonic() + self._timeout_s))

    def discard(self, key: PrefixKey) -> None:
        self._waiting.pop(key, None)

    def start(self, num_held_back: int) -> Iterator[PrefixKey]:
        """Start what may run, ``num_held_back`` fewer than usual; yields the keys."""
        while self._waiting and self.num_fetching + num_held_back < self._max_fetches:
            key, (version, deadline) = self._waiting.popitem(last=False)
            self.num_fetching += 1
            self._fetcher.submit(self._loader.fetch, version, deadline)
            yield key

    def copy(self, key: PrefixKey, pages: SitePages, prefix: HostPrefix) -> None:
        self.num_copying += 1
        self._copier.submit(self._loader.copy, key, pages, prefix)

    def close(self) -> None:
        """Waits for the jobs that run; starts no more."""
        self._waiting.clear()
        self.num_fetching = self.num_copying = 0
        self._loader.close()
        for threads in self._threads:
            threads.shutdown(wait=True, cancel_futures=True)

    def _start_threads(self, count: int, name: str) -> ThreadPoolExecutor:
        threads = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._threads.append(threads)
        return threads
