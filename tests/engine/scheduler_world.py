"""A scheduler and its oracle side by side, fed the same events; every step must agree."""

from __future__ import annotations

from random import Random

from prefixd_server.engine.beam_group import BeamGroup
from prefixd_server.engine.beam_search import BeamSearch
from prefixd_server.engine.scheduler import Scheduler
from prefixd_server.engine.sequence import Sequence, Status
from prefixd_server.errors import StoreUnavailable
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.prefix.entry import Blocked, Entry, Lease
from prefixd_server.types import (
    BeamParams,
    EngineRequest,
    PrefixKey,
    PrefixVersion,
    SamplingParams,
)
from tests.engine.scheduler_oracle import HAS_PAGES, Item, Oracle, Place, Prefix

TENANT = "default"


def prefix_version(name: str, num_tokens: int) -> PrefixVersion:
    return PrefixVersion(TENANT, name, 1, f"sha-{name}", num_tokens, num_tokens)


class FakePrefixes:
    """Residency as the scheduler sees it: real pages and leases; the test moves the prefixes."""

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self.entries: dict[PrefixKey, Entry] = {}
        self.places: dict[PrefixKey, Place] = {}
        self.pinned: set[PrefixKey] = set()

    def add(self, version: PrefixVersion, place: Place, *, pinned: bool = False) -> None:
        self.entries[version.key] = Entry(version, self.allocator.page_size)
        self.places[version.key] = place
        if pinned:
            self.pinned.add(version.key)
        if place in HAS_PAGES:
            assert self._reserve(version.key, force=False)

    def acquire(self, key: PrefixKey, *, force: bool = False) -> Lease | Blocked:
        if self.places[key] is Place.BROKEN:
            raise StoreUnavailable("broken by the test")
        if self.places[key] is Place.HOST:
            if not self._reserve(key, force=force):
                return Blocked.NO_PAGES
            self.places[key] = Place.COPYING
        if self.places[key] is not Place.DEVICE:
            return Blocked.LOADING
        self.entries[key].leases += 1
        return Lease(self.entries[key], self._unlease)

    def make_room(self, num_pages: int, *, force: bool = False) -> bool:
        victims: list[PrefixKey] = []
        short = num_pages - self.allocator.num_free
        for key in sorted(self.entries):
            idle = self.places[key] is Place.DEVICE and not self.entries[key].leases
            if short > 0 and idle and (force or key not in self.pinned):
                victims.append(key)
                short -= len(self.entries[key].pages)
        if short > 0:
            return False
        for key in victims:
            self.allocator.release(self.entries[key].pages)
            self.entries[key].pages = ()
            self.places[key] = Place.HOST
        return True

    def owned_pages(self) -> list[tuple[int, ...]]:
        return [entry.pages for entry in self.entries.values()]

    def _reserve(self, key: PrefixKey, *, force: bool) -> bool:
        entry = self.entries[key]
        if not self.make_room(entry.num_pages, force=force):
            return False
        pages = self.allocator.allocate(entry.num_pages)
        assert pages is not None
        entry.pages = tuple(pages)
        return True

    def _unlease(self, entry: Entry) -> None:
        entry.leases -= 1
        assert entry.leases >= 0


class World:
    def __init__(
        self,
        *,
        num_pages: int = 12,
        page_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_prefill_tokens: int = 16,
        prompt_cache: bool = False,
    ) -> None:
        self.allocator = PageAllocator(num_pages, page_size)
        self.prefixes = FakePrefixes(self.allocator)
        limits = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_prefill_tokens": max_prefill_tokens,
        }
        self.scheduler = Scheduler(
            self.allocator, self.prefixes, prompt_cache=prompt_cache, **limits
        )
        self.oracle = Oracle(num_pages, page_size, caches=prompt_cache, **limits)
        self.sequences: dict[str, Sequence] = {}
        self.versions: dict[str, PrefixVersion] = {}
        self.num_arrived = 0
        self.num_forks = self.num_forks_again = 0
        self.rng = Random(num_pages)
        """which hypotheses have which children"""

    def add_prefix(
        self, name: str, num_tokens: int, place: Place = Place.AWAY, *, pinned: bool = False
    ) -> None:
        version = self.versions[name] = prefix_version(name, num_tokens)
        self.prefixes.add(version, place, pinned=pinned)
        num_pages = pages_for(num_tokens, self.allocator.page_size)
        self.oracle.prefixes[name] = Prefix(num_pages, pinned, place)

    def arrive(
        self,
        prompt: int,
        new: int = 1,
        prefix: str | None = None,
        *,
        priority: int = 0,
        beams: int = 1,
        alike: int | None = None,
    ) -> Sequence | None:
        """A request, or None if not even an empty pool has room for it (admission refuses it).

        ``alike``: after so many tokens its prompt is like nobody's; by default all are alike.
        """
        version = self.versions[prefix] if prefix else None
        size = self.allocator.page_size
        most = min(self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens)
        needed = prompt // size + beams * (pages_for(prompt + new, size) - prompt // size)
        needed += pages_for(version.num_virtual_tokens, size) if version else 0
        if needed > self.allocator.num_pages or beams > most:
            return None
        self.num_arrived += 1
        request = EngineRequest(
            request_id=f"r{self.num_arrived:04}",
            tenant=TENANT,
            task=prefix,
            version=None,
            prompt_token_ids=tuple(
                i if alike is None or i < alike else i + 1000 * self.num_arrived
                for i in range(prompt)
            ),
            sampling=SamplingParams(max_new_tokens=new),
            deadline=float("inf"),
            priority=priority,
            arrival=float(self.num_arrived // 2),  # some arrive at the same moment
        )
        sequence = Sequence(request, request.prompt_token_ids, version)
        if beams > 1:
            search = BeamSearch(BeamParams(beams), max_new_tokens=new, ending_ids=frozenset())
            sequence.beam_group = BeamGroup(sequence, search)
        self.scheduler.add(sequence)
        self.sequences[request.request_id] = sequence
        self.oracle.items.append(
            Item(sequence.order, list(request.prompt_token_ids), new, prefix, beams=beams)
        )
        return sequence

    def abort(self, id_: str) -> None:
        self._release(self.sequences.pop(id_))
        self.oracle.remove(id_)

    def poison(self, id_: str) -> None:
        """Its logits are not finite: it ends, and what it knew is not found again."""
        self.scheduler.prompt_cache.drop(self.sequences[id_])
        self.oracle.drop(self.oracle.item(id_))
        self.abort(id_)

    def move(self, name: str, place: Place) -> None:
        """A load goes on, ends or fails."""
        entry = self.prefixes.entries[self.versions[name].key]
        if entry.pages and place not in HAS_PAGES:
            assert not entry.leases
            self.allocator.release(entry.pages)
            entry.pages = ()
        assert bool(entry.pages) == (place in HAS_PAGES)
        self.prefixes.places[entry.key] = self.oracle.prefixes[name].place = place

    def place(self, name: str) -> Place:
        return self.oracle.prefixes[name].place

    def step(self) -> list[tuple[str, int]]:
        """One step of both. Asserts that they agree and returns what ran: (id, tokens)."""
        before = [sequence.request_id for sequence in self.scheduler.running]
        step = self.scheduler.schedule()
        decision = self.oracle.decide()

        scheduled = [(item.sequence.request_id, item.num_tokens) for item in step.scheduled]
        assert scheduled == decision.scheduled
        assert [sequence.request_id for sequence, _ in step.failed] == decision.failed
        preempted = {id_ for id_ in before if self.sequences[id_].status is Status.WAITING}
        assert preempted == set(decision.preempted)
        self._check_limits(scheduled)
        self._check_places()

        for sequence, num_tokens in step.scheduled:
            sequence.num_computed += num_tokens
            if sequence.num_uncomputed == 0 and sequence.request_id not in self.searches:
                self.scheduler.prompt_cache.offer(sequence)
                sequence.output_token_ids.append(0)
        done = self.oracle.commit(decision)
        for id_ in sorted(self.searches & dict(scheduled).keys()):
            if self._search(self.sequences[id_]):
                done.append(id_)
                self.oracle.remove(id_)
        for id_ in done:
            self._release(self.sequences.pop(id_))
        self.check()
        return scheduled

    @property
    def searches(self) -> set[str]:
        return {id_ for id_, sequence in self.sequences.items() if sequence.beam_group}

    def _search(self, sequence: Sequence) -> bool:
        """Fork, or let each hypothesis be followed by a child of any; whether that is the end."""
        group = sequence.beam_group
        assert group is not None
        if sequence.branches[0].num_uncomputed:
            return False
        self.scheduler.prompt_cache.offer(sequence)
        self.oracle.offer(self.oracle.item(sequence.request_id))
        k = group.num_beams
        parents = [self.rng.randrange(k) for _ in range(k)]
        outputs = group.outputs
        if group.beams or not outputs:
            before = outputs or [[]] * k
            outputs = [[*before[parent], self.rng.randrange(2)] for parent in parents]
        if len(outputs[0]) == sequence.params.max_new_tokens:
            return True
        if group.beams:
            group.follow(self.allocator, parents, outputs)
        else:
            self.num_forks += 1
            self.num_forks_again += outputs is group.outputs
            group.fork(self.allocator, outputs)
            parents = list(range(k))
        self.oracle.branch(sequence.request_id, parents, outputs)
        return False

    def check(self) -> None:
        self.scheduler.check()
        self.allocator.check([*self.scheduler.owned_pages(), *self.prefixes.owned_pages()])
        assert self.allocator.num_free == self.oracle.free()
        cache = self.scheduler.prompt_cache
        assert len(cache.pages) == len(self.oracle.cached)
        assert cache.pages.num_evictions == self.oracle.num_evictions
        assert cache.num_hit_tokens == self.oracle.num_hits
        assert cache.num_queried_tokens == self.oracle.num_looked_up
        for queue, items in (
            (self.scheduler.waiting, self.oracle.waiting()),
            (self.scheduler.running, self.oracle.running()),
        ):
            assert [s.request_id for s in queue] == [item.id for item in items]
        for key, entry in self.prefixes.entries.items():
            leased = [s for s in self.scheduler.running if s.prefix and s.prefix.key == key]
            assert entry.leases == len(leased)

    def drain(self) -> int:
        """Let every load succeed until all requests have ended; the number of steps it took."""
        total = sum(item.beams * (item.prompt + item.new) for item in self.oracle.items)
        bound = 4 + (len(self.oracle.items) + 1) * (total + 2 * len(self.versions))
        for steps in range(bound):
            if not self.sequences:
                return steps
            for name in self.versions:
                if self.place(name) in (Place.AWAY, Place.BROKEN):
                    self.move(name, Place.HOST)
                elif self.place(name) is Place.COPYING:
                    self.move(name, Place.DEVICE)
            self.step()
        raise AssertionError(f"{sorted(self.sequences)} starve: not done after {bound} steps")

    def _release(self, sequence: Sequence) -> None:
        for _ in range(2):  # idempotent
            self.scheduler.release(sequence)
        assert sequence.status is Status.FINISHED
        assert not sequence.pages
        assert sequence.lease is None

    def _check_limits(self, scheduled: list[tuple[str, int]]) -> None:
        for id_, tokens in set(scheduled):
            width = len(self.sequences[id_].branches)
            assert scheduled.count((id_, tokens)) == width, "hypotheses run in lockstep"
        assert len(set(scheduled)) == len(dict(scheduled))
        assert all(num_tokens > 0 for _, num_tokens in scheduled)
        budget = self.scheduler.max_num_batched_tokens
        assert sum(num_tokens for _, num_tokens in scheduled) <= budget
        seats = sum(sequence.num_seats for sequence in self.scheduler.running)
        assert seats <= self.scheduler.max_num_seqs
        for id_, num_tokens in scheduled:
            sequence = self.sequences[id_]
            for branch in sequence.branches:
                room = len(branch.pages) * self.allocator.page_size
                assert branch.num_computed + num_tokens <= room

    def _check_places(self) -> None:
        places = {name: self.prefixes.places[v.key] for name, v in self.versions.items()}
        assert places == {name: self.place(name) for name in self.versions}
