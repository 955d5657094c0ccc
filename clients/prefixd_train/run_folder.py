"""The folder of a run: settings, metrics, checkpoints, the prefix, its card."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from prefixd_train.checkpoint import replace_file
from prefixd_train.errors import TrainError

__all__ = ["RunFolder"]

_LOCK = ".lock"


class RunFolder:
    """::

    config.json              what determines the result: settings, digests of data and model
    metrics.jsonl            a line every few steps, and one a validation
    checkpoints/             the state to resume from
    teacher/                 of a distillation: questions, answers, distributions
    loss.png                 if matplotlib is installed
    prefix.safetensors       what the server takes
    README.md                its card
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.teacher = path / "teacher"
        self.plot = path / "loss.png"
        self.prefix = path / "prefix.safetensors"
        self.card = path / "README.md"
        self._lock: IO[str] | None = None

    def open(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Start a run in a new or empty folder, or go on with the one there; nobody else can until
        it is closed. Raises TrainError if the folder holds a run that is not to be resumed, one of
        other settings, or one that is being trained."""
        files = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if files - {_LOCK} and self.config.name not in files:
            raise TrainError(f"{self.path} is neither empty nor a run's folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self.config.exists():
            if not resume:
                raise TrainError(f"{self.path} holds a run: resume it, or choose another folder")
            self._check_same(config)
            return
        text = json.dumps(config, indent=2) + "\n"
        replace_file(self.config, lambda path: path.write_text(text))

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        self._lock = (self.path / _LOCK).open("w")
        try:
            # The kernel lets go of it when the process ends, however it does.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise TrainError(f"{self.path} is in use: another process trains there") from error

    def _check_same(self, config: Mapping[str, Any]) -> None:
        was = json.loads(self.config.read_text())
        now = json.loads(json.dumps(config))
        changed = [
            f"{name} was {_shown(before)}, is {_shown(after)}"
            for name, before, after in _differences(was, now)
        ]
        if changed:
            raise TrainError(f"{self.path} holds another run: {'; '.join(changed)}")

    def log(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        return list(_whole_lines(self.metrics.read_text()))

    def rewind(self, step: int) -> None:
        """Forget the metrics after a step: the run was killed later than its checkpoint."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self.metrics, lambda path: path.write_text(text))


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may have been cut by a kill
            yield json.loads(line)


def _differences(
    was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in [*was, *(name for name in now if name not in was)]:
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
