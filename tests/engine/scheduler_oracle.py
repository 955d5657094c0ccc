"""The scheduler's policy once more, slowly: counts instead of pages, and nothing kept that can be
computed from scratch. Shares no code with the scheduler."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field


class Place(enum.Enum):
    """Where a prefix is, as far as a scheduler can tell."""

    AWAY = "not in host memory: others may pass"
    HOST = "asking for it reserves its pages and starts the copy"
    COPYING = "its pages are reserved"
    DEVICE = "it can be leased"
    BROKEN = "asking for it raises"


HAS_PAGES = (Place.COPYING, Place.DEVICE)

Page = tuple[int, ...]
"""Known by when its tokens were written. No two tokens are written at once."""
History = tuple[object, ...]
"""A prefix and the tokens after it"""


@dataclass
class Prefix:
    num_pages: int
    pinned: bool
    place: Place = Place.AWAY


@dataclass
class Item:
    order: tuple[int, float, str]
    tokens: list[int]
    """the prompt's, and then those generated, unless it is a search"""
    new: int
    prefix: str | None
    output: int = 0
    computed: int = 0
    pages: int = 0
    reserve: int = 0
    """taken by admission for when it forks again"""
    running: bool = False
    beams: int = 1
    outputs: list[list[int]] = field(default_factory=list)
    """of a beam search: each hypothesis's tokens, once there are any"""
    writes: list[list[int]] = field(default_factory=lambda: [[]])
    """for each hypothesis, or for itself, when each of its tokens was written. What two hypotheses
    have in common was written once, before they parted."""
    prompt: int = 0
    offered: int = 0
    """its first pages that came out of the cache, or that it was asked to keep"""
    named: int = 0
    """its first pages that it has ever looked for or offered"""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def todo(self) -> int:
        return self.prompt + self.output - self.computed

    @property
    def width(self) -> int:
        return len(self.writes)

    @property
    def forked(self) -> bool:
        return len(self.writes) > 1

    def stop(self) -> None:
        """Preempted: what the hypotheses begin with together is computed anew by one."""
        self.running, self.computed, self.writes = False, 0, [[]]
        self.pages = self.reserve = 0
        if self.outputs:
            alike = (len(set(column)) == 1 for column in zip(*self.outputs, strict=True))
            common = sum(1 for _ in itertools.takewhile(bool, alike))
            self.output = min(common, len(self.outputs[0]) - 1)

    @property
    def id(self) -> str:
        return self.order[2]


@dataclass
class Decision:
    scheduled: list[tuple[str, int]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    decoded: int | None = None
    """tokens of decodes; None as long as they are being decided"""


@dataclass
class Oracle:
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_tokens: int
    caches: bool = False
    items: list[Item] = field(default_factory=list)
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    num_writes: int = 0
    cached: dict[History, Page] = field(default_factory=dict)
    """what can be found again, in use or not"""
    left_at: dict[Page, int] = field(default_factory=dict)
    """when the last who used it let go of it"""
    num_evictions: int = 0
    num_hits: int = 0
    num_looked_up: int = 0
    looked_up: set[str] = field(default_factory=set)

    def running(self) -> list[Item]:
        return sorted((i for i in self.items if i.running), key=lambda item: item.order)

    def waiting(self) -> list[Item]:
        return sorted((i for i in self.items if not i.running), key=lambda item: item.order)

    def free(self) -> int:
        unwritten = sum(
            item.reserve + item.pages - self._pages(len(item.writes[0]))
            for item in self.items
            if not item.forked
        )
        reserve = sum(item.reserve for item in self.items if item.forked)
        shared = sum(p.num_pages for p in self.prefixes.values() if p.place in HAS_PAGES)
        return self.num_pages - len(self._held()) - unwritten - reserve - shared

    def decide(self) -> Decision:
        decision = Decision()
        someone_waits = False
        decodes = [item for item in self.running() if item.todo == 1]
        prefills = [item for item in self.running() if item.todo > 1]
        for number, item in enumerate([*decodes, *prefills]):
            if number == len(decodes):
                decision.decoded = sum(tokens for _, tokens in decision.scheduled)
            tokens = min(item.todo, self._left(decision) // item.width)
            if item.running and not tokens:
                someone_waits = True
            elif item.running and self._grow(item, tokens, decision):
                decision.scheduled += [(item.id, tokens)] * item.width
        if not prefills:
            decision.decoded = sum(tokens for _, tokens in decision.scheduled)
        if not decision.preempted and not someone_waits:
            for item in self._admitted(decision):
                decision.scheduled.append((item.id, min(item.todo, self._left(decision))))
        return decision

    def commit(self, decision: Decision) -> list[str]:
        """What the engine does after the forward; the ids of those that have ended.

        Hypotheses do not move on by themselves: ``branch`` says how.
        """
        done = list(decision.failed)
        for id_, tokens in dict(decision.scheduled).items():
            item = self.item(id_)
            item.computed += tokens
            if not item.forked:
                item.writes[0] += [self.new_write() for _ in range(tokens)]
            if item.todo == 0 and item.beams == 1:
                self.offer(item)
                item.output += 1
                item.tokens.append(0)
            if item.output == item.new and item.beams == 1:
                done.append(id_)
        for id_ in done:
            self.remove(id_)
        return done

    def branch(self, id_: str, parents: list[int], outputs: list[list[int]]) -> None:
        """Fork, or follow each hypothesis by a child of ``parents[i]``."""
        item = self.item(id_)
        known = item.writes if item.forked else item.writes * item.beams
        item.writes = [list(known[parent]) for parent in parents]
        item.outputs, item.output, item.pages = outputs, len(outputs[0]), 0

    def item(self, id_: str) -> Item:
        (item,) = [item for item in self.items if item.id == id_]
        return item

    def remove(self, id_: str) -> None:
        self._let_go(self.item(id_))
        self.items = [item for item in self.items if item.id != id_]

    def offer(self, item: Item) -> None:
        if not self.caches:
            return
        size, written = self.page_size, item.writes[0]
        full = min(item.computed, len(item.tokens)) // size
        for i in range(item.offered, full):
            page = (i * size, *written[i * size : (i + 1) * size])
            self.cached.setdefault(self._history(item, i), page)
        item.offered = max(item.offered, full)
        item.named = max(item.named, full)

    def drop(self, item: Item) -> None:
        for i in range(item.named):
            self.cached.pop(self._history(item, i), None)

    def _history(self, item: Item, page: int) -> History:
        return (item.prefix, *item.tokens[: (page + 1) * self.page_size])

    def _known(self, item: Item) -> list[Page]:
        """The first pages of a waiting item that are in the cache."""
        if not self.caches:
            return []
        most = min(item.todo - 1, len(item.tokens)) // self.page_size
        item.named = max(item.named, most)
        pages = [self.cached.get(self._history(item, i)) for i in range(most)]
        return [page for page in itertools.takewhile(bool, pages) if page]

    def _take(self, count: int) -> None:
        """Somebody needs so many of the free pages: what nobody has used for longest is lost."""
        idle = {history: page for history, page in self.cached.items() if page not in self._held()}
        lost = max(0, count - (self.free() - len(idle)))
        for history in sorted(idle, key=lambda history: self.left_at[idle[history]])[:lost]:
            del self.cached[history]
            self.num_evictions += 1

    def _let_go(self, item: Item) -> None:
        for written in item.writes:
            for page in reversed(self._table(written)):
                self.left_at[page] = self.new_write()
        item.stop()

    def _left(self, decision: Decision) -> int:
        total = sum(tokens for _, tokens in decision.scheduled)
        left = self.max_num_batched_tokens - total
        if decision.decoded:
            prompts = min(len(self.items), self.max_num_seqs) - decision.decoded
            budget = self.max_prefill_tokens * max(1, prompts // decision.decoded)
            return min(left, budget - (total - decision.decoded))
        return left

    def _pages(self, tokens: int) -> int:
        return (tokens + self.page_size - 1) // self.page_size

    def _table(self, written: list[int]) -> list[Page]:
        size = self.page_size
        return [(start, *written[start : start + size]) for start in range(0, len(written), size)]

    def _distinct(self, item: Item) -> set[Page]:
        """Pages that hypotheses hold: those with the same history hold the same page."""
        return {page for written in item.writes for page in self._table(written)}

    def _held(self) -> set[Page]:
        return {page for item in self.items for page in self._distinct(item)}

    def _grow(self, item: Item, tokens: int, decision: Decision) -> bool:
        before, old = self._distinct(item), item.writes
        if item.forked:
            item.writes = [[*w, *(self.new_write() for _ in range(tokens))] for w in old]
            needed = len(self._distinct(item)) - len(before)
            item.writes = old
        else:
            needed = max(0, self._pages(item.computed + tokens) - item.pages)
        missing = max(0, needed - item.reserve)
        while missing and not self._make_room(missing, force=len(self.running()) == 1):
            victim = self.running()[-1]
            self._let_go(victim)
            decision.preempted.append(victim.id)
            if victim is item:
                return False
        self._take(missing)
        item.reserve -= needed - missing
        if item.forked:
            item.writes = [[*w, *(self.new_write() for _ in range(tokens))] for w in old]
        else:
            item.pages += needed
        return True

    def new_write(self) -> int:
        self.num_writes += 1
        return self.num_writes

    def _admitted(self, decision: Decision) -> Iterator[Item]:
        for item in self.waiting():
            others = sum(other.beams for other in self.running())
            if not self._left(decision) or others + item.beams > self.max_num_seqs:
                return
            place = self._ask(item)
            if place is Place.BROKEN:
                decision.failed.append(item.id)
            elif place is Place.HOST:
                return
            elif place is Place.DEVICE:
                own = needed = self._pages(item.todo)
                if item.outputs:
                    full = item.todo // self.page_size
                    rest = self._pages(item.prompt + len(item.outputs[0])) - full
                    needed = full + item.beams * rest
                item.running = True  # its prefix and what it knows are in use from here on
                known = self._known(item)
                item.pages = len(known)
                item.writes = [[written for page in known for written in page[1:]]]
                missing = needed - len(known)
                if not self._make_room(missing + others, force=not others):
                    self._let_go(item)
                    return
                self._take(missing)
                item.pages, item.reserve = own, needed - own
                item.computed, item.offered = len(item.writes[0]), len(known)
                if self.caches and item.id not in self.looked_up:
                    self.looked_up.add(item.id)
                    self.num_looked_up += item.prompt
                    self.num_hits += item.computed
                yield item

    def _ask(self, item: Item) -> Place:
        """AWAY: it loads; HOST: no pages for it; DEVICE: it is ready, or there is none."""
        if item.prefix is None:
            return Place.DEVICE
        prefix = self.prefixes[item.prefix]
        if prefix.place is Place.HOST and self._make_room(
            prefix.num_pages, force=not self.running()
        ):
            self._take(prefix.num_pages)
            prefix.place = Place.COPYING
        return Place.AWAY if prefix.place is Place.COPYING else prefix.place

    def _make_room(self, num_pages: int, *, force: bool) -> bool:
        in_use = {item.prefix for item in self.running()}
        idle = [
            prefix
            for name, prefix in sorted(self.prefixes.items())
            if prefix.place is Place.DEVICE and name not in in_use
            if force or not prefix.pinned
        ]
        if self.free() + sum(prefix.num_pages for prefix in idle) < num_pages:
            return False
        for prefix in idle:
            if self.free() < num_pages:
                prefix.place = Place.HOST
        return True
