"""float32, bfloat16 and float16 models; prefixes of another dtype are cast to the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefixd_server.config import ModelConfig
from prefixd_server.kv.pool import TORCH_DTYPES
from prefixd_server.models.loader import load_model
from tests.support.engine import EngineRun, request
from tests.support.models import load_base, save_peft_prefix, tiny_model_folder

# Half precision rounds hidden states differently for each way of batching; a wrong cast or a
# missing prefix is off by whole units.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.05}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prompt_logprobs_in_each_dtype(
    dtype: Literal["float32", "bfloat16", "float16"], tmp_path: Path
) -> None:
    folder = tiny_model_folder("llama", tmp_path / "model")
    prefix = save_peft_prefix(load_base(folder), tmp_path / "p", num_virtual_tokens=7, seed=0)
    model = load_model(ModelConfig(model=str(folder), dtype=dtype))
    assert model.dtype is TORCH_DTYPES[dtype]
    prompt = list(range(50, 70))
    with EngineRun(model, tmp_path / "store", max_num_batched_tokens=6) as run:
        run.publish("t", prefix, tmp_path)
        run.submit(
            request(name, task, prompt, max_new_tokens=1, prompt_logprobs=True)
            for name, task in (("with", "t"), ("without", None))
        )
        run.run()
        got = {name: run.results[name].started for name in ("with", "without")}
    for name, checkpoint in (("with", prefix), ("without", None)):
        started = got[name]
        assert started is not None
        expected = _logprobs(folder, dtype, checkpoint, prompt)
        error = torch.tensor(started.prompt_logprobs) - expected
        assert error.abs().max() < TOLERANCE[dtype]


@torch.inference_mode()
def _logprobs(folder: Path, dtype: str, prefix: Path | None, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of prompt tokens 1 … n-1, from transformers (and PEFT) in ``dtype``."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH_DTYPES[dtype]).eval()
    if prefix is not None:
        model = PeftModel.from_pretrained(model, prefix).eval()
    ids = torch.tensor([prompt])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    table = torch.log_softmax(logits[:-1], -1)
    return table.gather(1, ids[0, 1:, None])[:, 0]
