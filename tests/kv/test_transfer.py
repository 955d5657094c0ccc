"""Copies aside: what is queued, in which order, and that nothing is on its way after the call.

The stream is a fake that notes what is asked of it; the copies themselves are made on the CPU.
``e2e/test_cuda.py`` does this with a device.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from prefixd_server.kv import transfer
from prefixd_server.kv.pool import slots_of
from prefixd_server.kv.transfer import copy_rows_aside

LAYERS, HEADS, TOKENS, DIM = 5, 2, 6, 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the fakes in place of CUDA's were asked, in order; each staged tensor too."""
    found: list[str] = []
    stage = transfer.stage

    class Event:
        def record(self, stream: object) -> None:
            found.append("record")

        def synchronize(self) -> None:
            found.append("wait")

    def staged(values: Any, device: torch.device) -> torch.Tensor:
        found.append("stage")
        return stage(values, device)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "engine")
    monkeypatch.setattr(transfer, "stage", staged)
    return found


class Stream:
    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def wait_stream(self, other: str) -> None:
        self.asked.append(f"after {other}")


SLOTS = torch.from_numpy(slots_of([3, 1], TOKENS, 4))
ONE_LAYER = HEADS * TOKENS * DIM * 2


@pytest.mark.parametrize(("at_once", "copies"), [(1, 5), (2 * ONE_LAYER, 3), (64 << 20, 1)])
def test_rows_are_copied_in_few_parts_and_waited_for(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, at_once: int, copies: int
) -> None:
    monkeypatch.setattr(transfer, "_COPIED_AT_ONCE", at_once)
    source = torch.randn(LAYERS, HEADS, TOKENS, DIM).half()
    target = torch.full((LAYERS + 1, 20, HEADS, DIM), 7.0)
    copy_rows_aside(source, target[:LAYERS], SLOTS, Stream(asked))  # type: ignore[arg-type]
    assert asked == ["after engine", *["stage"] * (1 + copies), "record", "wait"]
    wanted = torch.full_like(target, 7.0)
    wanted[:LAYERS, SLOTS] = source.float().transpose(1, 2)
    assert torch.equal(target, wanted)


def test_a_copy_that_fails_leaves_none_of_the_others_on_its_way(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would land in pages that have gone to another request meanwhile."""
    monkeypatch.setattr(transfer, "_COPIED_AT_ONCE", 1)
    stage = transfer.stage

    def until_full(values: Any, device: torch.device) -> torch.Tensor:
        if asked.count("stage") == 3:
            raise torch.OutOfMemoryError("no pinned memory")
        return stage(values, device)

    monkeypatch.setattr(transfer, "stage", until_full)
    source = torch.randn(LAYERS, HEADS, TOKENS, DIM)
    target = torch.zeros(LAYERS, 20, HEADS, DIM)
    with pytest.raises(torch.OutOfMemoryError):
        copy_rows_aside(source, target, SLOTS, Stream(asked))  # type: ignore[arg-type]
    assert asked == ["after engine", "stage", "stage", "stage", "record", "wait"]
