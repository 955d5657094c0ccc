"""Page tables that share pages, and how they come apart when they are written: copy on write.

A table is the page list of one sequence. Beams of a request begin with one table and share every
page that holds the same tokens; before one writes into a page that has another owner, it takes a
page of its own and the old one's contents are copied. Integers only, as in ``allocator``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from prefixd_server.kv.allocator import PageAllocator, pages_for

__all__ = ["Copy", "make_writable", "pages_to_write", "replace_tables"]

Copy = tuple[int, int]
"""a page and the one its contents go to"""


def pages_to_write(
    allocator: PageAllocator, tables: Sequence[Sequence[int]], start: int, stop: int
) -> int:
    """How many new pages it takes until each table can be given tokens ``start`` … ``stop - 1``
    in pages that nobody else owns."""
    size = allocator.page_size
    first, end = start // size, pages_for(stop, size)
    written = Counter(page for table in tables for page in table[first:end])
    # Of a page's owners the last one may keep it.
    copies = (min(count, allocator.references(page) - 1) for page, count in written.items())
    return sum(max(0, end - len(table)) for table in tables) + sum(copies)


def make_writable(
    allocator: PageAllocator,
    tables: Iterable[list[int]],
    start: int,
    stop: int,
    new_pages: list[int],
) -> list[Copy]:
    """Change the tables so, taking ``pages_to_write`` pages out of ``new_pages``.

    Returns what must be copied before the tokens are written. No page is both source and target.
    """
    size = allocator.page_size
    first, end = start // size, pages_for(stop, size)
    copies: list[Copy] = []
    for table in tables:
        for i in range(first, min(end, len(table))):
            page = table[i]
            if allocator.references(page) > 1:
                table[i] = new_pages.pop()
                copies.append((page, table[i]))
                allocator.release([page])
        while len(table) < end:
            table.append(new_pages.pop())
    return copies


def replace_tables(
    allocator: PageAllocator, old: Iterable[list[int]], new: Iterable[list[int]]
) -> None:
    """The owners of ``old`` become those of ``new``, made of pages of ``old``."""
    for table in new:
        allocator.share(table)
    for table in old:
        allocator.release(table)
