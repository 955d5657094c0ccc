"""Gradient checkpointing of the frozen LM: a layer's activations are made again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM

__all__ = ["recompute_layers"]


def recompute_layers(lm: FrozenLM) -> None:
    """Memory of one layer instead of all, for one more forward pass. Raises TrainError.

    transformers' own switch works only in training mode, where the LM's dropout would act.
    """
    layers = [m for m in lm.module.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainError(f"{lm.name} has no layers that transformers can checkpoint")
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # The backward may be in another thread, and is outside of the forward that knows its plan.
        context = copy_context()

        def again(*args: Any, **kwargs: Any) -> Any:
            return context.copy().run(forward, *args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return run
