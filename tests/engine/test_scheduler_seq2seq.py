"""What an encoder adds to scheduling: its tokens run whole and at once, its pages are counted."""

from __future__ import annotations

from prefixd_server.engine.scheduler import Scheduler
from prefixd_server.engine.sequence import Sequence, Status
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.types import EngineRequest, SamplingParams
from tests.engine.scheduler_world import FakePrefixes

PAGE = 4


class World:
    def __init__(self, *, num_pages: int = 100, budget: int = 16) -> None:
        self.allocator = PageAllocator(num_pages, PAGE)
        self.scheduler = Scheduler(
            self.allocator,
            FakePrefixes(self.allocator),
            max_num_seqs=8,
            max_num_batched_tokens=budget,
        )
        self.num_arrived = 0

    def arrive(self, text: int, new: int = 5) -> Sequence:
        self.num_arrived += 1
        request = EngineRequest(
            request_id=f"r{self.num_arrived}",
            tenant="default",
            task=None,
            version=None,
            prompt_token_ids=tuple(range(text)),
            sampling=SamplingParams(max_new_tokens=new),
            deadline=float("inf"),
            arrival=float(self.num_arrived),
        )
        sequence = Sequence(request, (0,), None, encoder_token_ids=request.prompt_token_ids)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int, int]]:
        """One step and its tokens: (id, of the encoder, of the decoder) of all that ran."""
        scheduled = self.scheduler.schedule().scheduled
        ran = [(s.request_id, s.num_unencoded, count) for s, count in scheduled]
        for sequence, count in scheduled:
            sequence.num_computed += count
            if sequence.num_uncomputed == 0:
                sequence.output_token_ids.append(7)
            if len(sequence.output_token_ids) == sequence.params.max_new_tokens:
                self.scheduler.release(sequence)
        self.scheduler.check()
        self.allocator.check(self.scheduler.owned_pages())
        return ran


def test_the_encoder_runs_once_and_counts_toward_the_budget() -> None:
    world = World(budget=16)
    world.arrive(6)
    world.arrive(8)
    world.arrive(3)
    assert world.step() == [("r1", 6, 1), ("r2", 8, 1)]
    assert world.step() == [("r1", 0, 1), ("r2", 0, 1), ("r3", 3, 1)]
    assert world.step() == [("r1", 0, 1), ("r2", 0, 1), ("r3", 0, 1)]


def test_a_text_longer_than_the_budget_is_not_starved_by_what_runs() -> None:
    world = World(budget=16)
    world.arrive(2)
    world.step()
    world.arrive(40)
    world.arrive(1)
    assert world.step() == [("r1", 0, 1), ("r2", 40, 1)]
    assert world.step() == [("r1", 0, 1), ("r2", 0, 1), ("r3", 1, 1)]


def test_a_text_that_fits_the_next_step_waits_for_it_and_is_not_overtaken() -> None:
    world = World(budget=16)
    world.arrive(10)
    world.arrive(12)
    world.arrive(1)
    assert world.step() == [("r1", 10, 1)]
    assert world.step() == [("r1", 0, 1), ("r2", 12, 1), ("r3", 1, 1)]


def test_pages_for_both_are_reserved_at_admission_or_none() -> None:
    world = World(num_pages=4)
    first = world.arrive(9, new=4)  # 3 pages of text, 1 of output
    second = world.arrive(1, new=4)
    world.step()
    assert (len(first.cross_pages), len(first.pages)) == (3, 1)
    assert second.status is Status.WAITING
    assert (second.cross_pages, second.pages) == ([], [])
    while first.status is Status.RUNNING:
        world.step()
    world.step()
    assert (len(second.cross_pages), len(second.pages)) == (1, 1)


def test_a_preempted_sequence_runs_its_encoder_again() -> None:
    world = World(num_pages=9)
    first = world.arrive(7, new=12)
    last = world.arrive(7, new=12)
    world.step()
    while last.status is Status.RUNNING:
        world.step()
    generated = len(last.output_token_ids)
    assert generated > 0
    assert (last.cross_pages, last.pages, last.num_unencoded) == ([], [], 7)
    while last.status is Status.WAITING:
        ran = world.step()
    assert ran[-1] == ("r2", 7, 1 + generated)
    assert first.status is Status.FINISHED
    while last.status is Status.RUNNING:
        world.step()
    assert world.allocator.num_used == 0
