"""The families of decoder-only models that are served, each as a tiny configuration, and some that
are refused. ``tests/e2e/test_families.py`` runs them, ``docs/models.md`` is written from them.

Grouped-query attention where the family has it, windows far shorter than the contexts of the tests,
layers that alternate where the family's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from tests.support.models import save_random_model

__all__ = ["FAMILIES", "ORIGINAL_POSITIONS", "REFUSED", "VOCAB", "WINDOW", "WINDOWED", "Family"]

VOCAB = 1000
WINDOW = 16
MAX_POSITIONS = 512
ORIGINAL_POSITIONS = 256


@dataclass(frozen=True)
class Family:
    """One row of a table in docs/models.md."""

    title: str
    model_type: str
    """the key of transformers' ``CONFIG_MAPPING``"""
    options: dict[str, Any]
    notes: str = ""
    """what is particular about its attention; of a refused family, a part of the reason given"""

    def save(self, folder: Path) -> Path:
        """A random model with a tokenizer of as many words as its vocabulary has."""
        words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = Whitespace()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
        config = CONFIG_MAPPING[self.model_type](**special, **self.options)
        return save_random_model(config, fast, folder)


_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS}
_MHA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GQA = {**_MHA, "num_attention_heads": 6, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}
_SLIDING = {"sliding_window": WINDOW}
_EVERY_OTHER = {
    **_SLIDING,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_QWEN_SLIDING = {**_SLIDING, "use_sliding_window": True, "max_window_layers": 1}


_HEADS_16 = {**_GQA, "head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
    },
    "original_max_position_embeddings": ORIGINAL_POSITIONS,
}
WINDOWED = "a sliding window in every layer"
_ALTERNATING = "layers with and without a sliding window"

_SERVED = [
    Family("GPT-2", "gpt2", _GPT2, "learned positions"),
    Family("GPT-NeoX", "gpt_neox", _MHA, "rotates a part of each head"),
    Family("OPT", "opt", {**_MHA, "ffn_dim": 96, "word_embed_proj_dim": 48}, "learned positions"),
    Family("GPT-BigCode", "gpt_bigcode", _GPT2, "one KV head for all query heads"),
    Family("GPT-BigCode, multi-head", "gpt_bigcode", {**_GPT2, "multi_query": False}),
    Family("Llama", "llama", _GQA),
    Family("Mistral", "mistral", {**_GQA, "sliding_window": None}),
    Family("Mistral, sliding window", "mistral", {**_GQA, **_SLIDING}, WINDOWED),
    Family("Mixtral", "mixtral", {**_GQA, "num_local_experts": 4}, "mixture of experts"),
    Family("Qwen2", "qwen2", _GQA),
    Family("Qwen2, sliding window", "qwen2", {**_GQA, **_QWEN_SLIDING}, _ALTERNATING),
    Family("Qwen3", "qwen3", _HEADS_16),
    Family("Qwen3-MoE", "qwen3_moe", {**_HEADS_16, **_MOE}, "mixture of experts"),
    Family("Gemma", "gemma", _HEADS_16),
    Family("Gemma 2", "gemma2", {**_GEMMA, **_SLIDING}, f"soft-capped scores; {_ALTERNATING}"),
    Family(
        "Gemma 3, text",
        "gemma3_text",
        {**_GEMMA, **_SLIDING, "sliding_window_pattern": 2},
        f"{_ALTERNATING}, each with a RoPE of its own",
    ),
    Family("Phi", "phi", _GQA, "rotates a part of each head"),
    Family("Phi-3", "phi3", _GQA),
    Family("Phi-3, sliding window", "phi3", {**_GQA, **_SLIDING}, WINDOWED),
    Family("Phi-3, long RoPE", "phi3", {**_GQA, **_LONG_ROPE}, "up to the original context"),
    Family("StarCoder2", "starcoder2", {**_GQA, **_SLIDING}, WINDOWED),
    Family(
        "Granite", "granite", {**_GQA, "attention_multiplier": 0.3}, "scales scores its own way"
    ),
    Family("OLMo 2", "olmo2", _GQA),
    Family("StableLM", "stablelm", _GQA, "the attention metadata travels on the mask"),
    Family("Cohere", "cohere", {**_GQA, "logit_scale": 1.0}),
    Family("SmolLM3", "smollm3", {**_GQA, "no_rope_layer_interval": 2}, "layers without RoPE"),
    Family("GLM-4", "glm4", _HEADS_16, "rotates a part of each head"),
    Family(
        "Cohere 2", "cohere2", {**_GQA, **_EVERY_OTHER}, f"{_ALTERNATING}, the latter without RoPE"
    ),
    Family("OLMo 3", "olmo3", {**_GQA, **_EVERY_OTHER}, _ALTERNATING),
    Family("Nemotron", "nemotron", _GQA, "the attention metadata travels on the mask"),
]

_INTERFACE = "attention through transformers' AttentionInterface"
_NOT_THE_INTERFACE = "attention does not go through transformers' AttentionInterface"
_MPT = {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_POSITIONS}

_NOT_SERVED = [
    Family("Bloom", "bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4}, _NOT_THE_INTERFACE),
    Family(
        "Falcon",
        "falcon",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        _NOT_THE_INTERFACE,
    ),
    Family("MPT", "mpt", _MPT, _NOT_THE_INTERFACE),
    Family(
        "gpt-oss",
        "gpt_oss",
        {**_HEADS_16, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        "uses attention sinks",
    ),
    Family(
        "Llama 4",
        "llama4_text",
        {**_HEADS_16, "num_local_experts": 2, "attention_chunk_size": 16},
        "layer 0 is of type chunked_attention",
    ),
    Family(
        "PhiMoE with a sliding window",
        "phimoe",
        {**_GQA, **_SLIDING, "num_local_experts": 4},
        f"layer 0 has a window of {WINDOW} tokens but tells attention of None",
    ),
    Family("Gemma 4", "gemma4_text", {**_HEADS_16, **_SLIDING}, "its layers' KV shapes differ"),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        {**_GQA, "n_routed_experts": 4},
        "its layers' KV shapes differ: (heads, key dim, value dim)",
    ),
    Family(
        "Mamba",
        "mamba",
        {"hidden_size": 48, "num_hidden_layers": 2},
        f"0 of its 2 layers call {_INTERFACE}",
    ),
]

FAMILIES = {family.title: family for family in _SERVED}
REFUSED = {family.title: family for family in _NOT_SERVED}
