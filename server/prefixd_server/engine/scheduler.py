"""Who runs in the next step, and with how many tokens. No tensors, no model.

Each step has a budget of tokens. Running sequences come first, decodes before prefill chunks, then
waiting ones are admitted in order of (priority, arrival). Beside decodes, prompts have a smaller
budget of their own: the longer a step, the longer those wait for their next token. It is larger
where several prompts wait for each decode, who together lose more by waiting. Admission
reserves the prefix's lease and the pages of all tokens known so far, or changes nothing. A sequence
whose prefix is still loading is passed over; one that lacks pages holds back those behind it, so
that it is not starved.

An encoder-decoder's encoder runs whole, in the step that admits its sequence. The first that is
admitted in a step may be longer than the budget, or a long text would never run.

When a decode needs a page and none is free, idle prefixes are evicted; then the running sequence
that is last in order is preempted: it waits again, and its tokens are computed anew.

Admission takes what the prompt cache has of the sequence's tokens, as pages that others may own
too, and only the rest is computed. Cached pages without an owner are free pages to all others.

A beam search is one sequence here until its prompt has run, then k in lockstep (``beam_group``):
all of them in a step or none, admitted and preempted together. It takes k seats from the start.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple, Protocol

from prefixd_server.engine.prompt_cache import PromptCache
from prefixd_server.engine.sequence import Sequence, Status
from prefixd_server.errors import PrefixdError
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.kv.tables import Copy, make_writable, pages_to_write
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
    copies: list[Copy]
    """pages whose contents must be copied before the step runs"""


class Scheduler:
    def __init__(
        self,
        allocator: PageAllocator,
        prefixes: PrefixSource,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens: int | None = None,
        prompt_cache: bool = False,
    ) -> None:
        """``max_prefill_tokens``: of prompts, in a step with decodes, or that many times the
        prompts that wait for each decode; None: what those leave."""
        self.allocator = allocator
        self.prefixes = prefixes
        self.prompt_cache = PromptCache(allocator, enabled=prompt_cache)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens = max_prefill_tokens or max_num_batched_tokens
        self.waiting: list[Sequence] = []  # kept in order
        self.running: list[Sequence] = []  # kept in order
        self.num_preemptions = 0
        self._preempted = False
        self._copies: list[Copy] = []

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> Step:
        scheduled, budget = self._schedule_running()
        failed: list[tuple[Sequence, PrefixdError]] = []
        if not self._preempted:
            # After a preemption there is no room for more.
            self._admit_waiting(scheduled, budget, failed)
        copies, self._copies = self._copies, []
        return Step(scheduled, failed, copies)

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
        self.prompt_cache.check()
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert queue == sorted(queue, key=_order)
            assert all(sequence.status is status for sequence in queue)
        assert self._num_seats <= self.max_num_seqs
        for sequence in self.waiting:
            assert list(sequence.branches) == [sequence]
            assert not any(_held(sequence))
            assert sequence.lease is None
            assert sequence.num_computed == 0
        for sequence in self.running:
            held = len(sequence.cross_pages) * self.allocator.page_size
            assert held >= len(sequence.encoder_token_ids)
            assert (sequence.lease is None) == (sequence.prefix is None)
            assert len(sequence.branches) in (1, sequence.num_seats)
            assert len({(b.num_computed, b.num_tokens) for b in sequence.branches}) == 1
            for branch in sequence.branches:
                assert branch.lease is sequence.lease
                assert 0 <= branch.num_computed < branch.num_tokens
                held = len(branch.pages) * self.allocator.page_size
                assert held >= branch.num_computed

    @property
    def _num_seats(self) -> int:
        return sum(sequence.num_seats for sequence in self.running)

    # --- running ---------------------------------------------------------------------------------

    def _schedule_running(self) -> tuple[list[Scheduled], int]:
        self._preempted = False
        scheduled: list[Scheduled] = []
        decodes = [s for s in self.running if s.branches[0].num_uncomputed == 1]
        prefills = [s for s in self.running if s.branches[0].num_uncomputed > 1]
        budget, some_wait = self._in_turn(decodes, self.max_num_batched_tokens, scheduled)
        if scheduled:
            budget = min(budget, self._prefill_budget(len(scheduled)))
        budget, more_wait = self._in_turn(prefills, budget, scheduled)
        # Beams that the step had no room for would wait for ever if others kept arriving.
        return scheduled, 0 if some_wait or more_wait else budget

    def _prefill_budget(self, num_decodes: int) -> int:
        """Tokens of prompts beside so many decodes."""
        # Not all that wait: those without a seat gain nothing by a longer step.
        num_wanted = min(len(self.waiting) + len(self.running), self.max_num_seqs)
        return self.max_prefill_tokens * max(1, num_wanted // num_decodes - 1)

    def _in_turn(
        self, sequences: list[Sequence], budget: int, scheduled: list[Scheduled]
    ) -> tuple[int, bool]:
        """Returns what is left of the budget, and whether beams were passed over."""
        passed_over = False
        for sequence in sequences:
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it
            branches = sequence.branches
            num_tokens = min(branches[0].num_uncomputed, budget // len(branches))
            if num_tokens == 0:
                passed_over = True
                continue
            if not self._grow(sequence, num_tokens):
                continue
            scheduled += [Scheduled(branch, num_tokens) for branch in branches]
            budget -= num_tokens * len(branches)
        return budget, passed_over

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it pages to write ``num_tokens`` more in, preempting from the end of the order.

        Only decodes lack pages (admission reserved a prefill's) and they grow in order, so no
        victim is in this step already.
        """
        start = sequence.branches[0].num_computed
        stop = start + num_tokens
        if sequence.beam_group is None and stop <= len(sequence.pages) * self.allocator.page_size:
            return True  # only hypotheses share pages that are written to
        tables = [branch.pages for branch in sequence.branches]
        pages = sequence.beam_group.reserve if sequence.beam_group else []
        missing = pages_to_write(self.allocator, tables, start, stop) - len(pages)
        while missing > 0:
            new = self._allocate(missing, force=len(self.running) == 1)
            if new is not None:
                pages += new
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self._copies += make_writable(self.allocator, tables, start, stop, pages)
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
            if budget == 0 or self._num_seats + sequence.num_seats > self.max_num_seqs:
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
        size, group = self.allocator.page_size, sequence.beam_group
        cross = pages_for(len(sequence.encoder_token_ids), size)
        own = pages_for(sequence.num_tokens, size)
        needed = cross + (group.pages_known(size) if group else own)
        cached = self.prompt_cache.take(sequence)
        # One spare page for each running sequence's next growth, or admitting this one would soon
        # preempt it again.
        pages = self._allocate(needed - len(cached), spare=self._num_seats, force=not self.running)
        if pages is None:
            self.allocator.release(reversed(cached))
            if lease is not None:
                lease.release()
            return Blocked.NO_PAGES
        end = cross + own - len(cached)
        sequence.cross_pages, sequence.pages = pages[:cross], cached + pages[cross:end]
        sequence.lease = lease
        self.prompt_cache.admitted(sequence, len(cached))
        if group:
            group.reserve = pages[end:]
        return None

    # --- pages -----------------------------------------------------------------------------------

    def _allocate(self, count: int, spare: int = 0, *, force: bool) -> list[int] | None:
        wanted = count + spare
        if self.allocator.num_free < wanted and not self.prefixes.make_room(wanted, force=force):
            return None
        return self.allocator.allocate(count)

    def _give_back(self, sequence: Sequence) -> None:
        for pages in _held(sequence):
            # The end of a prompt is of no use without its beginning, so it is given away first.
            self.allocator.release(reversed(pages))
        sequence.pages, sequence.cross_pages = [], []
        if sequence.beam_group:
            sequence.beam_group.collapse()
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None


def _held(sequence: Sequence) -> list[list[int]]:
    """All page lists that it owns, its hypotheses' among them."""
    reserve = sequence.beam_group.reserve if sequence.beam_group else []
    return [*(branch.pages for branch in sequence.branches), sequence.cross_pages, reserve]


def _order(sequence: Sequence) -> tuple[int, float, str]:
    return sequence.order
