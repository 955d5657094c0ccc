"""Finds an encoder-decoder's KV geometry, and whether it can be served at all, by running it.

As ``probe.py`` does for decoder-only models: two texts of different lengths are encoded in one
batch and decoded in one packed step, which must give what the model's own eager attention gives
for each alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from prefixd_server.attention import CrossSpan, LayerOptions, SequenceSpan, create_backend
from prefixd_server.attention.base import StepPlan
from prefixd_server.attention.seq2seq import IMPLEMENTATION, EncoderPlan, EncoderRow, Seq2SeqPlan
from prefixd_server.errors import UnsupportedModel
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.seq2seq import Seq2SeqModel
from prefixd_store.geometry import Geometry, SiteGeometry

__all__ = ["observe_seq2seq_geometry"]

_LONGEST_REASON = 300
_TEXTS = ([5, 6, 7, 8, 9], [4, 3, 2])
_OUTPUTS = ([2, 5, 4, 3], [3, 6])
_PAGES = [(0,), (1,), (2,), (3,)]
"""decoder and cross pages of the two sequences"""


class _ShapeNotes(StepPlan):
    """In the place of both plans: notes each layer's KV shape, attends to nothing."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        if query.dim() == 4:  # the encoder's
            self.shapes.append((key.shape[1], key.shape[3], value.shape[3]))
            return query.new_zeros(query.shape[0], *query.shape[2:0:-1], value.shape[3])
        self.shapes.append((key.shape[1], key.shape[2], value.shape[2]))
        return query.new_zeros(*query.shape[:2], value.shape[2])


@torch.inference_mode()
def observe_seq2seq_geometry(model: Seq2SeqModel) -> Geometry:
    """Raises UnsupportedModel if this model's own code cannot run our steps correctly."""
    name = type(model.module).__name__
    try:
        num_kv_heads, head_dim = _shape(model, name)
        packed = _run(model, num_kv_heads, head_dim)
    except UnsupportedModel:
        raise
    except Exception as error:
        # A family with attention code of its own may fail in any way at all.
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise UnsupportedModel(f"{name} cannot be served: {reason}") from error
    _compare_with_reference(model, name, packed)
    return Geometry(
        num_layers=model.num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        encoder=SiteGeometry(model.num_encoder_layers, num_kv_heads, head_dim),
        encoder_starts_at_zero=not model.has_relative_positions,
    )


def _shape(model: Seq2SeqModel, name: str) -> tuple[int, int]:
    notes = _ShapeNotes()
    encoded = model.encode(_TEXTS, notes)
    tokens, positions, keep = _packed()
    model.decode(tokens, positions, encoded, Seq2SeqPlan(notes, notes), keep)
    expected = model.num_encoder_layers + 2 * model.num_layers
    if len(notes.shapes) != expected:
        raise UnsupportedModel(
            f"{name} cannot be served: {len(notes.shapes)} of its {expected} attentions go through"
            " transformers' AttentionInterface"
        )
    shapes = set(notes.shapes)
    if len(shapes) != 1 or any(key_dim != value_dim for _, key_dim, value_dim in shapes):
        raise UnsupportedModel(
            f"{name} cannot be served: its attentions' KV shapes differ: (heads, key dim, value"
            f" dim) are {sorted(shapes)}"
        )
    num_kv_heads, head_dim, _ = shapes.pop()
    return num_kv_heads, head_dim


def _run(model: Seq2SeqModel, num_kv_heads: int, head_dim: int) -> Tensor:
    """Logits [T, V] of both sequences' decoder tokens, on the reference backend."""
    pool = KVPool(
        num_layers=model.num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_pages=len(_PAGES),
        page_size=8,
        dtype=next(model.module.parameters()).dtype,
        device=model.device,
    )
    backend = create_backend("sdpa", pool)
    encoded = model.encode(_TEXTS, EncoderPlan(pool, [EncoderRow(len(t)) for t in _TEXTS]))
    plan = Seq2SeqPlan(
        backend.plan([SequenceSpan(len(_OUTPUTS[i]), 0, _PAGES[i]) for i in range(2)]),
        backend.plan(
            [CrossSpan(len(_OUTPUTS[i]), len(_TEXTS[i]), _PAGES[2 + i], True) for i in range(2)]
        ),
    )
    tokens, positions, keep = _packed()
    return model.decode(tokens, positions, encoded, plan, keep)


def _packed() -> tuple[list[int], list[int], list[int]]:
    tokens = [token for output in _OUTPUTS for token in output]
    positions = [position for output in _OUTPUTS for position in range(len(output))]
    return tokens, positions, list(range(len(tokens)))


def _compare_with_reference(model: Seq2SeqModel, name: str, packed: Tensor) -> None:
    module = model.module
    module.set_attn_implementation("eager")
    try:
        alone = [
            module(
                input_ids=torch.tensor([text], device=model.device),
                decoder_input_ids=torch.tensor([output], device=model.device),
                use_cache=False,
            ).logits[0]
            for text, output in zip(_TEXTS, _OUTPUTS, strict=True)
        ]
    finally:
        module.set_attn_implementation(IMPLEMENTATION)
    expected = torch.cat(alone).float()
    # Loose enough for bfloat16, tight enough that a missing bias or mask shows.
    tolerance = 1e-3 if packed.dtype == torch.float32 else 0.1
    error = cast(float, ((packed.float() - expected).norm() / expected.norm()).item())
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be served: a packed step differs from its own attention by"
            f" {error:.2g} (relative), so it does more than AttentionInterface is told of"
        )
