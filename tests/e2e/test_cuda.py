"""On a CUDA device: the tokens that the CPU gives, where there is such a device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from tests.support.engine import EngineRun, Result, request
from tests.support.models import load_base, save_peft_prefix, tiny_model_folder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = {"a": [7, 8, 9], "b": list(range(50, 90)), "c": [11]}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixed_requests_get_the_cpus_tokens(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(family, tmp_path / "model")
    base = load_base(folder)
    prefixes = {
        f"p{length}": save_peft_prefix(
            base, tmp_path / f"p{length}", num_virtual_tokens=length, seed=length
        )
        for length in (1, 20, 130)
    }
    on_cpu = _run(folder, prefixes, tmp_path / "cpu", "cpu")
    on_cuda = _run(folder, prefixes, tmp_path / "cuda", "cuda")
    for request_id, result in on_cpu.items():
        assert on_cuda[request_id].ids == result.ids
        assert [token.logprob for token in on_cuda[request_id].tokens] == pytest.approx(
            [token.logprob for token in result.tokens], abs=1e-3
        )


def _run(
    folder: Path, prefixes: dict[str, Path], scratch: Path, device: Literal["cpu", "cuda"]
) -> dict[str, Result]:
    scratch.mkdir()
    model = load_model(ModelConfig(model=str(folder), device=device, dtype="float32"))
    with EngineRun(model, scratch / "store", max_num_batched_tokens=24) as run:
        for task, checkpoint in prefixes.items():
            run.publish(task, checkpoint, scratch)
        run.submit(
            request(f"{task}-{name}", task, prompt, max_new_tokens=16)
            for task in (None, *prefixes)
            for name, prompt in PROMPTS.items()
        )
        run.run()
        return dict(run.results)
