"""A next-token distribution as its likeliest k tokens and the rest as one, and the KL to it.

The rest keeps its mass but not its shape, so the divergence is over k + 1 outcomes. It is a lower
bound of the whole KL, zero where the k tokens and the rest have the teacher's probabilities, and
never rewards a student for moving mass into the tail, as leaving the rest out would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TopK", "top_k_divergence", "top_k_of"]


class TopK(NamedTuple):
    ids: Tensor
    """[N, k] int64"""
    logprobs: Tensor
    """[N, k + 1]: of the ids, and in the last column of all other tokens together"""


def top_k_of(logits: Tensor, k: int) -> TopK:
    """``logits`` [N, V]. Raises ValueError unless 0 < k < V."""
    if not 0 < k < logits.shape[1]:
        raise ValueError(f"top_k is {k}; there are {logits.shape[1]} tokens, so at most one less")
    ids = logits.topk(k).indices
    return TopK(ids, _grouped(logits, ids))


def top_k_divergence(logits: Tensor, teacher: TopK) -> Tensor:
    """Σ over the N rows of KL(teacher ‖ softmax(logits)) over the k + 1 outcomes, in nats."""
    return F.kl_div(
        _grouped(logits, teacher.ids), teacher.logprobs, reduction="sum", log_target=True
    )


def _grouped(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, k + 1]. The rest is summed over its own logits: one minus the others
    would lose a small one to rounding."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = logits.logsumexp(1, keepdim=True)
    rest = logits.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], 1) - total
