"""A run's state on disk, whole or absent: a kill at any moment leaves the last checkpoint intact.

``checkpoints/step-00000200/`` holds ``state.pt`` (parameters, optimiser, schedule, the best prefix
so far) and ``random-<rank>.pt`` for each process. It is written under another name, flushed to the
device and renamed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["Checkpoints", "publish_folder", "random_state", "replace_file", "set_random_state"]

T = TypeVar("T")

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


class Checkpoints:
    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def latest(self) -> Path | None:
        found = self._whole()
        return found[-1] if found else None

    def latest_step(self) -> int:
        """0 before the first."""
        latest = self.latest()
        return 0 if latest is None else _step_of(latest)

    def partial(self, step: int) -> Path:
        """Where all processes write their files of a step."""
        return self._folder / f"step-{step:08}{_PARTIAL}"

    def begin(self, partial: Path) -> None:
        """Make that folder, and clear away what a kill has left."""
        for left in self._folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def publish(self, partial: Path) -> None:
        """Make it durable under its own name, and remove all but the newest few."""
        whole = partial.with_name(partial.name.removesuffix(_PARTIAL))
        if whole.exists():
            shutil.rmtree(whole)  # a resumed run has come to this step again
        publish_folder(partial, whole)
        for old in self._whole()[: -self._keep]:
            shutil.rmtree(old)

    def _whole(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def random_state() -> dict[str, Any]:
    """Of torch's generators: nothing else draws numbers while a prefix trains."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def publish_folder(partial: Path, whole: Path) -> None:
    """Give a folder its name, durably: under that name it is whole or absent."""
    for file in partial.iterdir():
        _fsync(file)
    _fsync(partial)
    partial.rename(whole)
    _fsync(whole.parent)


def replace_file(path: Path, write: Callable[[Path], T]) -> T:
    """The file is the old one or the new one, whenever the process is killed. Returns what
    ``write`` does."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    written = write(partial)
    _fsync(partial)
    partial.replace(path)
    _fsync(path.parent)
    return written


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
