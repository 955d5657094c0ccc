"""Who runs in the next step, and with how many tokens. No tensors, no model.

Each step has a budget of tokens. Running sequences come first, decodes before prefill chunks, then
waiting ones are admitted in order of (priority, arrival). Admission reserves the prefix's lease and
the pages of all tokens known so far, or changes nothing. A sequence whose prefix is still loading
is passed over; one that lacks pages holds back those behind it, so that it is not starved.

An encoder-decoder's encoder runs whole, in the step that admits its sequence. The first that is
admitted in a step may be longer than the budget, or a long text would never run.

When a decode needs a page and none is free, idle prefixes are evicted; then the running sequence
that is last in order is preempted: it waits again, and its tokens are computed anew.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple, Protocol

from prefixd_server.engine.sequence import Sequence, Status
from prefixd_server.errors import PrefixdError
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.prefix.entry import Blocked, Lease
from prefixd_server.types import PrefixKey

__all__ = ["PrefixSource", "Scheduled", "Scheduler", "Step"]


class PrefixSource(Protocol):
    """What the scheduler asks of the residency of prefixes."""

    def acquire(self, key: PrefixKey, *, force: bool = False) -> Lease | Blocked:
        """A lease on the prefix's pages, or why there is none yet; raises a failed load's error."""

    def make_room(self, num_pages: int, *, force: bool = False) -> bool:
        """Evict idle prefixes until the allocator has so many free pages, or evict nothing.

        ``force`` evicts the prefixes of pinned tasks too: nothing runs, so nothing else can end.
        """


class Scheduled(NamedTuple):
    sequence: Sequence
    num_tokens: int
    """how many of its uncomputed tokens run in this step"""


class Step(NamedTuple):
    scheduled: list[Scheduled]
    failed: list[tuple[Sequence, PrefixdError]]
    """waiting sequences whose prefix cannot be had; the engine ends them"""


class Scheduler:
    def __init__(
        self,
        allocator: PageAllocator,
        prefixes: PrefixSource,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.allocator = allocator
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # kept in order
        self.running: list[Sequence] = []  # kept in order
        self.num_preemptions = 0
        self._preempted = False

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> Step:
        scheduled, budget = self._schedule_running()
        failed: list[tuple[Sequence, PrefixdError]] = []
        if not self._preempted:
            # After a preemption there is no room for more.
            self._admit_waiting(scheduled, budget, failed)
        return Step(scheduled, failed)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out and give back what it holds. Idempotent; the only way out."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._give_back(sequence)

    def owned_pages(self) -> list[list[int]]:
        """Each running sequence's own page lists, for :meth:`PageAllocator.check`."""
        return [pages for sequence in self.running for pages in _held(sequence)]

    def check(self) -> None:
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert queue == sorted(queue, key=_order)
            assert all(sequence.status is status for sequence in queue)
        assert len(self.running) <= self.max_num_seqs
        for sequence in self.waiting:
            assert not any(_held(sequence))
            assert sequence.lease is None
            assert sequence.num_computed == 0
        for sequence in self.running:
            assert 0 <= sequence.num_computed < sequence.num_tokens
            held = len(sequence.pages) * self.allocator.page_size
            assert held >= sequence.num_computed
            held = len(sequence.cross_pages) * self.allocator.page_size
            assert held >= len(sequence.encoder_token_ids)
            assert (sequence.lease is None) == (sequence.prefix is None)

    # --- running ---------------------------------------------------------------------------------

    def _schedule_running(self) -> tuple[list[Scheduled], int]:
        self._preempted = False
        budget = self.max_num_batched_tokens
        scheduled: list[Scheduled] = []
        decodes = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        prefills = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        for sequence in decodes + prefills:
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it
            num_tokens = min(sequence.num_uncomputed, budget)
            if not self._grow(sequence, sequence.num_computed + num_tokens):
                continue
            scheduled.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
        return scheduled, budget

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence pages for ``num_tokens``, preempting from the end of the order.

        Only decodes lack pages (admission reserved a prefill's) and they grow in order, so no
        victim is in this step already.
        """
        missing = pages_for(num_tokens, self.allocator.page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        while (pages := self._allocate(missing, force=len(self.running) == 1)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self.add(sequence)
        self.num_preemptions += 1
        self._preempted = True

    # --- waiting ---------------------------------------------------------------------------------

    def _admit_waiting(
        self,
        scheduled: list[Scheduled],
        budget: int,
        failed: list[tuple[Sequence, PrefixdError]],
    ) -> None:
        admitted: list[Sequence] = []
        for sequence in self.waiting:
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                break
            if admitted and budget <= sequence.num_unencoded:
                break
            try:
                outcome = self._reserve(sequence)
            except PrefixdError as error:
                failed.append((sequence, error))
                continue
            if outcome is Blocked.LOADING:
                continue
            if outcome is Blocked.NO_PAGES:
                break
            admitted.append(sequence)
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_order)
            budget = max(1, budget - sequence.num_unencoded)
            num_tokens = min(sequence.num_uncomputed, budget)
            scheduled.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
        if admitted:
            self.waiting = [s for s in self.waiting if s.status is Status.WAITING]

    def _reserve(self, sequence: Sequence) -> Blocked | None:
        """Lease the prefix and take the pages of all tokens so far (None), or change nothing."""
        lease: Lease | None = None
        if sequence.prefix is not None:
            outcome = self.prefixes.acquire(sequence.prefix.key, force=not self.running)
            if isinstance(outcome, Blocked):
                return outcome
            lease = outcome
        cross = pages_for(len(sequence.encoder_token_ids), self.allocator.page_size)
        needed = cross + pages_for(sequence.num_tokens, self.allocator.page_size)
        # One spare page for each running sequence's next growth, or admitting this one would soon
        # preempt it again.
        pages = self._allocate(needed, spare=len(self.running), force=not self.running)
        if pages is None:
            if lease is not None:
                lease.release()
            return Blocked.NO_PAGES
        sequence.cross_pages, sequence.pages = pages[:cross], pages[cross:]
        sequence.lease = lease
        return None

    # --- pages -----------------------------------------------------------------------------------

    def _allocate(self, count: int, spare: int = 0, *, force: bool) -> list[int] | None:
        wanted = count + spare
        if self.allocator.num_free < wanted and not self.prefixes.make_room(wanted, force=force):
            return None
        return self.allocator.allocate(count)

    def _give_back(self, sequence: Sequence) -> None:
        for pages in _held(sequence):
            self.allocator.release(pages)
        sequence.pages, sequence.cross_pages = [], []
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None


def _held(sequence: Sequence) -> tuple[list[int], list[int]]:
    return sequence.pages, sequence.cross_pages


def _order(sequence: Sequence) -> tuple[int, float, str]:
    return sequence.order
