"""Who gets a core where there are fewer of them than threads that want one.

The threads of a program meet after each product, so one that loses its core amid its share makes
all of them wait. Between two products each offers its core (``team.h``), and the team does without
it meanwhile. Under Linux's ``SCHED_BATCH`` a thread that wakes waits for such an offer, some tenths
of a millisecond, instead of taking a core at once.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["give_way", "insist"]


def give_way() -> bool:
    """This thread, and those that it starts from now on, wait for a core that is offered. False,
    and nothing done, where the system has no such policy or the process was given another."""
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):
        return False
    return True


def insist() -> None:
    """A thread that was started by one that gives way does not."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
