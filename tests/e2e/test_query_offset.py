"""Prefixes whose prompts begin at position 0 and at P share a batch, each right at its own.

PEFT always begins at P; AdapterHub and the paper's BART code begin at 0. The oracle is transformers
itself, given the prefix as ``past_key_values`` and the positions explicitly.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import DynamicCache

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_store import PrefixArray, write_prefix
from prefixd_store.format import validate_file
from tests.support.engine import EngineRun, request
from tests.support.models import load_base, tiny_model_folder

Prefix = tuple[torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offsets_0_and_p_share_a_batch(
    family: str, attention: Literal["auto", "sdpa"], tmp_path: Path
) -> None:
    folder = tiny_model_folder(family, tmp_path / "model")
    base = load_base(folder)
    rng = random.Random(family)
    tasks = {
        f"p{length}-{offset}": (_random_prefix(base, length, seed=length), offset)
        for length in (1, 20, 130)
        for offset in (0, length)
    }
    model = load_model(ModelConfig(model=str(folder)))
    with EngineRun(model, tmp_path / "store", attention=attention) as run:
        expected = {}
        for task, (prefix, offset) in tasks.items():
            _publish(run, task, prefix, offset, tmp_path)
            prompt = [rng.randrange(10, 40_000) for _ in range(rng.choice([1, 5, 18]))]
            expected[task] = _generate(base, prefix, offset, prompt, 12)
            run.submit([request(task, task, prompt, max_new_tokens=12, ignore_eos=True)])
        run.run()
        for task, (tokens, logprobs) in expected.items():
            assert run.results[task].ids == tokens
            got = [token.logprob for token in run.results[task].tokens]
            assert got == pytest.approx(logprobs, abs=1e-4)


def _random_prefix(base: Any, length: int, seed: int) -> Prefix:
    """Key and value, each [L, H_kv, P, D]; the same for both offsets."""
    generator = torch.Generator().manual_seed(seed)
    config = base.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, heads, length, dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _publish(run: EngineRun, task: str, prefix: Prefix, offset: int, scratch: Path) -> None:
    blob = scratch / f"{task}.safetensors"
    tensors = {
        f"decoder.{part}": PrefixArray.of(tensor.numpy())
        for part, tensor in zip(("key", "value"), prefix, strict=True)
    }
    sha256 = write_prefix(blob, tensors, query_offset=offset)
    version = validate_file(blob).version_record(sha256, blob.stat().st_size)
    run.server.registry.publish("default", task, blob, version)


@torch.inference_mode()
def _generate(
    base: Any, prefix: Prefix, offset: int, prompt: list[int], count: int
) -> tuple[list[int], list[float]]:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(*prefix, strict=True)):
        cache.update(key[None], value[None], layer)
    tokens: list[int] = []
    logprobs: list[float] = []
    new = prompt
    for _ in range(count):
        start = offset + len(prompt) + len(tokens) - len(new)
        logits = base(
            input_ids=torch.tensor([new]),
            position_ids=torch.arange(start, start + len(new))[None],
            past_key_values=cache,
        ).logits[0, -1]
        token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(torch.log_softmax(logits, -1)[token].item())
        new = [token]
    return tokens, logprobs
