"""What a run says: a bar on a terminal, lines elsewhere, TensorBoard's events where asked for."""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prefixd_train.errors import TrainError
from prefixd_train.progress import Reporter
from prefixd_train.run_folder import RunFolder
from prefixd_train.train import train
from tests.support.killed import die, run_until_killed
from tests.train.conftest import Options

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def stepped(reporter: Reporter, step: int, *, loss: float = 2.0) -> None:
    reporter.stepped(step, epoch=1.0, loss=loss, lr=0.1, grad_norm=1.0, tokens=300, seconds=2.0)


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its estimate is of rich's clock, here one second a look."""
    monkeypatch.setenv("TERM", "xterm")
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=20)
    ticks = iter(range(10_000))
    console.get_time = lambda: float(next(ticks))
    reporter = Reporter(console, log_every=1)
    with reporter.running(num_steps=100, step=0):
        for step in range(1, 41):
            stepped(reporter, step, loss=2.5)
        reporter.validated(40, dev_loss=1.25, best=True)
        stepped(reporter, 41, loss=1.5)
    drawn = screen.getvalue()
    assert "\x1b[" in drawn
    lines = [line for line in CONTROL.sub("", drawn).splitlines() if line.strip()]
    assert "step 40: dev loss 1.2500, the best so far" in lines
    # The mean since the last line of the log, which is every step here.
    assert re.search(r"━.* 41/100 loss 1\.5000, 150 tokens/s, dev 1\.2500 0:\d\d:\d\d", lines[-1])
    (left,) = re.findall(r"\d:\d\d:\d\d$", lines[-1].rstrip())
    assert left != "0:00:00"


def test_elsewhere_nothing_is_drawn() -> None:
    page = StringIO()
    reporter = Reporter(Console(file=page, width=40), log_every=2)
    with reporter.running(num_steps=6, step=0):
        for step in range(1, 5):
            stepped(reporter, step, loss=float(step))
    # Two seconds a step, four steps left, then two.
    assert page.getvalue().splitlines() == [
        "step 2/6: loss 1.5000, 150 tokens/s, 0:00:08 left",
        "step 4/6: loss 3.5000, 150 tokens/s, 0:00:04 left",
    ]


def test_tensorboard_has_the_losses_of_the_log(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each, though the run was killed after its checkpoint and had logged more."""
    settings = {"tensorboard": True, "log_every": 2, "dev_fraction": 0.25, "save_every": 5}

    def train_and_die_at_step_9() -> None:
        stepped = Reporter.stepped

        def stepped_or_die(self: Reporter, step: int, **more: Any) -> None:
            stepped(self, step, **more)
            if step == 9:
                die()

        monkeypatch.setattr(Reporter, "stepped", stepped_or_die)
        train(options(**settings))

    run_until_killed(train_and_die_at_step_9)
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] > 5
    (events,) = (tmp_path / "run").glob("events*")
    events.rename(events.with_name("events.out.tfevents.0"))  # whose order is by the second
    train(options(resume=True, **settings))
    logged = RunFolder(tmp_path / "run").read_metrics()
    accumulator = EventAccumulator(str(tmp_path / "run"))
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
