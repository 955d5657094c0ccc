"""What the commands share: where the server is, how a name is written, how things are shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from prefixd import Client, InvalidArgumentError, UploadResult, Version
from prefixd import Progress as Report

__all__ = [
    "ApiKey",
    "AsJson",
    "IfMatch",
    "TaskName",
    "Url",
    "connect",
    "error_line",
    "for_terminal",
    "one_line",
    "print_json",
    "read_text",
    "split_name",
    "stderr",
    "stdout",
    "transfer",
]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

Url = Annotated[str, typer.Option("--url", envvar="PREFIXD_URL", help="The server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PREFIXD_API_KEY", help="Sent as a bearer token."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
IfMatch = Annotated[
    str | None,
    typer.Option(help="An ETag of the task: fail (409) if the task has changed since."),
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]

# Somebody is watching: fewer retries than the library's, so that a wrong URL shows soon.
_RETRIES = 2

# What moves a terminal's cursor, colours it, renames its window, or turns the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def connect(url: str, api_key: str | None) -> Client:
    return Client(url, api_key=api_key, max_retries=_RETRIES)


def split_name(name: str) -> tuple[str, int | None]:
    """``task@3`` → ``("task", 3)``, ``task`` → ``("task", None)``."""
    task, at, version = name.partition("@")
    if at and not version.isdecimal():
        raise InvalidArgumentError(f"version {version!r} in {name!r} is not a number")
    return task, int(version) if at else None


def read_text(source: str) -> str:
    """The UTF-8 text of a file, or of stdin for ``-``; every byte counts, so none is stripped."""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        name = "stdin" if source == "-" else source
        raise InvalidArgumentError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        ) from error


def virtual_tokens(stored: Version | UploadResult) -> str:
    """One number, or where the sites differ each site's: ``3 decoder, 7 encoder``."""
    lengths = stored.lengths
    if len(set(lengths.values())) < 2:
        return str(stored.num_virtual_tokens)
    return ", ".join(f"{length} {site}" for site, length in lengths.items())


def one_line(text: str) -> str:
    """Text of somebody else's in one line, without what would command the terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def for_terminal(text: str) -> str:
    """Text of a model for stdout: a terminal is not commanded by it, a pipe gets it as it is."""
    if not sys.stdout.isatty():
        return text
    return _CONTROLS.sub(lambda c: c[0] if c[0] in "\n\t" else "\N{REPLACEMENT CHARACTER}", text)


def print_json(value: BaseModel | list[BaseModel]) -> None:
    encoded = TypeAdapter(type(value) if isinstance(value, BaseModel) else list).dump_json(value)
    print(encoded.decode(), flush=True)


def error_line(message: str) -> None:
    """One red line on stderr, whatever the message holds."""
    stderr.print(f"error: {one_line(message)}", style="red", markup=False, soft_wrap=True)


@contextmanager
def transfer(label: str) -> Iterator[Report]:
    """A progress bar on stderr for bytes up or down, where stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        row = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
