"""The queue between the event loop and the engine: bounded, all or nothing, and closable."""

from __future__ import annotations

import pytest

from prefixd_server.engine.mailbox import Abort, Mailbox, Submit
from prefixd_server.errors import Draining, EngineDead, Overloaded
from prefixd_server.types import EngineRequest, SamplingParams


def requests(count: int) -> list[EngineRequest]:
    return [
        EngineRequest(f"r{i}", "default", None, None, (1,), SamplingParams(), float("inf"))
        for i in range(count)
    ]


def test_commands_are_drained_once_and_in_order() -> None:
    mailbox = Mailbox(4)
    first, second = requests(2)
    mailbox.submit([first])
    mailbox.abort(["r0"])
    mailbox.submit([second])
    assert mailbox.drain() == [Submit(first), Abort("r0"), Submit(second)]
    assert mailbox.drain() == []


def test_what_the_engine_has_not_admitted_counts_too() -> None:
    mailbox = Mailbox(3)
    mailbox.submit(requests(2))
    mailbox.drain()
    mailbox.submit(requests(1))
    with pytest.raises(Overloaded, match=r"3 .*holds 3"):
        mailbox.submit(requests(1))
    mailbox.num_waiting = 0  # the engine has admitted the first two
    mailbox.submit(requests(2))
    with pytest.raises(Overloaded):
        mailbox.submit(requests(1))


def test_a_list_that_does_not_fit_is_refused_whole() -> None:
    mailbox = Mailbox(3)
    with pytest.raises(Overloaded):
        mailbox.submit(requests(4))
    assert mailbox.drain() == []
    mailbox.submit(requests(3))


@pytest.mark.parametrize("reason", [Draining, EngineDead])
def test_a_closed_mailbox_refuses_requests_and_takes_aborts(
    reason: type[Draining] | type[EngineDead],
) -> None:
    mailbox = Mailbox(3)
    mailbox.close(reason)
    with pytest.raises(reason):
        mailbox.submit(requests(1))
    mailbox.abort(["r0"])
    assert mailbox.drain() == [Abort("r0")]
    assert mailbox.closed is reason


def test_a_wake_is_kept_until_the_next_drain() -> None:
    mailbox = Mailbox(3)
    assert not mailbox.wait(0)
    mailbox.wake()
    assert mailbox.wait(None)
    assert mailbox.wait(None)
    mailbox.drain()
    assert not mailbox.wait(0)
    mailbox.submit(requests(1))
    assert mailbox.wait(None)
