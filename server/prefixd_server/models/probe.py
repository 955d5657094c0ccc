"""Finds a model's KV geometry, and whether it can be served at all, by running it.

Config classes name heads and sizes in many ways; what matters is what reaches the attention
function, so one packed step of two short sequences is run and observed. The same step run on the
reference attention of transformers must give the same logits: a family whose attention does not go
through ``AttentionInterface``, or that alters scores in a way the plan does not know of (ALiBi,
attention sinks), is refused at start-up, by name. So is one with a window that only its mask knows,
which would not show on a short step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixd_server.attention.base import LayerOptions, StepPlan
from prefixd_server.attention.interface import IMPLEMENTATION, PlanNotPassed, carry_plan_on_mask
from prefixd_server.errors import UnsupportedModel
from prefixd_store.geometry import Geometry

__all__ = ["observe_geometry", "run_packed_step"]

_LENGTHS = (5, 3)


class _ObservingPlan(StepPlan):
    """Packed causal attention with no cache, which notes each layer's shapes."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        self.shapes[layer] = (key.shape[1], key.shape[2], value.shape[2])
        self.windows[layer] = options.sliding_window
        repeats = query.shape[1] // key.shape[1]
        rows = [
            _causal(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), options)
            for q, k, v in zip(
                torch.split(query, self.lengths),
                torch.split(key, self.lengths),
                torch.split(value, self.lengths),
                strict=True,
            )
        ]
        return torch.cat(rows)


def _causal(query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
    """[T, H, D] each -> [T, H, D]"""
    scores = torch.einsum("qhd,khd->hqk", query, key) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    length = query.shape[0]
    index = torch.arange(length, device=query.device)
    hidden = index[None, :] > index[:, None]
    if options.sliding_window is not None:
        hidden |= index[None, :] <= index[:, None] - options.sliding_window
    weights = F.softmax(scores.float().masked_fill(hidden, float("-inf")), -1).to(value.dtype)
    return torch.einsum("hqk,khd->qhd", weights, value)


@torch.inference_mode()
def observe_geometry(module: Any, *, num_layers: int) -> Geometry:
    """Raises UnsupportedModel if this model's own code cannot run a packed step correctly."""
    name = type(module).__name__
    tokens = torch.arange(1, sum(_LENGTHS) + 1, device=module.device)[None]
    plan, packed = _run_packed(module, tokens)
    if sorted(plan.shapes) != list(range(num_layers)):
        raise UnsupportedModel(
            f"{name} cannot be served: {len(plan.shapes)} of its {num_layers} layers call attention"
            " through transformers' AttentionInterface"
        )
    shapes = set(plan.shapes.values())
    if len(shapes) != 1 or any(key_dim != value_dim for _, key_dim, value_dim in shapes):
        raise UnsupportedModel(
            f"{name} cannot be served yet: its layers' KV shapes differ: (heads, key dim, value"
            f" dim) are {sorted(shapes)}"
        )
    _check_windows(name, plan.windows, module.config.get_text_config(decoder=True))
    _compare_with_reference(module, name, tokens, packed)
    num_kv_heads, head_dim, _ = shapes.pop()
    return Geometry(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)


@torch.inference_mode()
def run_packed_step(module: Any) -> Tensor:
    """Run what :func:`observe_geometry` has run, for others to observe; the logits [T, V]."""
    return _run_packed(module, torch.arange(1, sum(_LENGTHS) + 1, device=module.device)[None])[1]


def _run_packed(module: Any, tokens: Tensor) -> tuple[_ObservingPlan, Tensor]:
    """The plan and the logits [T, V]."""
    plan = _ObservingPlan(_LENGTHS)
    positions = torch.cat([torch.arange(n, device=tokens.device) for n in _LENGTHS])[None]
    arguments = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    try:
        try:
            output = module(**arguments, attention_plan=plan)
        except PlanNotPassed:
            carry_plan_on_mask(module)
            output = module(**arguments, attention_plan=plan)
    except Exception as error:
        # A family with attention code of its own may fail in any way at all.
        name = type(module).__name__
        raise UnsupportedModel(f"{name} cannot be served: {_reason(error)}") from error
    return plan, output.logits[0]


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):
        return str(error)
    return f"running a packed step failed with {type(error).__name__}: {error}"


def _check_windows(name: str, observed: dict[int, int | None], config: Any) -> None:
    """Some families tell only the mask of a window (PhiMoE), or of chunks (Llama 4)."""
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(config, "layer_types", None) or [default] * len(observed)
    expected = {"full_attention": None, "sliding_attention": window}
    for layer, kind in enumerate(layer_types):
        if kind not in expected:
            raise UnsupportedModel(f"{name} cannot be served: layer {layer} is of type {kind}")
        if observed[layer] != expected[kind]:
            raise UnsupportedModel(
                f"{name} cannot be served: layer {layer} has a window of {expected[kind]} tokens"
                f" but tells attention of {observed[layer]}"
            )


def _compare_with_reference(module: Any, name: str, tokens: Tensor, packed: Tensor) -> None:
    module.set_attn_implementation("eager")
    try:
        alone = [
            module(input_ids=part, use_cache=False).logits[0]
            for part in torch.split(tokens, list(_LENGTHS), dim=1)
        ]
    finally:
        module.set_attn_implementation(IMPLEMENTATION)
    expected = torch.cat(alone).float()
    # Loose enough for bfloat16, tight enough that a missing bias or mask shows.
    tolerance = 1e-3 if packed.dtype == torch.float32 else 0.1
    error = ((packed.float() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be served: a packed step differs from its own attention by"
            f" {error:.2g} (relative), so it does more than AttentionInterface is told of"
        )
