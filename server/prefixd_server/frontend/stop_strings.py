"""Stop strings over a stream of text: nothing of one is ever emitted, wherever the pieces break."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopChecker"]


class StopChecker:
    """Cuts a text before the first place where a stop string begins.

    The result does not depend on how the text is cut into pieces: a match waits while an earlier
    one may still become complete (stops ``abcd`` and ``bc``, text ``abc``).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is empty"
        self._stops = tuple(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """The text that is now safe to emit; empty once ``matched``."""
        if self.matched or not self._stops:
            return "" if self.matched else piece
        text = self._held + piece
        match, partial = self._match(text), self._partial(text)
        self.matched = match is not None and match <= partial
        end = match if match is not None and self.matched else partial
        self._held = "" if self.matched else text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back; the text has ended."""
        text, self._held = self._held, ""
        match = self._match(text)
        self.matched = self.matched or match is not None
        return text[:match]

    def _match(self, text: str) -> int | None:
        """Where the first stop string is."""
        found = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found, default=None)

    def _partial(self, text: str) -> int:
        """Where the first end of the text begins that may become a stop string; else its length."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first and self._may_become_stop(text[start:]):
                return start
        return len(text)

    def _may_become_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops)
