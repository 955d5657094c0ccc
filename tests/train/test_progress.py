"""What a run says: TensorBoard's events where asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prefixd_train.errors import TrainError
from prefixd_train.run_folder import RunFolder
from prefixd_train.train import train
from tests.train.conftest import Options


def test_tensorboard_has_the_losses_of_the_log(options: Options, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(options(tensorboard=True, log_every=2, dev_fraction=0.25))
    logged = RunFolder(tmp_path / "run").read_metrics()
    accumulator = events.EventAccumulator(str(tmp_path / "run"))
    accumulator.Reload()
    for name in ("loss", "dev_loss", "lr", "grad_norm", "tokens_per_s"):
        expected = [(line["step"], line[name]) for line in logged if name in line]
        found = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert len(found) > 1
        assert [step for step, _ in found] == [step for step, _ in expected]
        values = [value for _, value in expected]
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6)


def test_without_tensorboard_it_says_what_to_install(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainError, match="pip install tensorboard"):
        train(options(tensorboard=True))
    assert not (tmp_path / "run").exists()
