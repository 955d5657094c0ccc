"""Finds the shapes of an LM's sites, and whether it can be trained for, by running it.

Config classes name heads and sizes in many ways; what matters is what reaches the attention
function. The same step run with the model's eager attention must give the same logits: a family
whose attention does not go through ``AttentionInterface``, or that alters scores in a way our
function does not know of (ALiBi, attention sinks), is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from prefixd_train.attention import (
    IMPLEMENTATION,
    AttentionPlan,
    LayerOptions,
    RelativeBias,
    Role,
    assign_role,
)
from prefixd_train.sites import Site, SiteShape

__all__ = ["UnsupportedModel", "assign_roles", "observe_shapes"]

_SELF = ("self_attn", "SelfAttention")
_CROSS = ("encoder_attn", "EncDecAttention")
_TOKENS = (5, 6, 7, 8, 9)
_LONGEST_REASON = 300


class UnsupportedModel(ValueError):
    """This LM cannot have a prefix trained; the message names it and says why."""


class _ObservingPlan(AttentionPlan):
    """No prefix; notes each layer's shapes."""

    def __init__(self) -> None:
        super().__init__({})
        self.shapes: dict[tuple[Site, int], tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}

    def observe(self, role: Role, key: Tensor, value: Tensor, options: LayerOptions) -> None:
        self.shapes[role.site, role.layer] = (key.shape[1], key.shape[3], value.shape[3])
        if role.site == "decoder":
            self.windows[role.layer] = options.sliding_window


class _BucketedBias:
    """T5's relative position bias, looked up for any positions with the model's own buckets."""

    def __init__(self, attention: Any, *, bidirectional: bool) -> None:
        self._attention = attention
        self._bidirectional = bidirectional

    def __call__(self, relative: Tensor) -> Tensor:
        attention = self._attention
        buckets = attention._relative_position_bucket(
            relative,
            bidirectional=self._bidirectional,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return cast(Tensor, attention.relative_attention_bias(buckets))


def assign_roles(module: Any) -> bool:
    """Tell the three attentions of an encoder-decoder apart; returns whether its positions are
    relative (T5) and not embedded (BART)."""
    encoder, decoder = module.get_encoder(), module.get_decoder()
    _mark(encoder, _SELF, "encoder")
    _mark(decoder, _SELF, "decoder")
    _mark(decoder, _CROSS, "cross")
    return any(hasattr(part, "relative_attention_bias") for part in encoder.modules())


def _mark(stack: nn.Module, names: Sequence[str], site: Site) -> None:
    found = [m for name, m in stack.named_modules() if name.rpartition(".")[2] in names]
    bias: RelativeBias | None = None
    for layer, attention in enumerate(found):
        if hasattr(attention, "relative_attention_bias"):
            # T5 has one table, in layer 0, for all layers; UMT5 has one in each.
            bias = _BucketedBias(attention, bidirectional=site == "encoder")
        assign_role(attention, Role(site, layer, bias))


@torch.inference_mode()
def observe_shapes(module: Any) -> dict[Site, SiteShape]:
    """Raises UnsupportedModel if this model's own code does not run our attention correctly."""
    name = type(module).__name__
    plan = _ObservingPlan()
    try:
        with plan.active():
            ours = _run(module)
    except Exception as error:
        # A family with attention code of its own may fail in any way at all.
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UnsupportedModel(f"{name} cannot be trained for: {reason}") from error
    shapes = _shapes(name, plan, module)
    if not module.config.is_encoder_decoder:
        _check_windows(name, plan.windows, module.config.get_text_config(decoder=True))
    _compare_with_eager(module, name, ours)
    return shapes


def _run(module: Any) -> Tensor:
    tokens = torch.tensor([_TOKENS], device=module.device)
    arguments = {"input_ids": tokens, "use_cache": False}
    if module.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens
    return cast(Tensor, module(**arguments).logits)


def _shapes(name: str, plan: _ObservingPlan, module: Any) -> dict[Site, SiteShape]:
    found: dict[Site, SiteShape] = {}
    for site in dict.fromkeys(site for site, _ in plan.shapes):
        shapes = {shape for (its, _), shape in plan.shapes.items() if its == site}
        heads, key_dim, value_dim = min(shapes)
        if len(shapes) > 1 or key_dim != value_dim:
            raise UnsupportedModel(
                f"{name} cannot be trained for: the KV shapes of its {site} attention differ:"
                f" (heads, key dim, value dim) are {sorted(shapes)}"
            )
        num_layers = sum(its == site for its, _ in plan.shapes)
        found[site] = SiteShape(num_layers, heads, key_dim)
    config = module.config
    expected: dict[Site, int] = {"decoder": config.get_text_config(decoder=True).num_hidden_layers}
    if config.is_encoder_decoder:
        layers = getattr(module.get_decoder(), "layers", None) or module.get_decoder().block
        expected = {"decoder": len(layers), "cross": len(layers)}
    for site, num_layers in expected.items():
        got = found[site].num_layers if site in found else 0
        if got != num_layers:
            raise UnsupportedModel(
                f"{name} cannot be trained for: {got} of the {num_layers} layers of its {site}"
                " attention go through transformers' AttentionInterface"
            )
    if config.is_encoder_decoder and "encoder" not in found:
        raise UnsupportedModel(
            f"{name} cannot be trained for: its encoder's attention modules are not those of BART"
            f" or T5 ({', '.join(_SELF)})"
        )
    return found


def _check_windows(name: str, observed: dict[int, int | None], config: Any) -> None:
    """Some families tell only the mask of a window (PhiMoE), or of chunks (Llama 4)."""
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(config, "layer_types", None) or [default] * len(observed)
    expected = {"full_attention": None, "sliding_attention": window}
    for layer, kind in enumerate(layer_types):
        if kind not in expected:
            raise UnsupportedModel(f"{name} cannot be trained for: layer {layer} is of type {kind}")
        if observed[layer] != expected[kind]:
            raise UnsupportedModel(
                f"{name} cannot be trained for: layer {layer} has a window of {expected[kind]}"
                f" tokens but tells attention of {observed[layer]}"
            )


def _compare_with_eager(module: Any, name: str, ours: Tensor) -> None:
    module.set_attn_implementation("eager")
    try:
        expected = _run(module).float()
    finally:
        module.set_attn_implementation(IMPLEMENTATION)
    # Loose enough for bfloat16, tight enough that a missing bias or mask shows.
    tolerance = 0.1 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = ((ours.float() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be trained for: a step differs from its own attention by {error:.2g}"
            " (relative), so it does more than AttentionInterface is told of"
        )
