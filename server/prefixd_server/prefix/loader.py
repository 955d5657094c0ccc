"""The work of loading that may block: store → host memory → pages. Runs on loader threads only.

A job knows nothing of states: it gets what it needs, and tells how it ended through ``done``, once,
whatever happens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from prefixd_server.errors import InvalidPrefix, PrefixdError, StoreUnavailable, Unavailable
from prefixd_server.prefix.entry import SitePages
from prefixd_server.prefix.host_cache import HostPrefix
from prefixd_server.types import PrefixKey, PrefixVersion, SiteLengths
from prefixd_store.format import Limits, parse_prefix
from prefixd_store.geometry import Geometry, check_fits
from prefixd_store.store import Store

__all__ = ["Completion", "Copied", "Fetched", "LoadFailed", "Loader", "PrefixPool"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class PrefixPool(Protocol):
    """The part of the KV pool that a prefix is written with."""

    def write_prefix(
        self, pages: Sequence[int], key: npt.NDArray[Any], value: npt.NDArray[Any], dtype: str
    ) -> None:
        """Copy ``key`` and ``value`` [L, H_kv, P, D] of one site into the first L layers of pages
        that nobody reads; complete on return; callable on any thread."""


@dataclass(frozen=True, eq=False)
class Fetched:
    key: PrefixKey
    prefix: HostPrefix
    seconds: float


@dataclass(frozen=True)
class Copied:
    key: PrefixKey
    seconds: float


@dataclass(frozen=True)
class LoadFailed:
    key: PrefixKey
    error: PrefixdError


Completion = Fetched | Copied | LoadFailed


class Loader:
    """``geometry`` and ``fingerprint`` are the model's; a prefix that does not fit is refused."""

    def __init__(
        self,
        store: Store,
        pool: PrefixPool,
        *,
        geometry: Geometry,
        fingerprint: str | None,
        limits: Limits | None,
        done: Callable[[Completion], None],
    ) -> None:
        self._store = store
        self._pool = pool
        self._geometry = geometry
        self._fingerprint = fingerprint
        self._limits = limits
        self._done = done
        self._closing = threading.Event()

    def fetch(self, version: PrefixVersion, deadline: float) -> None:
        """Store → host memory. While the store is unavailable, tries again until ``deadline``
        (``time.monotonic()``); whatever else is wrong fails at once."""
        begin = time.monotonic()

        def work() -> Completion:
            blob = self._read(version, deadline)
            return Fetched(version.key, self._parse(version, blob), time.monotonic() - begin)

        self._run(version.key, work)

    def copy(self, key: PrefixKey, pages: SitePages, prefix: HostPrefix) -> None:
        """Host memory → pages that were reserved for it."""
        begin = time.monotonic()

        def work() -> Completion:
            for site, (keys, values) in prefix.sites.items():
                self._pool.write_prefix(getattr(pages, site), keys, values, prefix.dtype)
            return Copied(key, time.monotonic() - begin)

        self._run(key, work)

    def close(self) -> None:
        """Let no job wait for the store any longer."""
        self._closing.set()

    def _run(self, key: PrefixKey, work: Callable[[], Completion]) -> None:
        completion: Completion
        try:
            completion = work()
        except PrefixdError as error:
            completion = LoadFailed(key, error)
        except Exception as error:  # out of memory, a device error: this prefix fails, no other
            _log.exception("loading prefix %s of tenant %s failed", key.sha256, key.tenant)
            reason = type(error).__name__
            completion = LoadFailed(
                key, Unavailable(f"prefix {key.sha256} could not be loaded ({reason})")
            )
        self._done(completion)

    def _read(self, version: PrefixVersion, deadline: float) -> memoryview:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return self._store.read_blob(version.tenant, version.sha256)
            except StoreUnavailable:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._closing.wait(min(pause, remaining)):
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _parse(self, version: PrefixVersion, blob: memoryview) -> HostPrefix:
        prefix = parse_prefix(blob, self._limits)
        check_fits(prefix.manifest, self._geometry, self._fingerprint)
        if prefix.manifest.num_virtual_tokens != version.num_virtual_tokens:
            raise InvalidPrefix(
                f"version {version.version} of task {version.task!r} is recorded with "
                f"{version.num_virtual_tokens} virtual tokens, its file has "
                f"{prefix.manifest.num_virtual_tokens}",
                param="num_virtual_tokens",
            )
        sites = prefix.manifest.sites
        found = SiteLengths(**{site: shape[2] for site, shape in sites.items()})
        if found != version.sites:
            raise InvalidPrefix(
                f"version {version.version} of task {version.task!r} is recorded with "
                f"{version.sites}, its file has {found}"
            )
        arrays = prefix.arrays
        return HostPrefix(
            {site: (arrays[f"{site}.key"].data, arrays[f"{site}.value"].data) for site in sites},
            prefix.manifest.dtype,
            nbytes=len(blob),
        )
