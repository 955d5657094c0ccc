"""The scheduler against its oracle over random traces, and the promises of its docstring."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixd_server.engine.sequence import Status
from tests.engine.scheduler_oracle import Place
from tests.engine.scheduler_world import World

NEXT = {
    Place.AWAY: [Place.HOST, Place.BROKEN],
    Place.COPYING: [Place.DEVICE, Place.DEVICE, Place.BROKEN],
    Place.BROKEN: [Place.AWAY],
    Place.HOST: [Place.AWAY],
}
"""How a prefix moves with no help from the scheduler"""


def fresh_world(rng: Random) -> World:
    world = World(
        num_pages=rng.randint(4, 24),
        page_size=rng.choice([1, 1, 4, 16]),
        max_num_seqs=rng.randint(2, 12),
        max_num_batched_tokens=rng.choice([2, 8, 40, 40]),
        max_prefill_tokens=rng.choice([2, 8, 40, 40]),
        prompt_cache=rng.random() < 0.7,
    )
    for i in range(rng.randint(0, 4)):
        most = world.allocator.num_pages * world.allocator.page_size // 2
        world.add_prefix(f"p{i}", rng.randint(1, most), pinned=rng.random() < 0.3)
    return world


def random_event(world: World, rng: Random) -> None:
    draw = rng.random()
    if draw < 0.5:
        most = world.allocator.num_pages * world.allocator.page_size // 2
        prefix = rng.choice([None, *world.versions])
        longest = most // rng.choice([1, 4, 4])
        prompt, new = rng.randint(1, max(1, longest)), rng.randint(1, 30)
        beams = rng.choice([1, 1, 2, 3])
        if beams > 1:
            prompt, new = min(prompt, 6), min(new, 12)  # or few would fit
        alike = rng.choice([None, 0, rng.randint(1, most)])
        priority = rng.choice([0, 0, 0, 1, -1])
        world.arrive(prompt, new, prefix, priority=priority, beams=beams, alike=alike)
    elif draw < 0.55 and world.sequences:
        end = rng.choice([world.abort, world.abort, world.poison])
        end(rng.choice(sorted(world.sequences)))
    elif world.versions:
        name = rng.choice(sorted(world.versions))
        if world.place(name) in NEXT:
            world.move(name, rng.choice(NEXT[world.place(name)]))


def run_trace(seed: int) -> World:
    """Requests come and go for a while; after every step both sides have agreed."""
    rng = Random(seed)
    world = fresh_world(rng)
    for _ in range(80):
        for _ in range(rng.choice([0, 0, 1, 1, 4])):
            random_event(world, rng)
        world.step()
    return world


@pytest.mark.parametrize("seed", range(60))
def test_long_traces_agree_with_the_oracle_and_nothing_starves(seed: int) -> None:
    world = run_trace(seed)
    world.drain()
    shared = sum(len(pages) for pages in world.prefixes.owned_pages())
    assert world.allocator.num_used == shared, "a request left pages behind"


def test_the_traces_are_not_trivial() -> None:
    worlds = [run_trace(seed) for seed in range(60)]
    assert sum(world.scheduler.num_preemptions for world in worlds) > 30
    assert sum(world.num_arrived for world in worlds) > 400
    assert sum(world.num_forks for world in worlds) > 100
    assert sum(world.num_forks_again for world in worlds) > 4
    caches = [world.scheduler.prompt_cache for world in worlds]
    assert sum(cache.num_hit_tokens for cache in caches) > 100
    assert sum(cache.pages.num_evictions for cache in caches) > 500


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(3, 10),
        page_size=st.sampled_from([1, 4]),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.sampled_from([1, 4, 30]),
        max_prefill_tokens=st.sampled_from([1, 4, 30]),
        sizes=st.lists(st.integers(1, 5), max_size=3),
        pinned=st.integers(0, 7),
        prompt_cache=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens: int,
        sizes: list[int],
        pinned: int,
        prompt_cache: bool,
    ) -> None:
        self.world = World(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prefill_tokens=max_prefill_tokens,
            prompt_cache=prompt_cache,
        )
        for i, size in enumerate(sizes):
            tokens = min(size, num_pages * page_size)
            self.world.add_prefix(f"p{i}", tokens, pinned=bool(pinned >> i & 1))

    @rule(
        prompt=st.integers(1, 12),
        new=st.integers(1, 8),
        prefix=st.integers(0, 3),
        priority=st.integers(-1, 1),
        beams=st.sampled_from([1, 1, 2, 3]),
        alike=st.sampled_from([None, 0, 5]),
    )
    def arrive(
        self, prompt: int, new: int, prefix: int, priority: int, beams: int, alike: int | None
    ) -> None:
        names = [None, *self.world.versions]
        name = names[prefix % len(names)]
        self.world.arrive(prompt, new, name, priority=priority, beams=beams, alike=alike)

    @precondition(lambda self: self.world.sequences)
    @rule(pick=st.integers(0, 9))
    def abort(self, pick: int) -> None:
        ids = sorted(self.world.sequences)
        end = self.world.poison if pick == 9 else self.world.abort
        end(ids[pick % len(ids)])

    @precondition(lambda self: self.world.versions)
    @rule(pick=st.integers(0, 3), event=st.integers(0, 2))
    def move(self, pick: int, event: int) -> None:
        name = sorted(self.world.versions)[pick % len(self.world.versions)]
        choices = NEXT.get(self.world.place(name))
        if choices:
            self.world.move(name, choices[event % len(choices)])

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase


# --- one promise at a time ----------------------------------------------------------------------


def test_decodes_come_before_prefill_chunks_and_chunks_fill_the_budget() -> None:
    world = World(num_pages=40, max_num_batched_tokens=8)
    world.arrive(20, new=2)
    world.arrive(3, new=5)
    assert world.step() == [("r0001", 8)]
    assert world.step() == [("r0001", 8)]
    assert world.step() == [("r0001", 4), ("r0002", 3)]
    world.arrive(20)
    assert world.step() == [("r0001", 1), ("r0002", 1), ("r0003", 6)]
    assert world.step() == [("r0002", 1), ("r0003", 7)]


def test_prompts_beside_decodes_have_a_budget_of_their_own() -> None:
    world = World(num_pages=40, max_num_batched_tokens=16, max_prefill_tokens=4)
    world.arrive(18, new=4)
    assert world.step() == [("r0001", 16)], "alone it holds up nobody"
    assert world.step() == [("r0001", 2)]
    world.arrive(9)
    assert world.step() == [("r0001", 1), ("r0002", 4)]
    assert world.step() == [("r0001", 1), ("r0002", 4)]
    assert world.step() == [("r0001", 1), ("r0002", 1)]


def test_the_more_prompts_wait_for_each_decode_the_more_of_them_run() -> None:
    world = World(num_pages=40, max_num_batched_tokens=16, max_prefill_tokens=4, max_num_seqs=4)
    world.arrive(2, new=4)
    assert world.step() == [("r0001", 2)]
    for _ in range(5):
        world.arrive(6)
    three_seats_left = [("r0001", 1), ("r0002", 6), ("r0003", 6)]
    assert world.step() == three_seats_left


def test_priority_then_arrival_decides_who_is_admitted() -> None:
    world = World(max_num_seqs=1)
    world.arrive(2, priority=1)
    world.arrive(2, priority=0)
    world.arrive(2, priority=-1)
    order = [world.step()[0][0] for _ in range(3)]
    assert order == ["r0003", "r0002", "r0001"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.booleans()), max_size=3),
        min_size=1,
        max_size=10,
    ),
    num_pages=st.integers(6, 12),
)
def test_who_waits_for_a_load_delays_nobody(
    steps: list[list[tuple[int, int, bool]]], num_pages: int
) -> None:
    """The schedule of all others is the one they would have if the loading ones did not exist."""
    crowded, quiet = (World(num_pages=num_pages, max_num_seqs=3) for _ in range(2))
    crowded.add_prefix("slow", 3)
    names: dict[str, str] = {}
    for arrivals in steps:
        for prompt, new, loads in arrivals:
            crowd = crowded.arrive(prompt, new, "slow" if loads else None)
            if crowd is not None and not loads:
                alone = quiet.arrive(prompt, new)
                assert alone is not None
                names[crowd.request_id] = alone.request_id
        ran = [(names[id_], tokens) for id_, tokens in crowded.step()]
        assert ran == quiet.step()


def test_who_lacks_pages_holds_back_those_behind() -> None:
    world = World(num_pages=4)
    world.arrive(8, new=4)
    world.step()
    large = world.arrive(9, new=1)
    small = world.arrive(1, new=1)
    assert large is not None
    assert small is not None
    assert [id_ for id_, _ in world.step()] == ["r0001"]
    assert {large.status, small.status} == {Status.WAITING}, "the small one would fit"
    world.drain()


def test_hypotheses_that_compute_anew_are_not_starved_by_later_decodes() -> None:
    """Four take four tokens of a step's six. Three decode, and there are always more to come."""
    world = World(num_pages=400, max_num_seqs=12, max_num_batched_tokens=6)
    search = world.arrive(4, new=60, beams=4)
    assert search is not None
    group = search.beam_group
    assert group is not None
    while len({tuple(output[-3:-2]) for output in group.outputs}) < 2:
        world.step()  # until they differ in their last three: as many to compute anew for each
    for _ in range(4):
        world.arrive(1, new=30)
        world.step()
    world.scheduler._preempt(search)
    world.oracle.item(search.request_id).stop()
    known = len(group.outputs[0])
    for _ in range(100):
        world.arrive(1, new=9)
        world.step()
    assert len(group.outputs[0]) > known
    world.drain()


def test_a_prefix_without_pages_holds_back_those_behind() -> None:
    world = World(num_pages=4)
    world.add_prefix("p", 12)
    world.move("p", Place.HOST)
    world.arrive(5, new=3)
    world.step()
    world.arrive(1, new=1, prefix="p")
    world.arrive(1, new=1)
    assert [id_ for id_, _ in world.step()] == ["r0001"]
    assert world.place("p") is Place.HOST
    world.drain()


def test_a_failed_admission_reserves_nothing() -> None:
    world = World(num_pages=6)
    world.add_prefix("p", 4, Place.DEVICE)
    world.arrive(9, new=3)
    world.step()
    waiting = world.arrive(12, new=1, prefix="p")  # the prefix is there, its own pages are not
    assert waiting is not None
    free = world.allocator.num_free
    world.step()
    assert (waiting.status, waiting.pages, waiting.lease) == (Status.WAITING, [], None)
    assert world.allocator.num_free == free
    assert world.prefixes.entries[world.versions["p"].key].leases == 0


def test_a_broken_prefix_fails_its_requests_and_no_others() -> None:
    world = World()
    world.add_prefix("p", 4)
    world.move("p", Place.BROKEN)
    world.arrive(2, prefix="p")
    world.arrive(2)
    assert world.step() == [("r0002", 2)]
    assert not world.sequences


def test_the_last_in_order_is_preempted_and_gives_back_everything() -> None:
    world = World(num_pages=5)
    world.add_prefix("p", 4, Place.DEVICE)
    first = world.arrive(4, new=12)
    last = world.arrive(4, new=12, prefix="p")
    assert first is not None
    assert last is not None
    world.step()
    assert last.lease is not None
    assert last.num_tokens == 5
    while last.status is Status.RUNNING:
        world.step()
    # World.check has seen to it that no page and no lease is left with it.
    assert (last.num_computed, last.pages, last.lease) == (0, [], None)
    assert first.status is Status.RUNNING
    assert last.output_token_ids, "what it has generated stays, and is computed anew"
    world.drain()
    assert len(first.output_token_ids) == 12
    assert len(last.output_token_ids) == 12


def test_idle_prefixes_go_before_a_request_is_preempted() -> None:
    world = World(num_pages=3)
    world.add_prefix("idle", 4, Place.DEVICE)
    world.arrive(4, new=6)
    world.drain()
    assert world.scheduler.num_preemptions == 0
    assert world.place("idle") is Place.HOST


def test_a_pinned_prefix_is_evicted_only_for_a_request_that_runs_alone() -> None:
    world = World(num_pages=4)
    world.add_prefix("pinned", 4, Place.DEVICE, pinned=True)
    world.arrive(4, new=4)
    world.step()
    world.arrive(4, new=4)
    world.step()
    assert world.place("pinned") is Place.DEVICE, "the second can wait for the first to end"
    world.arrive(4, new=12, priority=-1)
    world.drain()
    assert world.place("pinned") is Place.HOST


def test_a_request_that_is_never_admitted_can_be_released() -> None:
    world = World()
    sequence = world.arrive(3)
    assert sequence is not None
    world.abort(sequence.request_id)
    assert world.step() == []
