"""A tiny LM, examples to train on, and settings that train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.cli import main
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.options import TrainOptions
from tests.support.models import tiny_model_folder

Write = Callable[[Sequence[Mapping[str, Any]]], Path]
Options = Callable[..., TrainOptions]

FOODS = ("Thai", "Greek", "Indian", "French", "Welsh", "Danish", "Polish", "Irish")
ROWS = [
    {"source": f"name: The Mill | food: {food}", "targets": [f"{food} food.", f"It serves {food}."]}
    for food in FOODS
]


def run(arguments: list[str]) -> int:
    """The command line's exit status."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums come out the same in every process; and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> FrozenLM:
    return load_lm(str(llama_folder))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


@pytest.fixture
def options(llama_folder: Path, tmp_path: Path, write: Write) -> Options:
    data = write(ROWS)

    def make(**settings: Any) -> TrainOptions:
        defaults: dict[str, Any] = {
            "model": str(llama_folder),
            "data": data,
            "task": "e2e",
            "out": tmp_path / "run",
            "num_virtual_tokens": 4,
            "max_steps": 12,
            "batch_size": 4,
            "device": "cpu",
        }
        return TrainOptions(**(defaults | settings))

    return make
