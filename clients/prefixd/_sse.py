"""Server-sent events, the part that is used: the data of each event.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
Lines are split as that page says and not as ``str.splitlines`` does, which would cut JSON text at
U+2028 and its like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["EventParser"]

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Feed it the bytes as they arrive; it gives the data of every event they complete."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[str] = []
        self._after_cr = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        if not chunk:
            return
        if self._after_cr:  # the LF of a CRLF that two chunks share
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._line = _LINE_END.split(self._line + chunk)
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                yield "\n".join(self._data)
                self._data = []

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")  # a comment starts with ":", so its name is empty
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
