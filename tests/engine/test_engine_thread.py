"""The engine on its own thread: it starts, sleeps, wakes, stops and dies; no request is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd_server.engine.thread import EngineThread
from prefixd_server.errors import EngineDead
from tests.engine.engine_rig import BOOM, Rig

PROMPT = (1, 2, 3)
PATIENCE_S = 60.0
"""how long a test waits for another thread before it gives up; never a measure of speed"""


class Threaded:
    def __init__(self, root: Path) -> None:
        self.rig = Rig(root, by_hand=False)
        self.deaths: list[None] = []
        self.thread = EngineThread(self.rig.engine, on_death=lambda: self.deaths.append(None))
        self._said = threading.Condition()
        deliver = self.rig.mailbox.deliver
        self.rig.mailbox.deliver = lambda outputs: self._tell(lambda: deliver(outputs))

    def _tell(self, deliver: Callable[[], None]) -> None:
        with self._said:
            deliver()
            self._said.notify_all()

    def wait_for(self, request_id: str, *, tokens: int | None = None) -> None:
        """Until the request has ended or, given ``tokens``, has said so many."""

        def reached() -> bool:
            if tokens is not None:
                return len(self.rig.tokens(request_id)) >= tokens
            return any(output.finish for output in self.rig.outputs[request_id])

        with self._said:
            assert self._said.wait_for(reached, PATIENCE_S)


@pytest.fixture
def threaded(tmp_path: Path) -> Iterator[Threaded]:
    threaded = Threaded(tmp_path)
    yield threaded
    threaded.thread.stop()


def submit(threaded: Threaded, *args: Any, **kwargs: Any) -> str:
    """The rig files a request after the mailbox took it, so the engine must not answer between."""
    with threaded._said:
        return threaded.rig.submit(*args, **kwargs)


def test_it_serves_and_loads_prefixes_and_stops(threaded: Threaded) -> None:
    threaded.thread.start()
    ids = [submit(threaded, PROMPT, task) for task in (None, "t0", "t1", "t0")]
    for request_id in ids:
        threaded.wait_for(request_id)
        assert threaded.rig.tokens(request_id) == threaded.rig.expected(request_id)
    assert threaded.thread.alive
    threaded.thread.stop()
    assert not threaded.thread.alive
    assert threaded.deaths == []
    with pytest.raises(EngineDead):
        threaded.rig.submit(PROMPT)


def test_a_stop_ends_what_is_in_flight(threaded: Threaded) -> None:
    request_id = submit(threaded, PROMPT, max_new_tokens=10, ignore_eos=True)
    hold, held = threading.Event(), threading.Event()
    run = threaded.rig.runner.run

    def run_until_held(step: Any) -> Any:
        held.set()
        assert hold.wait(PATIENCE_S)
        return run(step)

    threaded.rig.runner.run = run_until_held  # type: ignore[method-assign]
    threaded.thread.start()
    assert held.wait(PATIENCE_S)
    stopper = threading.Thread(target=threaded.thread.stop)
    stopping = _called(threaded, "wake")
    stopper.start()
    assert stopping.wait(PATIENCE_S)
    hold.set()
    stopper.join(PATIENCE_S)
    assert not threaded.thread.alive
    assert len(threaded.rig.tokens(request_id)) == 1, "the present step was finished"
    assert isinstance(threaded.rig.error(request_id), EngineDead)
    assert threaded.rig.world.allocator.num_used == 0


def test_a_stop_just_before_a_step_drains_the_mailbox_is_not_slept_through(
    threaded: Threaded,
) -> None:
    step = threaded.rig.engine.step
    hold, held = threading.Event(), threading.Event()

    def step_when_let() -> bool:
        held.set()
        assert hold.wait(PATIENCE_S)
        return step()

    threaded.rig.engine.step = step_when_let  # type: ignore[method-assign]
    stopping = _called(threaded, "wake")
    threaded.thread.start()
    assert held.wait(PATIENCE_S)
    stopper = threading.Thread(target=threaded.thread.stop, daemon=True)
    stopper.start()
    assert stopping.wait(PATIENCE_S)
    hold.set()
    stopper.join(PATIENCE_S / 6)
    assert not threaded.thread.alive


def test_an_idle_engine_sleeps_until_a_request_wakes_it(threaded: Threaded) -> None:
    threaded.thread.start()
    threaded.wait_for(submit(threaded, PROMPT))
    checked = _called(threaded, "check", of=threaded.rig.engine)
    assert checked.wait(PATIENCE_S), "the books are checked once it has been quiet"
    request_id = submit(threaded, PROMPT)
    threaded.wait_for(request_id)
    assert threaded.rig.tokens(request_id) == threaded.rig.expected(request_id)


def test_a_death_is_told_and_ends_every_request(
    threaded: Threaded, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = threaded.rig.engine.scheduler.schedule
    first = submit(threaded, PROMPT, max_new_tokens=50, ignore_eos=True)

    def schedule_once() -> Any:
        if threaded.rig.tokens(first):
            raise AssertionError("a bug in the scheduler")
        return schedule()

    threaded.rig.engine.scheduler.schedule = schedule_once  # type: ignore[method-assign]
    threaded.thread.start()
    threaded.wait_for(first)
    threaded.thread.stop()
    assert isinstance(threaded.rig.error(first), EngineDead)
    assert threaded.deaths == [None]
    assert "a bug in the scheduler" in caplog.text
    with pytest.raises(EngineDead):
        threaded.rig.submit(PROMPT)
    assert threaded.rig.world.allocator.num_used == 0


def test_a_broken_device_is_the_engines_death(threaded: Threaded) -> None:
    """Else it would fail step after step while health checks send it requests."""
    threaded.rig.runner.broken = RuntimeError("CUDA error: an illegal memory access")
    request_id = submit(threaded, (BOOM, 1))
    threaded.thread.start()
    threaded.wait_for(request_id)
    threaded.thread.stop()
    assert isinstance(threaded.rig.error(request_id), EngineDead)
    assert threaded.deaths == [None]


def test_a_thread_that_never_started_can_be_stopped(threaded: Threaded) -> None:
    threaded.thread.stop()
    assert not threaded.thread.alive


def _called(threaded: Threaded, name: str, *, of: Any = None) -> threading.Event:
    """An event that is set once a method (of the mailbox) has returned."""
    owner = threaded.rig.mailbox if of is None else of
    method, called = getattr(owner, name), threading.Event()

    def call() -> None:
        method()
        called.set()

    setattr(owner, name, call)
    return called
