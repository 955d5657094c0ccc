"""What a peer's process speaks: commands on standard input, one JSON line each on standard output.

A peer calls :func:`serve` with the function that runs a batch. Needs only the standard library, as
each peer lives in an environment of its own.

    run 32 64 4    32 requests at once, 64 new tokens each, spread over 4 tasks (0: the base model)
                   → {"tokens": …, "seconds": …, "first": [the first request's new tokens], …}
    quit           ends the process (so does the end of the input)

The first line that a peer writes is ``{"ready": {…}}``: its versions and settings. A failed run
answers ``{"error": …}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

__all__ = ["TokenIds", "serve", "versions"]

# Standard output is for answers alone; what libraries print there, from their import on, goes to
# standard error. So a peer imports this module before all others.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

TokenIds = Sequence[Sequence[int]]
"""what a run returns: the new tokens of each request, in order"""


def versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


def serve(
    run: Callable[[int, int, int], TokenIds | float],
    settings: dict[str, Any],
    after: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Answer commands until the input ends.

    Timed is ``run(requests, new_tokens, tasks)``; a run that returns a float has measured its
    seconds itself. ``after()`` adds to the answer and is not timed.
    """
    _write({"ready": settings})
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "quit":
            return
        requests, new_tokens, tasks = map(int, numbers)
        try:
            start = time.perf_counter()
            tokens = run(requests, new_tokens, tasks)
            seconds = time.perf_counter() - start
        except Exception as error:
            _write({"error": f"{type(error).__name__}: {error}"})
            continue
        if isinstance(tokens, float):
            _write({"tokens": requests * new_tokens, "seconds": tokens})
            continue
        lengths = sorted({len(one) for one in tokens})
        if lengths != [new_tokens] or len(tokens) != requests:
            _write({"error": f"{len(tokens)} answers, {lengths} tokens long"})
            continue
        answer = {"tokens": requests * new_tokens, "seconds": seconds, "first": list(tokens[0])}
        _write(answer | after())


def _write(answer: dict[str, Any]) -> None:
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()
