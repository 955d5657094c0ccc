"""A prefix's life on one server, as one table and one function.

::

              FETCH             FETCHED            COPY               COPIED
    STORED ──────────▶ LOADING ─────────▶ HOST ──────────▶ LOADING ──────────▶ DEVICE
      ▲ ▲ ▲              │  ▲              │                  │                  │ │
      │ │ │              │  └──────────────┼──────────────────┘ (the same state)  │ │
      │ │ │         FAIL ▼                 │                                     │ │
      │ │ └─RETRY── FAILED      DROP_HOST  │        EVICT, the host copy stays   │ │
      │ └──────────────────────────────────┘ ◀───────────────────────────────────┘ │
      └─────────────────────────── EVICT_ALL, there is no host copy ───────────────┘

    anywhere ──RETIRE──▶ RETIRING (and where it was) ──VANISH──▶ gone
                             │
                             └──REVIVE──▶ where it was

A retiring prefix is one that no version of its tenant names any more. The requests that hold it
may still load it and attend to it, so it keeps its place beside the mark; clients see
``retiring``. When the last of them lets go it vanishes. The same bytes uploaded again revive it.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from prefixd_server.types import PrefixState

__all__ = ["NEW", "Life", "LifeEvent", "advance"]


class LifeEvent(enum.Enum):
    FETCH = "a load from the store begins"
    FETCHED = "the prefix is in host memory"
    COPY = "a copy into reserved pages begins"
    COPIED = "the prefix is in its pages"
    FAIL = "the load or copy failed"
    RETRY = "the failure is old enough to try again"
    DROP_HOST = "the only copy, in host memory, is dropped"
    EVICT = "its pages are taken, a host copy stays"
    EVICT_ALL = "its pages are taken, there is no other copy"
    RETIRE = "no version names it any more"
    REVIVE = "a version names it again"
    VANISH = "nothing holds a retiring prefix any more"


class Life(NamedTuple):
    place: PrefixState
    """any state but RETIRING"""
    retiring: bool = False

    @property
    def state(self) -> PrefixState:
        """What clients are shown."""
        return PrefixState.RETIRING if self.retiring else self.place


NEW = Life(PrefixState.STORED)

_S = PrefixState
_E = LifeEvent

_MOVES: dict[tuple[PrefixState, LifeEvent], PrefixState] = {
    (_S.STORED, _E.FETCH): _S.LOADING,
    (_S.LOADING, _E.FETCHED): _S.HOST,
    (_S.HOST, _E.COPY): _S.LOADING,
    (_S.LOADING, _E.COPIED): _S.DEVICE,
    (_S.LOADING, _E.FAIL): _S.FAILED,
    (_S.FAILED, _E.RETRY): _S.STORED,
    (_S.HOST, _E.DROP_HOST): _S.STORED,
    (_S.DEVICE, _E.EVICT): _S.HOST,
    (_S.DEVICE, _E.EVICT_ALL): _S.STORED,
}

_MARKS: dict[tuple[bool, LifeEvent], bool] = {
    (False, _E.RETIRE): True,
    (True, _E.REVIVE): False,
}


def advance(life: Life, event: LifeEvent) -> Life | None:
    """The life after ``event``; None: gone. Asserts that ``event`` can happen here."""
    if event is LifeEvent.VANISH:
        assert life.retiring, f"{life} cannot vanish: a version names it"
        assert life.place is not PrefixState.LOADING, "a thread is still loading it"
        return None
    if event in (LifeEvent.RETIRE, LifeEvent.REVIVE):
        assert (life.retiring, event) in _MARKS, f"{event.name} of {life}"
        return Life(life.place, _MARKS[life.retiring, event])
    assert (life.place, event) in _MOVES, f"{event.name} of {life}"
    return Life(_MOVES[life.place, event], life.retiring)
