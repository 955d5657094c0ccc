"""Plugs a :class:`~prefixd_server.attention.base.StepPlan` into transformers' own modelling code.

transformers calls ``AttentionInterface`` functions with extra keyword arguments of ``model(...)``;
the plan travels as one of them, so there is no ambient state. A few families drop them on the way
(StableLM, Nemotron). All hand the attention mask down, one of four dimensions as it is: there the
plan travels on the mask (:func:`carry_plan_on_mask`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixd_server.attention.base import LayerOptions, StepPlan

__all__ = ["IMPLEMENTATION", "PlanNotPassed", "carry_plan_on_mask", "register"]

IMPLEMENTATION = "prefixd"
"""the name to load a model with: ``attn_implementation=IMPLEMENTATION``. There is no mask function
of that name, so transformers makes no masks, nor looks at the positions for packed sequences, for
which a device is waited for: the plan knows who sees whom."""


class PlanNotPassed(TypeError):
    """The model's own code drops the keyword argument that carries the plan."""


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
        attention_plan = getattr(attention_mask, "attention_plan", None)
    if attention_plan is None:
        name = type(module).__name__
        raise PlanNotPassed(f"{name} does not pass `attention_plan` on to attention")
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


def carry_plan_on_mask(module: nn.Module) -> None:
    """Have every later ``module(..., attention_plan=plan)`` take the plan along on its mask."""

    def move(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan = kwargs.pop("attention_plan", None)
        if plan is not None:
            mask: Any = torch.empty(1, 1, 1, 1)
            mask.attention_plan = plan
            kwargs["attention_mask"] = mask
        return args, kwargs

    module.register_forward_pre_hook(move, with_kwargs=True)


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
