"""A run that was killed goes on to the bytes it would have come to."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prefixd_train.batching import Batch
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.options import TrainOptions
from prefixd_train.run_folder import RunFolder
from prefixd_train.sites import PrefixKV
from prefixd_train.train import train
from tests.support.killed import die, run_until_killed
from tests.train.conftest import Options

# Dropout draws from torch's generator, patience and the best prefix are state too.
SETTINGS: dict[str, Any] = {
    "parameterisation": "mlp",
    "hidden": 16,
    "middle": 16,
    "prefix_dropout": 0.2,
    "dev_fraction": 0.25,
    "patience": 50,
    "eval_metric": "token-accuracy",
    "eval_every": 3,
    "save_every": 4,
    "grad_accum": 2,
    "log_every": 1,
    "lr": 0.05,
    "max_steps": 14,
}


def train_and_die_in_a_step(options: TrainOptions) -> None:
    calls = count(1)

    def objective(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        if next(calls) == 13:  # in step 7, between its two batches
            die()
        return negative_log_likelihood(lm, batch, prefix)

    run_until_killed(lambda: train(options, objective=objective))


def train_and_die_in_a_checkpoint(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_or_die(self: Path, target: Path) -> Path:
        if Path(target).name == "step-00000012":
            die()
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_or_die)
        run_until_killed(lambda: train(options))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("prefix.safetensors", "README.md")}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = RunFolder(folder).read_metrics()
    return [(line["step"], line.get("loss", line.get("dev_loss"))) for line in lines]


def test_a_killed_run_ends_with_the_same_bytes(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(options(out=whole, **SETTINGS))
    checkpoints = killed / "checkpoints"
    train_and_die_in_a_step(options(out=killed, **SETTINGS))
    assert max(checkpoints.glob("step-????????")).name == "step-00000004"
    train_and_die_in_a_checkpoint(options(out=killed, resume=True, **SETTINGS), monkeypatch)
    assert max(checkpoints.glob("step-????????")).name == "step-00000008"
    assert not (killed / "prefix.safetensors").exists()
    train(options(out=killed, resume=True, **SETTINGS))
    assert bytes_of(killed) == bytes_of(whole)
    assert losses(killed) == losses(whole)
    assert not list(checkpoints.glob("*.partial"))


def test_a_folder_is_neither_overwritten_nor_mixed(options: Options, tmp_path: Path) -> None:
    train(options(max_steps=2))
    before = bytes_of(tmp_path / "run")
    with pytest.raises(TrainError, match="holds a run: resume it, or choose another folder"):
        train(options(max_steps=2))
    with pytest.raises(
        TrainError, match=r"another run: settings.lr was null, is 0.5; settings.max"
    ):
        train(options(max_steps=3, lr=0.5, resume=True))
    (tmp_path / "train.jsonl").write_text(2 * (json.dumps({"source": "a", "target": "b"}) + "\n"))
    with pytest.raises(TrainError, match=r"data.train.sha256 was "):
        train(options(max_steps=2, resume=True))
    assert bytes_of(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(TrainError, match="neither empty nor a run's folder"):
        train(options(out=tmp_path / "other"))


def test_a_folder_has_one_trainer_at_a_time(options: Options, tmp_path: Path) -> None:
    def second(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        with pytest.raises(TrainError, match="run is in use: another process trains there"):
            train(options(max_steps=1, resume=True))
        return negative_log_likelihood(lm, batch, prefix)

    train(options(max_steps=1), objective=second)
    train(options(max_steps=1, resume=True))
