"""The thread that follows the store's feed of changes.

It waits for events and has each task that one names read anew, unless what it tells is known, as
after a change made here; ``reset`` has everything read anew.
While the store is unavailable it tries again, ever more slowly, and says so in :attr:`Feed.health`;
the cursor stays where it was, so nothing is missed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixd_server.errors import PrefixdError
from prefixd_server.prefix.mirror import TaskKey
from prefixd_store.records import Event
from prefixd_store.store import Store

__all__ = ["Feed", "FeedHealth"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class FeedHealth:
    healthy: bool
    since: float
    """time.monotonic() when it became so"""
    error: PrefixdError | None = None
    """the last one; None while healthy, and where the feed was never started or has stopped"""


class Feed:
    """``refresh`` re-reads one task, ``refill`` all; both may raise PrefixdError. ``revision`` is
    the one of a task that is known, 0: none."""

    def __init__(
        self,
        store: Store,
        *,
        refresh: Callable[[TaskKey], None],
        refill: Callable[[], None],
        revision: Callable[[TaskKey], int],
        poll_s: float,
    ) -> None:
        self._store = store
        self._refresh = refresh
        self._refill = refill
        self._revision = revision
        self._poll_s = poll_s
        self._cursor: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefix-feed", daemon=True)
        self._health = FeedHealth(False, time.monotonic())

    @property
    def health(self) -> FeedHealth:
        health = self._health
        if health.healthy and not self._thread.is_alive():
            return FeedHealth(False, health.since)
        return health

    def start(self) -> None:
        """Read everything on the caller's thread, then follow. Raises what the store raises."""
        self._step()
        self._set_health(None)
        self._thread.start()

    def close(self) -> None:
        """Returns once the thread has ended: within one wait for events."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._stop.is_set():
            try:
                self._step()
            except PrefixdError as error:
                self._set_health(error)
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._set_health(None)
                pause = _FIRST_PAUSE_S

    def _step(self) -> None:
        events = self._store.events(self._cursor, timeout=self._poll_s)
        if any(event.kind == "reset" for event in events):
            self._refill()
        else:
            self._refresh_all(events)
        if events:
            self._cursor = events[-1].cursor  # only now: a failure above brings the events again

    def _refresh_all(self, events: Sequence[Event]) -> None:
        for key in dict.fromkeys(self._key(event) for event in events if self._is_news(event)):
            try:
                self._refresh(key)
            except PrefixdError as error:
                if error.code != "corrupt_record":
                    raise
                # That one task stays as it was; the others must not wait for its repair.
                _log.error("%s", error)

    def _is_news(self, event: Event) -> bool:
        # Revisions begin anew where a task is made again, but its end is told before that.
        return event.kind != "put" or self._revision(self._key(event)) < event.revision

    @staticmethod
    def _key(event: Event) -> TaskKey:
        return TaskKey(event.tenant, event.task)

    def _set_health(self, error: PrefixdError | None) -> None:
        was = self._health
        if was.healthy != (error is None):
            if error is None:
                _log.info("following the store's changes")
            else:
                _log.warning("the store's changes cannot be followed: %s", error)
        since = was.since if was.healthy == (error is None) else time.monotonic()
        self._health = FeedHealth(error is None, since, error)
