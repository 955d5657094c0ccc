"""Which families can be served is found by running them: geometry, or a refusal with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3Config,
    StableLmConfig,
)

from prefixd_server.attention import interface
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models.probe import observe_geometry
from tests.support.models import TINY
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 64
GQA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    interface.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=interface.IMPLEMENTATION, dtype=dtype
    )
    return model.eval()


@pytest.mark.parametrize(
    ("config", "num_layers", "num_kv_heads", "head_dim"),
    [
        pytest.param(TINY["llama"](VOCAB), 3, 2, 8, id="llama"),
        pytest.param(TINY["gpt2"](VOCAB), 2, 4, 12, id="gpt2"),
        pytest.param(
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            ),
            *(2, 4, 8),
            id="opt",
        ),
        pytest.param(GPTNeoXConfig(**GQA), 2, 4, 8, id="gpt_neox"),
        pytest.param(MistralConfig(**GQA, sliding_window=3), 2, 2, 8, id="mistral"),
        pytest.param(Gemma2Config(**GQA, head_dim=16, sliding_window=3), 2, 2, 16, id="gemma2"),
        pytest.param(Qwen3Config(**GQA, head_dim=16), 2, 2, 16, id="qwen3"),
        pytest.param(StableLmConfig(**GQA), 2, 2, 8, id="stablelm: drops keyword arguments"),
    ],
)
def test_the_geometry_is_what_reaches_attention(
    config: PreTrainedConfig, num_layers: int, num_kv_heads: int, head_dim: int
) -> None:
    model = make_model(config)
    geometry = observe_geometry(model, num_layers=num_layers)
    assert geometry.num_layers == num_layers
    assert geometry.num_kv_heads == num_kv_heads
    assert geometry.head_dim == head_dim
    assert model.config._attn_implementation == interface.IMPLEMENTATION, "left as it was"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_passes_the_comparison(family: str) -> None:
    geometry = observe_geometry(
        make_model(TINY[family](VOCAB), torch.bfloat16), num_layers=3 if family == "llama" else 2
    )
    assert geometry.num_layers > 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(
            BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
            "BloomForCausalLM.* 0 of its 2 layers call attention through .*AttentionInterface",
            id="bloom: attention of its own, with ALiBi",
        ),
        pytest.param(
            MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
            "MptForCausalLM.* running a packed step failed",
            id="mpt: falls over without a mask",
        ),
        pytest.param(
            GptOssConfig(
                **{**GQA, "intermediate_size": 32},
                head_dim=8,
                num_local_experts=2,
                num_experts_per_tok=1,
            ),
            "GptOssForCausalLM.* attention sinks",
            id="gpt-oss: attention sinks",
        ),
        pytest.param(
            Lfm2Config(**GQA, layer_types=["conv", "full_attention"]),
            "Lfm2ForCausalLM.* 1 of its 2 layers",
            id="lfm2: layers with another kind of state",
        ),
        pytest.param(
            PhimoeConfig(**GQA, num_local_experts=2, sliding_window=100),
            "PhimoeForCausalLM.* layer 0 has a window of 100 tokens but tells attention of None",
            id="phimoe: a window that only the mask knows",
        ),
        pytest.param(
            Llama4TextConfig(**GQA, intermediate_size_mlp=64, head_dim=8, moe_layers=[]),
            "Llama4ForCausalLM.* layer 0 is of type chunked_attention",
            id="llama4: a mask that shows only far on",
        ),
    ],
)
def test_a_family_that_cannot_be_served_is_refused_by_name(
    config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        observe_geometry(make_model(config), num_layers=2)


def test_scores_that_the_plan_is_not_told_of_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that would add a bias to its scores: here Llama, with the bias in its eager code."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def biased(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        return eager(module, query, key.roll(1, dims=2), *args, **kwargs)

    model = make_model(TINY["llama"](VOCAB))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    observe_geometry(model, num_layers=3)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    with pytest.raises(UnsupportedModel, match=r"differs from its own attention by \d"):
        observe_geometry(model, num_layers=3)
