"""Greedy decoding of many prompts at once, from the keys and values of a prefix or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefixd_train.sites import PrefixKV

__all__ = ["greedy"]


@torch.inference_mode()
def greedy(
    module: Any,
    prompts: Sequence[Sequence[int]],
    kv: PrefixKV | None,
    *,
    max_new_tokens: int,
    eos: int,
    batch_size: int = 50,
) -> list[list[int]]:
    """The new tokens of each prompt, without the end of sequence.

    ``module`` is transformers' model (or one of PEFT's around it) and does not know the prefix: it
    is in the cache before the prompt comes. Prompts of like length share a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        made = _batch(module, [prompts[i] for i in some], kv, max_new_tokens, eos)
        texts |= dict(zip(some, made, strict=True))
    return [texts[i] for i in range(len(prompts))]


def _batch(
    module: Any, prompts: list[Sequence[int]], kv: PrefixKV | None, max_new_tokens: int, eos: int
) -> list[list[int]]:
    device = next(module.parameters()).device
    width = max(map(len, prompts))
    # Padded on the left, so that all rows go on at the same place.
    tokens = torch.tensor([[eos] * (width - len(p)) + list(p) for p in prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache, num_virtual = _cache(kv, len(prompts))
    mask = torch.cat([real.new_ones(len(prompts), num_virtual), real], 1)
    positions = (mask.cumsum(1) - 1)[:, num_virtual:].clamp(min=0)
    made: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        logits = module(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        following = logits.argmax(-1).masked_fill(done, eos)
        made.append(following)
        done |= following == eos
        if bool(done.all()):
            break
        tokens, positions = following[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    rows = torch.stack(made, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _cache(kv: PrefixKV | None, batch_size: int) -> tuple[DynamicCache, int]:
    cache = DynamicCache()
    if kv is None:
        return cache, 0
    keys, values = kv["decoder"]  # [L, H_kv, P, D]
    for layer in range(len(keys)):
        rows = (batch_size, *keys[layer].shape)
        cache.update(keys[layer].expand(rows), values[layer].expand(rows), layer)
    return cache, keys.shape[2]
