"""The rotary kernel replaces what it equals, in our modules alone."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from prefixd_server.models import rotary
from prefixd_server.native import kernels

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}


@pytest.fixture
def loaded() -> kernels.Kernels:
    found = kernels.load()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def replaced(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if "forward" in vars(child)]


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])  # the kernel is for one packed row; others go as before
def test_logits_stay_and_the_library_is_left_as_it_is(loaded: kernels.Kernels, rows: int) -> None:
    module, untouched = llama(), llama()
    untouched.load_state_dict(module.state_dict())
    tokens = torch.arange(rows * 9).view(rows, 9)
    rotary.use_kernel(module, loaded)
    assert replaced(module) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert replaced(untouched) == []
    torch.testing.assert_close(
        module(input_ids=tokens).logits, untouched(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_a_forward_in_a_decorator(loaded: kernels.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 has them: the decorator stays around what has the kernel."""
    called: list[str] = []
    inner = LlamaAttention.forward

    @wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        called.append(type(args[0]).__name__)
        return inner(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", outer)
    module, untouched = llama(), llama()
    untouched.load_state_dict(module.state_dict())
    tokens = torch.arange(9)[None]
    expected = untouched(input_ids=tokens).logits
    rotary.use_kernel(module, loaded)
    assert replaced(module) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    rotations: list[int] = []
    rotate = loaded.rotate
    monkeypatch.setattr(
        loaded, "rotate", lambda x, *angles: rotations.append(1) or rotate(x, *angles)
    )
    called.clear()
    torch.testing.assert_close(module(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert called == ["LlamaAttention"] * 2
    assert len(rotations) == 4  # queries and keys of two layers


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(loaded: kernels.Kernels, layout: str) -> None:
    x = torch.randn(1, 7, 3, 40)
    if layout == "sliced":
        x = torch.randn(1, 7, 5 * 40)[..., 40:160].view(1, 7, 3, 40)
    x = x.transpose(1, 2)
    cos, sin = torch.randn(2, 1, 7, 40)
    half = torch.cat((-x[..., 20:], x[..., :20]), -1)
    torch.testing.assert_close(loaded.rotate(x, cos, sin), x * cos[:, None] + half * sin[:, None])


def test_another_rotation_keeps_its_own(loaded: kernels.Kernels) -> None:
    cohere = CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2)).eval()
    rotary.use_kernel(cohere, loaded)
    assert replaced(cohere) == []  # it turns neighbours, not halves


@torch.inference_mode()
def test_a_part_of_a_head_is_turned_as_before(loaded: kernels.Kernels) -> None:
    module = PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)).eval()
    tokens = torch.arange(9)[None]
    expected = module(input_ids=tokens).logits
    rotary.use_kernel(module, loaded)
    torch.testing.assert_close(module(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
