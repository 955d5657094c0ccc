"""Plugs a :class:`~prefixd_server.attention.base.StepPlan` into transformers' own modelling code.

transformers calls ``AttentionInterface`` functions with extra keyword arguments of ``model(...)``;
the plan travels as one of them, so there is no ambient state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefixd_server.attention.base import LayerOptions, StepPlan

__all__ = ["IMPLEMENTATION", "register"]

IMPLEMENTATION = "prefixd"
"""the name to load a model with: ``attn_implementation=IMPLEMENTATION``"""


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
    attention_plan: StepPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D]; key and value [1, H_kv, T, D] -> [1, T, H, D]"""
    if attention_plan is None:
        raise TypeError(f"{type(module).__name__} does not pass `attention_plan` on to attention")
    if kwargs.get("s_aux") is not None:
        raise TypeError(f"{type(module).__name__} uses attention sinks")
    options = LayerOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    output = attention_plan.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        options,
    )
    return output.unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The plan knows who sees whom; transformers need not build a mask over the packed step."""


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
