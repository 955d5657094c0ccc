"""Sizes of known models, for benchmarks that need their shapes and not their weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

__all__ = ["GEOMETRIES", "Geometry"]


@dataclass(frozen=True)
class Geometry:
    """Of a Llama: ``hidden`` and ``intermediate`` in elements, ``vocab`` in tokens, the others in
    layers and heads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self, *, tied: bool = False) -> LlamaConfig:
        """``tied``: the output layer is the embedding, as in the small models themselves."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            tie_word_embeddings=tied,
        )


GEOMETRIES = {
    "8b": Geometry(4096, 14336, 32, 32, 8, 128256),
    "1b": Geometry(2048, 8192, 16, 32, 8, 128256),
    "360m": Geometry(960, 2560, 32, 15, 5, 49152),
    "tiny": Geometry(64, 128, 2, 4, 2, 199),
}
"""Llama 3's 8B and Llama 3.2's 1B, SmolLM2's 360M, and a toy"""
