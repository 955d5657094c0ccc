"""What a run says while it goes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from prefixd_train.errors import TrainError

__all__ = ["Log", "Reporter", "check_tensorboard", "tensorboard_log"]

Log = Callable[[Mapping[str, Any]], None]
"""Gets a line of metrics: ``step`` and numbers."""


class Reporter:
    """Shows a run on ``console`` (None: silent) and gives ``logs`` a dictionary every ``log_every``
    steps and every validation. Losses are means over the tokens since the last one."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        log_every: int = 10,
        logs: Sequence[Log] = (),
    ) -> None:
        self._console = console
        self._log_every = log_every
        self._logs = logs
        self._num_steps = self._logged = 0
        self._dev_loss: float | None = None
        self._bar: tuple[Progress, TaskID] | None = None
        self._loss = self._seconds = 0.0
        self._tokens = 0

    @contextmanager
    def running(self, num_steps: int, step: int) -> Iterator[None]:
        self._num_steps, self._logged = num_steps, step
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bar:
            self._bar = bar, bar.add_task("", total=num_steps, completed=step)
            try:
                yield
            finally:
                self._bar = None

    def stepped(
        self,
        step: int,
        *,
        epoch: float,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """After each optimiser step. ``tokens``: those that the loss counts."""
        self._loss += loss * tokens
        self._tokens += tokens
        self._seconds += seconds
        mean, rate = self._loss / self._tokens, self._tokens / self._seconds
        self._show(step, f"loss {mean:.4f}, {rate:.0f} tokens/s")
        if step % self._log_every and step != self._num_steps:
            return
        left = (self._num_steps - step) * self._seconds / (step - self._logged)
        self._say(
            f"step {step}/{self._num_steps}: loss {mean:.4f}, {rate:.0f} tokens/s,"
            f" {timedelta(seconds=round(left))} left"
        )
        self._log(
            {
                "step": step,
                "epoch": epoch,
                "loss": mean,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_s": round(rate, 1),
            }
        )
        self._loss, self._tokens, self._seconds, self._logged = 0.0, 0, 0.0, step

    def validated(
        self, step: int, *, dev_loss: float, best: bool, dev_accuracy: float | None = None
    ) -> None:
        """``dev_accuracy``: a share of the tokens, where it is measured."""
        self._dev_loss = dev_loss
        line, said = {"step": step, "dev_loss": dev_loss}, f"dev loss {dev_loss:.4f}"
        if dev_accuracy is not None:
            line["dev_accuracy"] = dev_accuracy
            said += f", token accuracy {dev_accuracy:.2%}"
        self._log(line)
        self.note(f"step {step}: {said}{', the best so far' if best else ''}")

    def note(self, text: str) -> None:
        """A line above the bar, if there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _log(self, line: Mapping[str, Any]) -> None:
        for log in self._logs:
            log(line)

    def _show(self, step: int, text: str) -> None:
        if self._bar is not None:
            bar, row = self._bar
            dev = "" if self._dev_loss is None else f", dev {self._dev_loss:.4f}"
            bar.update(row, completed=step, description=text + dev)

    def _say(self, text: str) -> None:
        if self._bar is None:
            self.note(text)


def check_tensorboard() -> None:
    """Raises TrainError where it is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise TrainError("tensorboard is not installed: pip install tensorboard") from error


def tensorboard_log(folder: Path, done: int) -> Log:
    """Writes TensorBoard's event files. What others in the folder say of steps after ``done`` is
    taken back: a killed run came further than its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=done + 1)

    def log(line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return log
