"""Registry and residency together against a simple model, one operation at a time.

Loader jobs run when hypothesis says, in any order, and may fail; after every operation each
invariant is checked and each leased prefix is compared with what was uploaded.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixd_server.config import LimitsConfig
from prefixd_server.errors import Conflict, CorruptBlob, InvalidRequest, NotFound
from prefixd_server.prefix import Blocked, Lease, References, Registry
from prefixd_server.types import PrefixKey, PrefixState, PrefixVersion
from prefixd_store.records import VersionRecord
from tests.prefix.support import TENANT, World, write_blob

TASKS = ["a", "b", "c"]
SIZES = {0: 1, 1: 5, 2: 9, 3: 24, 4: 25}
"""seed → virtual tokens; with 6 pages of 4, seed 3 fills the pool and seed 4 is too large"""

tasks = st.sampled_from(TASKS)
seeds = st.sampled_from(sorted(SIZES))
indices = st.integers(0, 7)


@dataclass
class Request:
    version: PrefixVersion
    seed: int
    lease: Lease | None = None


class PrefixMachine(RuleBasedStateMachine):
    @initialize(
        host_cache_bytes=st.sampled_from([0, 1500, 1 << 20]), load_threads=st.integers(1, 3)
    )
    def start(self, host_cache_bytes: int, load_threads: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.world = World(
            self.folder,
            (),
            num_pages=6,
            host_cache_bytes=host_cache_bytes,
            load_threads=load_threads,
            max_device_prefixes=2,
            load_retry_s=0,
        )
        self.host_cache_bytes = host_cache_bytes
        self.residency = self.world.residency
        self.registry = Registry(self.world.store, LimitsConfig())
        self.registry.on_change(References(self.residency))
        self.records = {seed: write_blob(self.world.blobs, p, seed) for seed, p in SIZES.items()}
        self.seeds = {record.sha256: seed for seed, record in self.records.items()}
        self.model: dict[str, dict[int, int]] = {}
        """task → version → seed"""
        self.active: dict[str, int | None] = {}
        self.next_version: dict[str, int] = {}
        self.requests: list[Request] = []
        self.own_pages: list[int] = []
        self.ever_broken: set[int] = set()
        for task, seed in zip(TASKS, (1, 2, 3), strict=True):
            self.publish(task, seed)

    # --- changes ---------------------------------------------------------------------------------
    @rule(task=tasks, seed=seeds)
    def publish(self, task: str, seed: int) -> None:
        record: VersionRecord = self.records[seed]
        put = self.registry.publish(TENANT, task, self.world.blobs / record.sha256, record)
        versions = self.model.setdefault(task, {})
        known = [number for number, other in versions.items() if other == seed]
        number = known[0] if known else self.next_version.get(task, 1)
        assert (put.version.version, put.created) == (number, not known)
        versions[number] = seed
        self.active[task] = number
        self.next_version[task] = max(number + 1, self.next_version.get(task, 1))

    # One rule for all four, or hypothesis spends its steps here and few requests get far.
    @rule(kind=st.sampled_from("avtp"), task=tasks, number=st.integers(1, 3))
    def change(self, kind: str, task: str, number: int) -> None:
        match kind:
            case "a":
                self.activate(task, number)
            case "v":
                self.delete_version(task, number)
            case "t":
                self.delete_task(task)
            case _:
                self.pin_task(task, number == 1)

    def activate(self, task: str, number: int) -> None:
        if number in self.model.get(task, {}):
            self.registry.activate(TENANT, task, {number: 1.0})
            self.active[task] = number
        else:
            with pytest.raises(NotFound):
                self.registry.activate(TENANT, task, {number: 1.0})

    def delete_version(self, task: str, number: int) -> None:
        versions = self.model.get(task, {})
        if number not in versions:
            with pytest.raises(NotFound):
                self.registry.delete_version(TENANT, task, number)
        elif self.active[task] == number and len(versions) > 1:
            with pytest.raises(Conflict):
                self.registry.delete_version(TENANT, task, number)
        else:
            self.registry.delete_version(TENANT, task, number)
            del versions[number]
            if self.active[task] == number:
                self.active[task] = None

    def delete_task(self, task: str) -> None:
        if task not in self.model:
            with pytest.raises(NotFound):
                self.registry.delete_task(TENANT, task)
            return
        self.registry.delete_task(TENANT, task)
        del self.model[task], self.active[task], self.next_version[task]

    def pin_task(self, task: str, pinned: bool) -> None:
        if task in self.model:
            self.registry.update(TENANT, task, {"pinned": pinned})

    # --- requests --------------------------------------------------------------------------------
    @precondition(lambda self: self.model and len(self.requests) < 8)
    @rule(task=tasks, number=st.sampled_from([None, None, None, 1, 2]))
    def arrive(self, task: str, number: int | None) -> None:
        wanted = self.active.get(task) if number is None else number
        seed = self.model.get(task, {}).get(wanted or 0)
        if seed is None:
            with pytest.raises(NotFound):
                self.registry.resolve(TENANT, task, number, 0.5)
            return
        version = self.registry.resolve(TENANT, task, number, 0.5)
        assert (version.version, self.seeds[version.sha256]) == (wanted, seed)
        if SIZES[seed] > 24:
            with pytest.raises(InvalidRequest):
                self.residency.pin(version)
            return
        self.residency.pin(version)
        self.requests.append(Request(version, seed))

    @precondition(lambda self: self.requests)
    @rule(force=st.booleans(), polls=st.booleans())
    def engine_step(self, force: bool, polls: bool) -> None:
        """Every waiting request asks, in order, until one has to wait for pages."""
        if polls:
            self.residency.poll()
        for request in [r for r in self.requests if r.lease is None]:
            before = self.residency.state(request.version.key)
            try:
                answer = self.residency.acquire(request.version.key, force=force)
            except CorruptBlob:
                assert request.seed in self.ever_broken
                continue
            if isinstance(answer, Lease):
                assert before in (PrefixState.DEVICE, PrefixState.RETIRING)
                request.lease = answer
            elif answer is Blocked.NO_PAGES:
                assert before in (PrefixState.HOST, PrefixState.RETIRING)
                break

    @precondition(lambda self: self.requests)
    @rule(index=indices)
    def finish(self, index: int) -> None:
        request = self.requests.pop(index % len(self.requests))
        if request.lease is not None:
            request.lease.release()
            request.lease.release()
        self.residency.unpin(request.version.key)

    @rule(count=st.integers(0, 6), force=st.booleans())
    def pages(self, count: int, force: bool) -> None:
        if self.own_pages:
            self.world.allocator.release(self.own_pages)
            self.own_pages = []
        else:
            self.take_pages(count, force)

    def take_pages(self, count: int, force: bool) -> None:
        """A request's own tokens."""
        allocator = self.world.allocator
        free, resident = allocator.num_free, self.residency.resident
        if self.residency.make_room(count, force=force):
            pages = allocator.allocate(count)
            assert pages is not None
            self.own_pages += pages
        else:
            assert (allocator.num_free, self.residency.resident) == (free, resident)

    # --- loading ---------------------------------------------------------------------------------
    @precondition(lambda self: self.world.executor.jobs)
    @rule(index=indices, polls=st.booleans())
    def run_job(self, index: int, polls: bool) -> None:
        self.world.executor.run(index % len(self.world.executor.jobs))
        if polls:
            self.residency.poll()

    @rule()
    def poll(self) -> None:
        self.residency.poll()
        named = {seed for versions in self.model.values() for seed in versions.values()}
        for seed, record in self.records.items():
            state = self.residency.state(PrefixKey(TENANT, record.sha256))
            if state is PrefixState.RETIRING:
                # Named again: a request or a job still holds it from before.
                held = any(r.seed == seed for r in self.requests) or self.world.executor.jobs
                assert seed not in named or held
            elif seed not in named:
                assert state is PrefixState.STORED

    @rule(seed=seeds, broken=st.booleans())
    def break_blob(self, seed: int, broken: bool) -> None:
        if broken:
            self.ever_broken.add(seed)
            self.world.store.errors[self.records[seed].sha256] = CorruptBlob("torn by the test")
        else:
            self.world.store.errors.pop(self.records[seed].sha256, None)

    # --- what always holds -----------------------------------------------------------------------
    @invariant()
    def every_page_has_its_owner(self) -> None:
        self.residency.check()
        self.world.allocator.check([*self.residency.owned_pages(), self.own_pages])

    @invariant()
    def there_is_one_copy_and_it_is_right(self) -> None:
        pages: dict[PrefixKey, tuple[int, ...]] = {}
        for request in self.requests:
            if request.lease is not None:
                assert pages.setdefault(request.version.key, request.lease.pages) == (
                    request.lease.pages
                )
                self.world.assert_holds(request.lease, request.seed)

    @invariant()
    def bounds_hold(self) -> None:
        assert self.residency.resident["device"] <= 2
        if self.host_cache_bytes == 0:
            held = [r for r in self.requests if r.lease is None]
            assert self.residency.resident["host"] <= len(held)

    def teardown(self) -> None:
        """With faults gone and the others out of the way, every request gets its prefix."""
        if not hasattr(self, "world"):
            return
        self.world.store.errors.clear()
        for request in self.requests:
            if request.lease is not None:
                request.lease.release()
            self.residency.unpin(request.version.key)
        self.world.allocator.release(self.own_pages)
        self.world.settle()
        for request in self.requests:
            lease = self.world.lease(request.version)
            self.world.assert_holds(lease, request.seed)
            self.world.release(lease)
        self.residency.close()
        assert self.world.allocator.num_used == 0
        shutil.rmtree(self.folder)


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
