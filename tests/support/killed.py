"""A process that dies by SIGKILL, without the seconds that a new one takes to import torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

__all__ = ["die", "run_until_killed"]


def run_until_killed(work: Callable[[], object]) -> None:
    """In a forked child, which must die by :func:`die`. Torch must be at one thread: others do not
    survive a fork."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
