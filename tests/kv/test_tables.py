"""Tables that part ways: each keeps what it wrote, and a shared page is never written."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.kv.pool import KVPool
from prefixd_server.kv.tables import make_writable, pages_to_write, replace_tables


@given(
    page_size=st.sampled_from([1, 2, 4]),
    prompt=st.integers(1, 9),
    steps=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
        max_size=8,
    ),
    outsider=st.booleans(),
)
def test_histories_are_kept(
    page_size: int, prompt: int, steps: list[tuple[int, list[int]]], outsider: bool
) -> None:
    """Four tables; in each step some tokens are written to each, then each is followed by a child
    of any of them. ``outsider``: somebody else holds the first table's pages all the while."""
    allocator = PageAllocator(400, page_size)
    first = allocator.allocate(pages_for(prompt, page_size))
    assert first is not None
    memory = {(first[i // page_size], i % page_size): i for i in range(prompt)}
    histories = [list(range(prompt))] * 4
    tables = [list(first) for _ in range(4)]
    replace_tables(allocator, [] if outsider else [first], tables)
    others = [list(first)] if outsider else []
    written = prompt
    for count, parents in steps:
        start = len(histories[0])
        needed = pages_to_write(allocator, tables, start, start + count)
        new = allocator.allocate(needed)
        assert new is not None
        copies = make_writable(allocator, tables, start, start + count, new)
        assert not new, "exactly so many as were asked for"
        assert not {source for source, _ in copies} & {target for _, target in copies}
        for source, target in copies:
            for offset in range(page_size):
                memory[target, offset] = memory.get((source, offset), -1)
        for i, table in enumerate(tables):
            added = list(range(written, written + count))
            written += count
            histories[i] = [*histories[i], *added]
            for at, token in enumerate(added, start):
                page = table[at // page_size]
                assert allocator.references(page) == 1
                memory[page, at % page_size] = token
        allocator.check([*tables, *others])
        old, tables = tables, [list(tables[parent]) for parent in parents]
        replace_tables(allocator, old, tables)
        histories = [histories[parent] for parent in parents]
        allocator.check([*tables, *others])
        for table, history in zip(tables, histories, strict=True):
            held = [memory[table[i // page_size], i % page_size] for i in range(len(history))]
            assert held == history
    if outsider:
        kept = [memory[first[i // page_size], i % page_size] for i in range(prompt)]
        assert kept == list(range(prompt))
        assert all(memory.get((page, i), -1) < prompt for page in first for i in range(page_size))


def test_of_two_owners_the_last_keeps_the_page() -> None:
    allocator = PageAllocator(8, 4)
    table = allocator.allocate(2)
    assert table is not None
    tables = [list(table), list(table)]
    replace_tables(allocator, [table], tables)
    assert pages_to_write(allocator, tables, 6, 7) == 1
    new = allocator.allocate(1)
    assert new is not None
    taken = new[0]
    assert make_writable(allocator, tables, 6, 7, new) == [(table[1], taken)]
    assert tables == [[table[0], taken], table]
    assert allocator.references(table[0]) == 2


def test_copied_pages_hold_the_same_in_every_layer() -> None:
    pool = KVPool(
        num_layers=2,
        num_kv_heads=2,
        head_dim=4,
        num_pages=6,
        page_size=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=torch.Generator().manual_seed(len(tensor)))
    before = [tensor.clone() for tensor in (*pool.keys, *pool.values)]
    pool.copy_pages([(0, 4), (2, 1), (0, 5)])
    expected = torch.tensor([0, 2, 2, 3, 0, 0])
    slots = (expected[:, None] * 3 + torch.arange(3)).view(-1)
    for old, new in zip(before, (*pool.keys, *pool.values), strict=True):
        assert torch.equal(new, old[slots])
