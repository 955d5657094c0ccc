"""Other precisions than float32: one process can train in several, each learns and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from prefixd_train.batching import Batch
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.prepare import make_accelerator
from prefixd_train.run_folder import RunFolder
from prefixd_train.sites import PrefixKV
from prefixd_train.train import train
from tests.train.conftest import Options

SETTINGS: dict[str, Any] = {"lr": 0.3, "log_every": 1, "batch_size": 16, "num_virtual_tokens": 8}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder).read_metrics() if "loss" in line]


def test_runs_of_one_process_choose_their_precision(options: Options, tmp_path: Path) -> None:
    """Autocast's products are bfloat16, the prefix and its gradient float32; and the loss falls
    as it does in float32, though not by the same values."""
    seen: dict[str, set[torch.dtype]] = {}

    def train_as(name: str, **settings: Any) -> list[float]:
        seen[name] = set()

        def objective(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
            assert prefix is not None
            assert {part.dtype for kv in prefix.values() for part in kv} == {torch.float32}
            query = lm.module.base_model.layers[0].self_attn.q_proj
            handle = query.register_forward_hook(lambda _, __, y: seen[name].add(y.dtype))
            with_hook = negative_log_likelihood(lm, batch, prefix)
            handle.remove()
            return with_hook

        train(options(out=tmp_path / name, **SETTINGS, **settings), objective=objective)
        return losses(tmp_path / name)

    plain = train_as("float32")
    mixed = train_as("bf16", mixed_precision="bf16")
    half = train_as("bfloat16", dtype="bfloat16")
    assert seen == {
        "float32": {torch.float32},
        "bf16": {torch.bfloat16},
        "bfloat16": {torch.bfloat16},
    }
    assert plain[-1] < plain[0] - 1
    for other in (mixed, half):
        assert other != plain
        assert other[0] == pytest.approx(plain[0], rel=0.01)
        assert other[-1] == pytest.approx(plain[-1], rel=0.1)


@pytest.mark.parametrize("settings", [{"mixed_precision": "bf16"}, {"dtype": "bfloat16"}])
def test_a_resumed_run_ends_with_the_same_bytes(
    options: Options, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = SETTINGS | settings | {"max_steps": 6, "save_every": 4, "prefix_dropout": 0.1}
    train(options(out=tmp_path / "whole", **settings))
    steps = iter(range(100))

    def broken(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        loss, tokens = negative_log_likelihood(lm, batch, prefix)
        return loss * (float("nan") if next(steps) == 5 else 1), tokens

    with pytest.raises(TrainError, match="the loss is nan at step 6"):
        train(options(**settings), objective=broken)
    train(options(resume=True, **settings))
    ours, whole = (tmp_path / name / "prefix.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_fp16_is_refused_where_there_is_no_gpu(options: Options) -> None:
    before = dict(AcceleratorState._shared_state)
    with pytest.raises(TrainError, match="mixed_precision fp16 needs a GPU"):
        make_accelerator(options(mixed_precision="fp16"))
    assert before == AcceleratorState._shared_state


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fp16_learns_on_a_gpu(options: Options, tmp_path: Path, dtype: str) -> None:
    """After a run on the CPU in the same process."""
    train(options(out=tmp_path / "cpu", max_steps=1))
    train(options(device="cuda", mixed_precision="fp16", dtype=dtype, **SETTINGS))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1
