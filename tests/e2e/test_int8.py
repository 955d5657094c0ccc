"""A tiny model served in int8: each request gets what transformers' own gives it alone, with the
rounded weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_server.models.packed import can_pack
from prefixd_server.models.quantized import restored, rounded
from tests.support.engine import EngineRun, request
from tests.support.models import load_base, save_peft_prefix, tiny_model_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not can_pack(torch.device("cpu"), torch.float32), reason="torch has no oneDNN"
    ),
]

PROMPTS = [list(range(50 + 30 * n, 58 + 33 * n)) for n in range(4)]
NEW_TOKENS = 8


def with_rounded_weights(folder: Path, prefix: Path | None) -> Any:
    """transformers' model (and PEFT's prefix) in float32, its linear layers' weights rounded."""
    model = load_base(folder)
    for module in model.modules():
        if type(module) is nn.Linear:
            # A new one: the embedding, which may share the old one, stays.
            module.weight = nn.Parameter(restored(*rounded(module.weight.detach())))
    return model if prefix is None else PeftModel.from_pretrained(model, prefix).eval()


@torch.inference_mode()
def generate_alone(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and the log-probability of each."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    tokens = output.sequences[0].tolist()[len(prompt) :]
    steps = [torch.log_softmax(logits[0], -1) for logits in output.logits]
    return tokens, [float(p[token]) for p, token in zip(steps, tokens, strict=True)]


def test_two_prefixes_and_the_base_in_one_batch(tmp_path: Path) -> None:
    folder = tiny_model_folder("llama", tmp_path / "model")
    base = load_base(folder)
    prefixes: dict[str | None, Path | None] = {
        name: save_peft_prefix(base, tmp_path / name, num_virtual_tokens=length, seed=length)
        for name, length in (("a", 7), ("b", 20))
    }
    prefixes[None] = None
    model = load_model(ModelConfig(model=str(folder), device="cpu", dtype="int8"))
    with EngineRun(model, tmp_path / "store", max_num_batched_tokens=20) as run:
        for name in ("a", "b"):
            run.publish(name, tmp_path / name, tmp_path)
        run.submit(
            request(f"{task}-{n}", task, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            for n, prompt in enumerate(PROMPTS)
            for task in prefixes
        )
        run.run()
    for task, prefix in prefixes.items():
        alone = with_rounded_weights(folder, prefix)
        for n, prompt in enumerate(PROMPTS):
            tokens, logprobs = generate_alone(alone, prompt)
            result = run.results[f"{task}-{n}"]
            assert result.ids == tokens
            assert [t.logprob for t in result.tokens] == pytest.approx(logprobs, abs=1e-4)
