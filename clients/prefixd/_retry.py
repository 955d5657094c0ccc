"""When to try again, and how long to wait first. Pure: no clock, no socket."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prefixd._errors import APIConnectionError, PrefixdError, RateLimitError, UnavailableError

__all__ = ["Retry"]


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with jitter that never waits less than ``Retry-After`` asks."""

    max_retries: int = 3
    base_s: float = 0.5
    cap_s: float = 8.0
    patience_s: float = 60.0
    """A ``Retry-After`` longer than this is not waited for: the error is raised at once."""

    def delay(self, error: PrefixdError, attempt: int, method: str) -> float | None:
        """Seconds to wait after failure number ``attempt`` (from 0), None to give up."""
        if attempt >= self.max_retries or not _may_repeat(error, method):
            return None
        asked = error.retry_after if isinstance(error, RateLimitError | UnavailableError) else None
        if asked is not None and asked > self.patience_s:
            return None
        backoff = min(self.cap_s, self.base_s * 2.0**attempt)
        # The jitter comes on top of Retry-After, so that refused clients do not return together.
        return (asked or 0.0) + backoff * random.uniform(0.5, 1.0)


def _may_repeat(error: PrefixdError, method: str) -> bool:
    """Only what the server refused (429, 503), never saw, or may see twice (GET)."""
    if isinstance(error, RateLimitError | UnavailableError):
        return True
    if isinstance(error, APIConnectionError):
        return not error.was_sent or (method == "GET" and not error.timed_out)
    return False
