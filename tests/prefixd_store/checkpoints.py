"""Checkpoints for the tests: ours made by hand, byte for byte, and PEFT's saved by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prefixd_store import DType, Geometry, PrefixArray

# Grouped-query, with a head size that is not hidden_size / heads; and plain multi-head.
GEOMETRIES = {"llama": Geometry(3, 2, 16, 512), "gpt2": Geometry(2, 4, 8, 512)}


def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=512)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
        )
    )


def save_peft(
    folder: Path,
    *,
    family: str = "llama",
    tokens: int = 7,
    dtype: torch.dtype = torch.float32,
    cartridge: bool = False,
    projection: bool = False,
) -> PeftModel:
    """Save an adapter with the library itself; the model that saved it."""
    model = tiny_model(family).to(dtype)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": tokens}
    if cartridge:
        config = CartridgeConfig(**common, num_frozen_tokens=1)
    else:
        extra = {"prefix_projection": True, "encoder_hidden_size": 24} if projection else {}
        config = PrefixTuningConfig(**common, **extra)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    peft_model.prompt_encoder.to(dtype)
    peft_model.save_pretrained(folder)
    return peft_model


def prompt_of(peft_model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values [L, H_kv, P, D] that PEFT feeds the model."""
    with torch.no_grad():
        cache = peft_model.get_prompt(batch_size=1)
    assert isinstance(cache, DynamicCache)
    return (
        torch.stack([layer.keys[0] for layer in cache.layers]),
        torch.stack([layer.values[0] for layer in cache.layers]),
    )


def to_torch(array: PrefixArray) -> torch.Tensor:
    tensor = torch.from_numpy(array.data.copy())
    return tensor.view(torch.bfloat16) if array.dtype == "bfloat16" else tensor


def random_arrays(
    shape: tuple[int, ...] = (2, 3, 5, 4),
    dtype: DType = "float32",
    sites: tuple[str, ...] = ("decoder",),
) -> dict[str, PrefixArray]:
    rng = np.random.default_rng(0)
    return {
        f"{site}.{part}": PrefixArray(rng.standard_normal(shape, np.float32), "float32").cast(dtype)
        for site in sites
        for part in ("key", "value")
    }


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def raw_file(header: Any, data: bytes = b"", *, pad: bool = True) -> bytes:
    """A safetensors file with any header: a JSON value, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    if pad:
        raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data
