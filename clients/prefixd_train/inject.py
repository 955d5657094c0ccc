"""Runs the frozen LM with a prefix."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from prefixd_train.attention import AttentionPlan
from prefixd_train.lm import FrozenLM
from prefixd_train.sites import InfixKV, PrefixKV

__all__ = ["Inputs", "TargetLogits", "forward", "run_with_plan", "target_logits"]

_IGNORED = -100


class Inputs(Protocol):
    """What ``batching.Batch`` has. Rows are padded on the right."""

    @property
    def input_ids(self) -> Tensor:
        """[B, S]; an encoder-decoder's encoder input"""

    @property
    def attention_mask(self) -> Tensor:
        """[B, S], 1 for tokens, 0 for padding"""

    @property
    def labels(self) -> Tensor:
        """[B, S], of an encoder-decoder [B, T]; -100: no loss"""

    @property
    def decoder_input_ids(self) -> Tensor | None:
        """[B, T]; None: a decoder-only LM"""


class TargetLogits(NamedTuple):
    logits: Tensor
    """[N, V]"""
    targets: Tensor
    """[N], the token that each row of ``logits`` should predict"""
    examples: Tensor
    """[N], the row of the batch that each belongs to, ascending"""


def forward(lm: FrozenLM, batch: Inputs, prefix: PrefixKV | None) -> Tensor:
    """Logits of every position: [B, S, V], of an encoder-decoder [B, T, V]. An InfixKV stands
    between input and output, any other in front."""
    return run_with_plan(lm, batch, _plan(lm, batch, prefix))


def target_logits(lm: FrozenLM, batch: Inputs, prefix: PrefixKV | None) -> TargetLogits:
    """Logits only of the positions that predict a label; the output layer runs on those alone.

    Labels are transformers': of a decoder-only LM ``labels[b, i]`` is the token at position i of
    ``input_ids``, predicted at i - 1; of an encoder-decoder ``labels[b, i]`` is predicted at
    position i of ``decoder_input_ids``.
    """
    labels = _shifted(lm, batch.labels)
    examples, columns = (labels != _IGNORED).nonzero(as_tuple=True)
    rows = examples * batch.labels.shape[1] + columns
    logits = run_with_plan(lm, batch, _plan(lm, batch, prefix), rows)
    return TargetLogits(logits, labels[examples, columns], examples)


def run_with_plan(
    lm: FrozenLM, batch: Inputs, plan: AttentionPlan, rows: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V]; with ``rows``, indices into the B * T positions, logits [len(rows), V]."""
    arguments = _seq2seq_arguments(lm, batch, plan)
    if not lm.is_encoder_decoder:
        num_tokens = batch.input_ids.shape[1]
        positions = plan.decoder_positions(num_tokens, batch.input_ids.device)
        arguments = {"input_ids": batch.input_ids, "position_ids": positions}
    # What a family does to logits (soft cap, scale, bias) comes after its output layer, and what it
    # does to hidden states before it, so choosing rows at its door suits them all.
    handle = None
    if rows is not None:
        handle = lm.module.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].flatten(0, 1).index_select(0, rows)[None],)
        )
    try:
        with plan.active():
            logits = lm.module(**arguments, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return cast(Tensor, logits if rows is None else logits[0])


def _seq2seq_arguments(lm: FrozenLM, batch: Inputs, plan: AttentionPlan) -> dict[str, Any]:
    tokens = batch.decoder_input_ids
    if (tokens is not None) != lm.is_encoder_decoder:
        kind = "an encoder-decoder" if lm.is_encoder_decoder else "decoder-only"
        given = "no" if tokens is None else "its own"
        raise ValueError(f"{lm.name} is {kind}, but the batch has {given} decoder_input_ids")
    if tokens is None:
        return {}
    first = int(plan.decoder_positions(1, tokens.device)[0, 0])
    takes = inspect.signature(lm.module.forward).parameters
    cache = "cache" if "cache" in takes else "past_key_values"  # transformers 5.24 renamed it
    return {
        "input_ids": batch.input_ids,
        "decoder_input_ids": tokens,
        cache: _PositionCache(first, lm.shapes["decoder"].num_layers),
    }


def _plan(lm: FrozenLM, batch: Inputs, prefix: PrefixKV | None) -> AttentionPlan:
    prefix = {} if prefix is None else prefix
    offset = lm.query_offset({site: key.shape[2] for site, (key, _) in prefix.items()})
    if isinstance(prefix, InfixKV):
        return AttentionPlan(prefix, query_offset=offset, infix_starts=_infix_starts(lm, batch))
    return AttentionPlan(prefix, query_offset=offset, encoder_mask=encoder_mask(lm, batch))


def encoder_mask(lm: FrozenLM, batch: Inputs) -> Tensor | None:
    """[B, S], true for tokens; None where nothing is padded, or padding is last and causal."""
    if not lm.is_encoder_decoder:
        return None
    mask = batch.attention_mask.bool()
    return None if bool(mask.all()) else mask


def _shifted(lm: FrozenLM, labels: Tensor) -> Tensor:
    """[B, T]: at each position what it predicts."""
    if lm.is_encoder_decoder:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], _IGNORED)], 1)


def _infix_starts(lm: FrozenLM, batch: Inputs) -> Tensor:
    """[B]: the position that predicts the first label sees the infix, and all after it do."""
    if lm.is_encoder_decoder:
        raise ValueError(f"an infix needs a decoder-only LM; {lm.name} is an encoder-decoder")
    return (_shifted(lm, batch.labels) != _IGNORED).int().argmax(1)


class _PassingCache:
    """Keeps nothing. Its length is what BART and its kin number their positions from."""

    def __init__(self, first_position: int) -> None:
        self._length = first_position

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key, value


class _PositionCache(EncoderDecoderCache):  # type: ignore[misc]
    def __init__(self, first_position: int, num_layers: int) -> None:
        passing = _PassingCache(first_position)
        self.self_attention_cache = passing
        self.cross_attention_cache = passing
        self.is_updated = _NeverUpdated.fromkeys(range(num_layers), False)


class _NeverUpdated(dict[int, bool]):
    """A layer that is run again in the backward pass has to make its keys again."""

    def __setitem__(self, layer: int, updated: bool) -> None:
        super().__setitem__(layer, False)
