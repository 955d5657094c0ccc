"""Lets the frozen LM write, one token at a time, with any keys and values ahead of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefixd_train.batching import Batch
from prefixd_train.initialise import RecordingPlan
from prefixd_train.inject import run_with_plan
from prefixd_train.lm import FrozenLM
from prefixd_train.sites import PrefixKV

__all__ = ["Choose", "continuation", "greedy", "sampled"]

Choose = Callable[[Tensor], int]
"""logits [V] -> a token"""


@torch.no_grad()
def continuation(
    lm: FrozenLM,
    context: PrefixKV,
    prompt: Sequence[int],
    choose: Choose,
    is_end: Callable[[int], bool],
    *,
    max_new_tokens: int,
) -> list[int]:
    """What a decoder-only LM writes after the context and the prompt, up to a token that ends it,
    which is the last one. What was written joins the context, so no token is run twice."""
    written: list[int] = []
    fed = list(prompt)
    while len(written) < max_new_tokens:
        ids = torch.tensor([fed], device=lm.device)
        plan = RecordingPlan(context, query_offset=_length(context))
        last = torch.tensor([len(fed) - 1], device=lm.device)
        logits = run_with_plan(lm, Batch(ids, torch.ones_like(ids), ids), plan, last)
        written.append(choose(logits[0].float()))
        if is_end(written[-1]):
            break
        context, fed = _joined(context, plan.recorded()), written[-1:]
    return written


def greedy(logits: Tensor) -> int:
    return int(logits.argmax())


def sampled(generator: torch.Generator, temperature: float) -> Choose:
    """Draws from a generator on the CPU: the same seed draws the same on any device, as far as the
    logits are the same."""

    def choose(logits: Tensor) -> int:
        chances = (logits / temperature).softmax(0).cpu()
        return int(torch.multinomial(chances, 1, generator=generator))

    return choose


def _length(context: PrefixKV) -> int:
    return context["decoder"][0].shape[2] if context else 0


def _joined(context: PrefixKV, new: PrefixKV) -> PrefixKV:
    if not context:
        return new
    (keys, values), (new_keys, new_values) = context["decoder"], new["decoder"]
    return {"decoder": (torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2))}
