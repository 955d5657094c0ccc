"""Puts the prefix in front of each layer's keys and values, inside transformers' own code.

transformers calls one function for every attention of a model that was loaded with its name
(``AttentionInterface``). Ours looks up what the forward in progress attends to, an
:class:`AttentionPlan`: it travels in a context variable, as some families drop the keyword
arguments that would carry it. Who sees whom is the plan's alone; transformers makes no masks for an
implementation that has no mask function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixd_train.sites import PrefixKV, Site

__all__ = [
    "IMPLEMENTATION",
    "AttentionPlan",
    "LayerOptions",
    "RelativeBias",
    "Role",
    "assign_role",
    "register",
]

IMPLEMENTATION = "prefixd_train"
"""the name to load a model with: ``set_attn_implementation(IMPLEMENTATION)``"""

RelativeBias = Callable[[Tensor], Tensor]
"""relative positions (key's minus query's) [...], int64 -> what to add to the scores, [..., H]"""

_ROLE = "prefixd_train_role"


class Role(NamedTuple):
    """What one attention module of the model is."""

    site: Site
    layer: int
    relative_bias: RelativeBias | None = None


class LayerOptions(NamedTuple):
    """What the model's own code says about one attention call."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None


class AttentionPlan:
    """One forward: the prefix of each site, and what each of its queries sees.

    Own tokens are padded on the right. In the decoder's self-attention a query sees the keys up to
    its own index in the joint sequence of prefix and own tokens (a sliding window counts there, so
    a prefix ages out like any token); padding comes after every real query. The encoder's and the
    cross-attention's queries see the whole prefix and all tokens that are not padding.
    """

    def __init__(
        self,
        prefix: PrefixKV,
        *,
        query_offset: int = 0,
        encoder_mask: Tensor | None = None,
        infix_starts: Tensor | None = None,
    ) -> None:
        """``encoder_mask``: [B, S], true for tokens. ``query_offset``: the file's; unless it is 0,
        each stream's first own token stands behind that stream's prefix. ``infix_starts``: [B],
        where the decoder's prefix is inserted instead of in front."""
        # Unbinding once makes the backward one stack of L gradients, not L sums of mostly zeros.
        self._layers = {site: (k.unbind(0), v.unbind(0)) for site, (k, v) in prefix.items()}
        self._lengths: dict[Site, int] = {site: k.shape[2] for site, (k, _) in prefix.items()}
        self._query_offset = query_offset
        self._encoder_mask = encoder_mask
        self._infix_starts = infix_starts
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def decoder_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Position ids of the decoder's own tokens: [1, T], of an infix [B, T]."""
        if self._infix_starts is not None:
            return self._own_index(num_tokens, device)
        return self._offset("decoder") + torch.arange(num_tokens, device=device)[None]

    def observe(self, role: Role, key: Tensor, value: Tensor, options: LayerOptions) -> None:
        """Called with each layer's own key and value [B, H_kv, K, D]; for subclasses that note."""

    def attend(
        self, role: Role, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        """query [B, H, Q, D], key and value [B, H_kv, K, D] -> [B, Q, H, D]"""
        self.observe(role, key, value, options)
        num_queries, num_keys = query.shape[2], key.shape[2]
        if role.site in self._layers:
            keys, values = self._layers[role.site]
            key = torch.cat([_rows(keys[role.layer], key), key], 2)
            value = torch.cat([_rows(values[role.layer], value), value], 2)
        name = (role.site, role.relative_bias, options.sliding_window)
        if name not in self._masks:
            self._masks[name] = self._mask(role, num_queries, num_keys, query, options)
        mask = self._masks[name]
        causal = role.site == "decoder" and mask is None
        return _sdpa(query, key, value, mask, options, causal).transpose(1, 2)

    def _offset(self, site: Site) -> int:
        """A stream without a prefix begins at 0."""
        return self._lengths.get(site, 0) if self._query_offset else 0

    def _own_index(self, num_tokens: int, device: torch.device) -> Tensor:
        """[1 or B, T]: where own tokens stand in the joint sequence of the decoder."""
        own = torch.arange(num_tokens, device=device)[None]
        length = self._lengths.get("decoder", 0)
        if self._infix_starts is None:
            return own + length
        return own + length * (own >= self._infix_starts[:, None])

    def _mask(
        self, role: Role, num_queries: int, num_keys: int, query: Tensor, options: LayerOptions
    ) -> Tensor | None:
        """An additive mask that broadcasts over [B, H, Q, P + K]; None: the plain causal one in
        the decoder's self-attention, elsewhere none."""
        if role.site == "decoder":
            seen = self._decoder_seen(num_keys, query.device, options.sliding_window)
        else:
            seen = self._encoder_seen(role.site)
        if seen is None and role.relative_bias is None:
            return None
        additive = torch.zeros((), dtype=query.dtype, device=query.device)
        if role.relative_bias is not None:
            length = self._lengths.get(role.site, 0)
            keys = torch.arange(length + num_keys, device=query.device)
            queries = self._offset(role.site) + torch.arange(num_queries, device=query.device)
            additive = role.relative_bias(keys - queries[:, None]).permute(2, 0, 1)[None]
            if seen is None and role.site == "decoder":
                seen = (keys <= queries[:, None])[None, None]
        return additive if seen is None else torch.where(seen, additive, float("-inf"))

    def _decoder_seen(
        self, num_keys: int, device: torch.device, window: int | None
    ) -> Tensor | None:
        length = self._lengths.get("decoder", 0)
        if length == 0 and (window is None or window >= num_keys):
            return None
        own = self._own_index(num_keys, device)  # [1 or B, K]
        prefix = torch.arange(length, device=device)[None]
        if self._infix_starts is not None:
            prefix = prefix + self._infix_starts[:, None]
        keys = torch.cat([prefix, own], 1)[:, None, None, :]
        queries = own[:, None, :, None]
        seen = keys <= queries
        return seen if window is None else seen & (keys > queries - window)

    def _encoder_seen(self, site: Site) -> Tensor | None:
        if self._encoder_mask is None:
            return None
        seen = F.pad(self._encoder_mask, (self._lengths.get(site, 0), 0), value=True)
        return seen[:, None, None, :]


_ACTIVE: ContextVar[AttentionPlan | None] = ContextVar("prefixd_train_plan", default=None)


def _rows(prefix: Tensor, own: Tensor) -> Tensor:
    """[H_kv, P, D] -> [B, H_kv, P, D] without a copy"""
    return prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: LayerOptions,
    causal: bool,
) -> Tensor:
    """[B, H, Q, D]"""
    groups = query.shape[1] // key.shape[1]
    # CUDA's fast kernels take a mask or grouped heads, not both; and the soft cap has no kernel.
    on_cpu = query.device.type == "cpu"
    if groups > 1 and (options.softcap is not None or not (on_cpu or mask is None)):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=options.scaling,
            enable_gqa=groups > 1,
        )
    # Gemma 2: spelt out, softmax in float32 as eager does.
    scores = query @ key.transpose(2, 3) * options.scaling
    scores = torch.tanh(scores / options.softcap) * options.softcap
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, D]; key and value [B, H_kv, K, D] -> [B, Q, H, D]"""
    plan = _ACTIVE.get()
    if plan is None:
        raise RuntimeError(
            f"{type(module).__name__} was called outside of prefixd_train's forward: call"
            " prefixd_train.inject.forward, or set another attention implementation"
        )
    if kwargs.get("s_aux") is not None:
        raise TypeError(f"{type(module).__name__} uses attention sinks")
    role: Role | None = getattr(module, _ROLE, None)
    if role is None:
        role = Role("decoder", int(module.layer_idx))  # type: ignore[arg-type]
    options = LayerOptions(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap
    )
    return plan.attend(role, query, key, value, options).contiguous(), None


def assign_role(module: nn.Module, role: Role) -> None:
    setattr(module, _ROLE, role)


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
