"""The options that every benchmark takes, and what follows from them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from harness.machine import describe
from prefixd_server.models.demo import demo_model_folder
from prefixd_store.geometry import Geometry
from prefixd_store.model_config import geometry_folder

__all__ = ["Options", "begin", "parser"]


class _Size(Protocol):
    @property
    def rounds(self) -> int: ...
    def _replace(self, *, rounds: int) -> Self: ...


S = TypeVar("S", bound=_Size)


@dataclass(frozen=True)
class Options:
    size: str
    threads: int
    server_args: tuple[str, ...]
    save: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Options:
        server_args = tuple(shlex.split(arguments.server_args))
        return cls(arguments.size, arguments.threads, server_args, not arguments.no_save)

    @cached_property
    def model(self) -> Path:
        """The demo model's folder, which peers load too."""
        return demo_model_folder(Path("~/.cache/prefixd").expanduser())

    @property
    def geometry(self) -> Geometry:
        return geometry_folder(self.model)

    def flags(self, store: Path, *more: str) -> list[str]:
        """Of ``prefixd serve`` for this benchmark; --server-args come last and so win."""
        return [
            "--model=demo",
            "--dtype=float32",
            "--device=cpu",
            f"--threads={self.threads}",
            f"--store={store}",
            # They repeat their prompts; what a prompt cache saves depends on the traffic.
            "--no-prompt-cache",
            *more,
            *self.server_args,
        ]

    def settings(self, *more: str) -> dict[str, Any]:
        flags = [flag for flag in self.flags(Path("STORE"), *more) if "STORE" not in flag]
        return {"flags": " ".join(flags)}


def parser(description: str | None, sizes: Iterable[str] = ("smoke", "full")) -> Any:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--size", choices=tuple(sizes), default="smoke")
    made.add_argument("--no-save", action="store_true", help="print only, append to no file")
    made.add_argument("--threads", type=int, default=2, help="of every server and peer")
    made.add_argument(
        "--server-args", default="", help="more flags for prefixd serve, as one string"
    )
    return made


def begin(description: str | None, sizes: Mapping[str, S]) -> tuple[Options, S, dict[str, Any]]:
    """Of a benchmark without options of its own: what the command line says, the size with its
    --rounds, and the machine as it is before anything runs."""
    made = parser(description)
    made.add_argument("--rounds", type=int)
    arguments = made.parse_args()
    options, size = Options.of(arguments), sizes[arguments.size]
    if arguments.rounds:
        size = size._replace(rounds=arguments.rounds)
    return options, size, describe(options.threads)
