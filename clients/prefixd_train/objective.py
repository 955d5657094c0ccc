"""What training minimises: a sum over tokens, and how many they are."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from prefixd_train.batching import Batch
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM
from prefixd_train.sites import PrefixKV

__all__ = ["Objective", "negative_log_likelihood", "target_nll", "token_hits"]

Objective = Callable[[FrozenLM, Batch, PrefixKV | None], tuple[Tensor, int]]
"""The loss summed over a batch's tokens (a scalar with a gradient), and their number.

The loop divides by the number over all batches of a step, so that a token counts the same however
the step is cut. Write another one to train for something else, distillation for instance.
"""


def negative_log_likelihood(
    lm: FrozenLM, batch: Batch, prefix: PrefixKV | None
) -> tuple[Tensor, int]:
    """−Σ log p(y_t) over the targets alone, as prefix-tuning trains (arXiv 2101.00190, eq. 2)."""
    logits, targets, _ = target_logits(lm, batch, prefix)
    return target_nll(logits, targets)


def target_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """``logits`` [N, V] against ``targets`` [N]; summed in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def token_hits(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
    """How many targets are the LM's likeliest token behind the targets before them, and how many
    there are: a measure with an objective's signature, and no gradient."""
    logits, targets, _ = target_logits(lm, batch, prefix)
    return (logits.argmax(-1) == targets).sum(), targets.numel()
