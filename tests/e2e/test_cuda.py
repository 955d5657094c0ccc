"""On a CUDA device: the tokens that the CPU gives, where there is such a device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from prefixd_server.config import ModelConfig
from prefixd_server.engine.cuda_graphs import CudaGraphRunner
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.loader import load_model
from tests.support.engine import EngineRun, Result, request
from tests.support.families import FAMILIES
from tests.support.models import load_base, save_peft_prefix, tiny_model_folder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = {"a": [7, 8, 9], "b": list(range(50, 90)), "c": [11]}
LENGTHS = (1, 20, 130)


class OnCpu:
    """One family's model folder, its prefixes, and what the CPU answers."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        if family in FAMILIES:
            self.model = FAMILIES[family].save(folder / "model")
        else:
            self.model = tiny_model_folder(family, folder / "model")
        base = load_base(self.model)
        self.prefixes = {
            f"p{length}": save_peft_prefix(
                base, folder / f"p{length}", num_virtual_tokens=length, seed=length
            )
            for length in LENGTHS
        }
        self.answers = self.run("cpu", "sdpa")

    def run(
        self,
        device: Literal["cpu", "cuda"],
        attention: Literal["sdpa", "triton"],
        *,
        cuda_graphs: bool = False,
    ) -> dict[str, Result]:
        """Greedy, all tasks in one batch, prompts in chunks of 24."""
        scratch = self.folder / f"{device}-{attention}-{cuda_graphs}"
        scratch.mkdir()
        model = load_model(ModelConfig(model=str(self.model), device=device, dtype="float32"))
        with EngineRun(
            model,
            scratch / "store",
            max_num_batched_tokens=24,
            max_num_seqs=16,
            attention=attention,
            cuda_graphs=cuda_graphs,
        ) as run:
            if cuda_graphs:
                assert isinstance(run.engine.runner, CudaGraphRunner)
                assert run.engine.runner.steps, "nothing was captured"
            for task, checkpoint in self.prefixes.items():
                run.publish(task, checkpoint, scratch)
            run.submit(
                request(f"{task}-{name}", task, prompt, max_new_tokens=16)
                for task in (None, *self.prefixes)
                for name, prompt in PROMPTS.items()
            )
            run.run()
            return dict(run.results)


@pytest.fixture(scope="module", params=["llama", "gpt2", "Gemma 2", "Mistral", "Qwen3", "Phi-3"])
def on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnCpu:
    return OnCpu(request.param, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize(
    ("attention", "cuda_graphs"), [("sdpa", False), ("triton", False), ("triton", True)]
)
def test_mixed_requests_get_the_cpus_tokens(
    on_cpu: OnCpu, attention: Literal["sdpa", "triton"], cuda_graphs: bool
) -> None:
    if attention == "triton":
        pytest.importorskip("triton")
    answers = on_cpu.run("cuda", attention, cuda_graphs=cuda_graphs)
    for request_id, result in on_cpu.answers.items():
        assert answers[request_id].ids == result.ids
        assert [token.logprob for token in answers[request_id].tokens] == pytest.approx(
            [token.logprob for token in result.tokens], abs=1e-3
        )


def test_groups_that_share_a_prefix_get_the_cpus_tokens(
    on_cpu: OnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from prefixd_server.attention import work

    monkeypatch.setattr(work, "_KEYS_SAVED", 1)
    on_cpu.folder = on_cpu.folder / "grouped"
    on_cpu.folder.mkdir()
    answers = on_cpu.run("cuda", "triton", cuda_graphs=True)
    assert {id_: r.ids for id_, r in answers.items()} == {
        id_: r.ids for id_, r in on_cpu.answers.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_written_aside_is_there_when_the_call_returns(dtype: str) -> None:
    pool = KVPool(
        num_layers=3,
        num_kv_heads=2,
        head_dim=8,
        num_pages=400,
        page_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 2, 5000, 8, generator=generator).bfloat16()
    pages = torch.randperm(400, generator=generator).tolist()[:313]
    arrays = [_array(tensor, dtype) for tensor in (key, value)]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy / 4096  # the engine's stream has work for a while
    pool.write_prefix(pages, *arrays, dtype)
    found = pool.read(pages, 5000)
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)


def _array(tensor: torch.Tensor, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if dtype == "float32":
        return tensor.float().numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)
