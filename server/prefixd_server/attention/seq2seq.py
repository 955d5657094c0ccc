"""Attention of encoder-decoder models: who calls, and what the encoder's rows see.

An encoder-decoder has three attentions a layer pair (encoder self, decoder self, cross), and its
modelling code calls one function for all of them. Each module therefore carries a
:class:`Role`, put there once when the model is loaded. The decoder's two attentions run over paged
KV with the backend's plans; the encoder runs on padded rows, whose own KV nobody needs later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixd_server.attention.base import LayerOptions, RelativeBias, StepPlan
from prefixd_server.kv.pool import KVPool, slots_of

__all__ = [
    "IMPLEMENTATION",
    "EncoderAttention",
    "EncoderPlan",
    "EncoderRow",
    "Role",
    "Seq2SeqPlan",
    "assign_role",
    "register",
]

IMPLEMENTATION = "prefixd-seq2seq"
"""the name to load a model with. There is no mask function of that name, so transformers makes no
masks: the plans know who sees whom."""

_ROLE = "prefixd_role"


class Role(NamedTuple):
    """What one attention module of the model is."""

    site: Literal["decoder", "encoder", "cross"]
    layer: int
    relative_bias: RelativeBias | None = None


class Seq2SeqPlan(NamedTuple):
    """The decoder's step: self-attention and cross-attention of the same packed tokens."""

    decoder: StepPlan
    cross: StepPlan


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """One text of an encoder batch."""

    num_tokens: int
    prefix_pages: Sequence[int] = ()
    prefix_len: int = 0
    position_offset: int = 0
    """the position of the text's first token, for a relative bias (see ``SequenceSpan``)"""


class EncoderAttention(Protocol):
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        """query, key, value [B, H, S, D] -> [B, S, H, D]"""


class EncoderPlan:
    """Bidirectional attention of B padded rows [B, S], each behind its own prefix.

    Keys are [prefixes padded to P | texts padded to S]; row b sees its own ``prefix_len`` and
    ``num_tokens`` of them. What comes out for padding is never used.
    """

    def __init__(self, pool: KVPool, rows: Sequence[EncoderRow]) -> None:
        self._pool = pool
        self._num_rows = len(rows)
        longest_prefix = max(row.prefix_len for row in rows)
        longest_text = max(row.num_tokens for row in rows)
        slots = np.zeros((len(rows), longest_prefix), dtype=np.int64)
        for slot_row, row in zip(slots, rows, strict=True):
            slot_row[: row.prefix_len] = slots_of(row.prefix_pages, row.prefix_len, pool.page_size)
        prefix_len, num_tokens, offset = (
            torch.tensor(values, device=pool.device).view(-1, 1)
            for values in zip(
                *((r.prefix_len, r.num_tokens, r.position_offset) for r in rows), strict=True
            )
        )
        in_prefix = torch.arange(longest_prefix, device=pool.device)
        in_text = torch.arange(longest_text, device=pool.device)
        self._slots = torch.from_numpy(slots).to(pool.device)  # [B, P]
        self._absent = (in_prefix >= prefix_len)[:, :, None, None]  # [B, P, 1, 1]
        seen = torch.cat([in_prefix < prefix_len, in_text < num_tokens], 1)  # [B, P + S]
        self._mask = None if bool(seen.all()) else seen[:, None, None, :]
        self._key_index = torch.cat(  # [B, P + S] in the joint sequence
            [in_prefix.expand(len(rows), -1), prefix_len + in_text], 1
        )
        self._query_position = offset + in_text  # [B, S]
        self._biases: dict[RelativeBias, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        """query, key, value [B, H, S, D] -> [B, S, H, D]"""
        assert options.softcap is None
        assert options.sliding_window is None
        if self._slots.shape[1]:
            key = torch.cat([self._prefix(self._pool.keys[layer]), key], 2)
            value = torch.cat([self._prefix(self._pool.values[layer]), value], 2)
        mask = self._mask
        if options.relative_bias is not None:
            mask = self._bias(options.relative_bias)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=options.scaling
        )
        return attended.transpose(1, 2)

    def _prefix(self, stored: Tensor) -> Tensor:
        """[B, H, P, D]; zeros where a row's prefix is shorter, for what lies there may be NaN."""
        rows = stored.index_select(0, self._slots.view(-1)).view(
            *self._slots.shape, *stored.shape[1:]
        )
        return rows.masked_fill(self._absent, 0.0).transpose(1, 2)

    def _bias(self, relative: RelativeBias) -> Tensor:
        """The mask and the relative bias as one additive mask [B, H, S, P + S]."""
        if relative not in self._biases:
            distance = self._key_index[:, None, :] - self._query_position[:, :, None]
            values = relative(distance).permute(0, 3, 1, 2)
            if self._mask is not None:
                values = values.masked_fill(~self._mask, float("-inf"))
            self._biases[relative] = values
        return self._biases[relative]


def assign_role(module: nn.Module, role: Role) -> None:
    setattr(module, _ROLE, role)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_plan: EncoderAttention | Seq2SeqPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Encoder: [B, H, S, D] -> [B, S, H, D]. Decoder: query [1, H, T, D] -> [1, T, H, D].

    The model's own ``position_bias``, made for rows that start at position 0, is not used: the
    plan knows each token's position.
    """
    role: Role | None = getattr(module, _ROLE, None)
    if attention_plan is None or role is None:
        raise TypeError(f"{type(module).__name__} does not pass `attention_plan` on to attention")
    options = LayerOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        relative_bias=role.relative_bias,
    )
    if role.site == "encoder":
        assert not isinstance(attention_plan, Seq2SeqPlan)
        return attention_plan.attend(role.layer, query, key, value, options), None
    assert isinstance(attention_plan, Seq2SeqPlan)
    plan = attention_plan.decoder if role.site == "decoder" else attention_plan.cross
    output = plan.attend(
        role.layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        options,
    )
    return output.unsqueeze(0), None


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
