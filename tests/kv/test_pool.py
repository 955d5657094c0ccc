"""What is written to the pool is read back, and nothing else moves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import TORCH_DTYPES, KVPool, slots_of

CPU = torch.device("cpu")
NUM_PAGES = 9
FILL = 7.0
"""what every slot holds before a test writes: representable in each dtype"""

dtypes = st.sampled_from(sorted(TORCH_DTYPES))


class Shape(NamedTuple):
    layers: int
    heads: int
    dim: int


shapes = st.builds(Shape, st.integers(1, 3), st.sampled_from([1, 2, 8]), st.sampled_from([1, 4]))


def make_pool(shape: Shape, page_size: int, dtype: str) -> KVPool:
    pool = KVPool(
        num_layers=shape.layers,
        num_kv_heads=shape.heads,
        head_dim=shape.dim,
        num_pages=NUM_PAGES,
        page_size=page_size,
        dtype=TORCH_DTYPES[dtype],
        device=CPU,
    )
    for tensor in pool.keys + pool.values:
        tensor.fill_(FILL)
    return pool


def draw_prefix(shape: Shape, num_tokens: int, dtype: str, seed: int) -> torch.Tensor:
    """[L, H_kv, P, D]"""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, shape.heads, num_tokens, shape.dim)
    return torch.randn(size, generator=generator).to(TORCH_DTYPES[dtype])


def as_stored(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The array as a prefix file holds it: bfloat16 as uint16 bit patterns."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    page_size=st.sampled_from([1, 4, 16]),
    stored=dtypes,
    kept=dtypes,
    order=st.permutations(range(NUM_PAGES)),
    data=st.data(),
)
def test_a_prefix_is_read_back_and_other_slots_stay(
    shape: Shape, page_size: int, stored: str, kept: str, order: list[int], data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(1, (NUM_PAGES - 1) * page_size), "P")
    pages = order[: pages_for(num_tokens, page_size)]
    pool = make_pool(shape, page_size, kept)
    key = draw_prefix(shape, num_tokens, stored, seed=0)
    value = draw_prefix(shape, num_tokens, stored, seed=1)

    pool.write_prefix(pages, as_stored(key), as_stored(value), stored)

    for read, expected in zip(pool.read(pages, num_tokens), (key, value), strict=True):
        assert read.dtype == TORCH_DTYPES[kept]
        assert read.is_contiguous()
        assert torch.equal(read, expected.to(TORCH_DTYPES[kept]))
    written = {pages[token // page_size] * page_size + token % page_size for token in
               range(num_tokens)}  # fmt: skip
    others = [slot for slot in range(NUM_PAGES * page_size) if slot not in written]
    assert len(written) == num_tokens
    for tensor in pool.keys + pool.values:
        assert bool((tensor[others] == FILL).all()), "a slot of another owner changed"


@given(
    page_size=st.integers(1, 17),
    pages=st.lists(st.integers(0, 50), unique=True, max_size=6),
    data=st.data(),
)
def test_slots_follow_the_page_list(page_size: int, pages: list[int], data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(0, len(pages) * page_size))
    expected = [pages[i // page_size] * page_size + i % page_size for i in range(num_tokens)]
    slots = slots_of(pages, num_tokens, page_size)
    assert slots.dtype == np.int64
    assert slots.tolist() == expected


def test_write_stores_one_layer_only() -> None:
    pool = make_pool(Shape(layers=2, heads=2, dim=4), page_size=4, dtype="float32")
    key, value = torch.randn(2, 3, 2, 4)
    pool.write(1, torch.tensor([5, 0, 35]), key, value)
    assert torch.equal(pool.keys[1][[5, 0, 35]], key)
    assert torch.equal(pool.values[1][[5, 0, 35]], value)
    assert bool((pool.keys[0] == FILL).all())
    assert bool((pool.values[0] == FILL).all())
    assert int((pool.keys[1] != FILL).any(-1).any(-1).sum()) == 3


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_per_page_is_what_a_page_takes(dtype: str, size: int) -> None:
    shape = Shape(layers=3, heads=2, dim=4)
    pool = make_pool(shape, 16, dtype)
    taken = sum(tensor.nbytes for tensor in pool.keys + pool.values)
    per_page = KVPool.bytes_per_page(3, 2, 4, 16, TORCH_DTYPES[dtype])
    assert per_page == 2 * 3 * 2 * 4 * 16 * size
    assert per_page * NUM_PAGES == taken
