"""Which threads wait for a core that is offered."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from prefixd_server.native import cores

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's policies")


def on_a_thread(call: Callable[[], Any]) -> Any:
    """As a thread keeps the policy that it is given, and leaves it to those that it starts."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def policy() -> int:
    return os.sched_getscheduler(0)


def as_usual() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_thread_and_those_it_starts_give_way() -> None:
    def run() -> tuple[Any, ...]:
        as_usual()
        return cores.give_way(), policy(), on_a_thread(policy)

    before = policy()
    assert on_a_thread(run) == (True, os.SCHED_BATCH, os.SCHED_BATCH)
    assert policy() == before


def test_one_of_them_insists() -> None:
    def insisting() -> int:
        cores.insist()
        return policy()

    def run() -> tuple[int, int]:
        as_usual()
        cores.give_way()
        return on_a_thread(insisting), policy()

    assert on_a_thread(run) == (os.SCHED_OTHER, os.SCHED_BATCH)


def test_a_policy_that_was_chosen_stays() -> None:
    def run() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return cores.give_way(), policy()

    assert on_a_thread(run) == (False, os.SCHED_BATCH)


def test_a_system_without_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_BATCH")
    assert on_a_thread(lambda: (as_usual(), cores.give_way())[1]) is False
