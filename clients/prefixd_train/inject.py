"""Runs the frozen LM with a prefix."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prefixd_train.lm import FrozenLM
from prefixd_train.sites import Placement, PrefixKV

__all__ = ["Inputs", "TargetLogits", "forward", "target_logits"]

from typing import NamedTuple


class Inputs(Protocol):
    """What ``batching.Batch`` has; right padding."""

    @property
    def input_ids(self) -> Tensor: ...  # [B, S]
    @property
    def attention_mask(self) -> Tensor: ...  # [B, S], 1 = token, 0 = padding
    @property
    def labels(self) -> Tensor: ...
    @property
    def decoder_input_ids(self) -> Tensor | None: ...  # [B, T], encoder-decoder only


class TargetLogits(NamedTuple):
    logits: Tensor  # [N, V]
    targets: Tensor  # [N]
    rows: Tensor  # [N] which row of the batch each belongs to


def forward(
    lm: FrozenLM, batch: Inputs, prefix: PrefixKV | None, *, placement: Placement = "prefix"
) -> Tensor:
    """Logits of every position: [B, S, V], of an encoder-decoder [B, T, V]."""
    raise NotImplementedError


def target_logits(
    lm: FrozenLM, batch: Inputs, prefix: PrefixKV | None, *, placement: Placement = "prefix"
) -> TargetLogits:
    """Logits only of the positions that predict a label (the output layer runs on those alone).

    Labels as in transformers: of a decoder-only LM ``labels[b, i]`` is the token at position i of
    ``input_ids`` (predicted at i - 1), of an encoder-decoder the token that ``decoder_input_ids[b,
    i]`` is followed by; -100 = no loss.
    """
    raise NotImplementedError
