"""Triton kernels over the paged KV cache: store, attend, merge. Launched by ``triton_paged``.

All integers that describe a step are int32 (``work.py`` lays them out); slots are widened to int64
before they are multiplied by a row's size. Log-sum-exps are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_kernel(
    key,
    value,
    keys,
    values,
    slots,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    slot_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, H_kv): new rows [T, H_kv, D] to their slots; a negative slot is nowhere."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        d = tl.arange(0, BLOCK_D)
        target = slot * slot_stride + head * head_stride + d
        k = tl.load(key + token * key_stride_token + head * key_stride_head + d, mask=d < HEAD_DIM)
        v = tl.load(
            value + token * value_stride_token + head * value_stride_head + d, mask=d < HEAD_DIM
        )
        tl.store(keys + target, k.to(keys.dtype.element_ty), mask=d < HEAD_DIM)
        tl.store(values + target, v.to(values.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["first_part", "num_tokens"])
def attend_kernel(
    query,
    keys,
    values,
    output,
    lse,
    blocks,
    queries,
    pages,
    scale,
    softcap,
    window,
    query_stride_token,
    query_stride_head,
    slot_stride,
    head_stride,
    first_part,
    num_tokens,
    PAGE_SIZE: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks, H_kv, splits): a block's queries over one split of its keys.

    The query heads of a KV head are rows of one tile, so its keys are read once for all of them.
    Output [parts, T, H, D] and lse [parts, T, H], or [T, H, D] alone where a query has one part.
    """
    block = blocks + tl.program_id(0) * 8
    head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    num_heads = tl.num_programs(1) * HEADS_PER_KV
    first_query = tl.load(block)
    num_queries = tl.load(block + 1)
    prefix_table = tl.load(block + 2)
    own_table = tl.load(block + 3)
    prefix_len = tl.load(block + 4)
    begin = tl.load(block + 5)
    end = tl.load(block + 6)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    entry = m // HEADS_PER_KV
    real = entry < num_queries
    token = tl.load(queries + 2 * (first_query + entry), mask=real, other=0).to(tl.int64)
    last_key = tl.load(queries + 2 * (first_query + entry) + 1, mask=real, other=-1)
    query_head = head * HEADS_PER_KV + m % HEADS_PER_KV
    q = tl.load(
        query + (token * query_stride_token + query_head * query_stride_head)[:, None] + d[None, :],
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )

    end = tl.minimum(end, tl.max(last_key, 0) + 1)
    if HAS_WINDOW:
        oldest = tl.min(tl.where(real, last_key, 2147483647), 0)
        begin = tl.maximum(begin, oldest - window + 1)
    length = tl.cdiv(tl.maximum(end - begin, 0), num_splits)
    length = tl.cdiv(length, BLOCK_N) * BLOCK_N
    start = begin + split * length
    stop = tl.minimum(start + length, end)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(start, stop, BLOCK_N):
        key = tile + tl.arange(0, BLOCK_N)
        inside = key < stop
        in_prefix = key < prefix_len
        index = tl.where(in_prefix, key, key - prefix_len)
        table = tl.where(in_prefix, prefix_table, own_table)
        page = tl.load(pages + table + index // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        at = (page * PAGE_SIZE + index % PAGE_SIZE) * slot_stride + head * head_stride
        k = tl.load(
            keys + at[None, :] + d[:, None],
            mask=inside[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            # tanh(x) = 2 sigmoid(2x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = inside[None, :] & (key[None, :] <= last_key[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > last_key[:, None] - window)
        scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen no key yet: -inf minus -inf is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2(scores - base[:, None])
        decay = tl.math.exp2(highest - base)
        v = tl.load(
            values + at[:, None] + d[None, :],
            mask=inside[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc = acc + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = higher

    # Compared with 0 and not by order: a NaN must come out as one.
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row = token * num_heads + query_head
    if HAS_PARTS:
        row += (first_part + split).to(tl.int64) * num_tokens * num_heads
        logs = tl.math.log2(tl.where(total == 0.0, 1.0, total))
        found = tl.where(total == 0.0, float("-inf"), highest + logs)
        tl.store(lse + row, found, mask=real)
    tl.store(
        output + row[:, None] * HEAD_DIM + d[None, :],
        result.to(output.dtype.element_ty),
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def merge_kernel(
    parts,
    lse,
    num_parts,
    output,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, H): attention over disjoint sets of keys, joined by their log-sum-exps.

    parts [N, T, H, D] and lse [N, T, H], of which token t has the first num_parts[t].
    """
    token = tl.program_id(0).to(tl.int64)
    num_heads = tl.num_programs(1)
    row = token * num_heads + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    stride = num_tokens.to(tl.int64) * num_heads
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for part in range(tl.load(num_parts + token)):
        at = row + part * stride
        weight = tl.load(lse + at)
        x = tl.load(parts + at * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        higher = tl.maximum(highest, weight)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.math.exp2(highest - base)
        p = tl.math.exp2(weight - base)
        total = total * decay + p
        acc = acc * decay + x * p
        highest = higher
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * HEAD_DIM + d, result.to(output.dtype.element_ty), mask=d < HEAD_DIM)
