"""A run that was killed goes on to the bytes it would have come to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefixd_train.errors import TrainError
from prefixd_train.options import TrainOptions
from prefixd_train.run_folder import RunFolder
from prefixd_train.train import train
from tests.train.conftest import Options

ROOT = Path(__file__).parents[2]

# Dropout draws from torch's generator, patience and the best prefix are state too.
SETTINGS: dict[str, Any] = {
    "parameterisation": "mlp",
    "hidden": 16,
    "middle": 16,
    "prefix_dropout": 0.2,
    "dev_fraction": 0.25,
    "patience": 50,
    "eval_every": 3,
    "save_every": 4,
    "grad_accum": 2,
    "log_every": 1,
    "lr": 0.05,
    "max_steps": 14,
}

# Both kill their own process, for good: no handler runs.
KILL_IN_A_STEP = """
calls = 0
def objective(lm, batch, prefix):
    global calls
    calls += 1
    if calls == 13:  # in step 7, between its two batches
        os.kill(os.getpid(), signal.SIGKILL)
    return negative_log_likelihood(lm, batch, prefix)
"""
KILL_IN_A_CHECKPOINT = """
objective = negative_log_likelihood
rename = Path.rename
def rename_or_die(self, target):
    if Path(target).name == "step-00000012":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = rename_or_die
"""


def train_and_be_killed(options: TrainOptions, how: str) -> None:
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.options import TrainOptions
from prefixd_train.train import train
torch.set_num_threads(1)
{how}
train(TrainOptions.model_validate_json(sys.argv[1]), objective=objective)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, options.model_dump_json()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("prefix.safetensors", "README.md")}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = RunFolder(folder).read_metrics()
    return [(line["step"], line.get("loss", line.get("dev_loss"))) for line in lines]


def test_a_killed_run_ends_with_the_same_bytes(options: Options, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(options(out=whole, **SETTINGS))
    checkpoints = killed / "checkpoints"
    for how, latest in ((KILL_IN_A_STEP, 4), (KILL_IN_A_CHECKPOINT, 8)):
        train_and_be_killed(options(out=killed, resume=latest > 4, **SETTINGS), how)
        assert max(checkpoints.glob("step-????????")).name == f"step-{latest:08}"
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
    (tmp_path / "train.jsonl").write_text(json.dumps({"source": "a", "target": "b"}))
    with pytest.raises(TrainError, match=r"data.train.sha256 was "):
        train(options(max_steps=2, resume=True))
    assert bytes_of(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(TrainError, match="neither empty nor a run's folder"):
        train(options(out=tmp_path / "other"))
