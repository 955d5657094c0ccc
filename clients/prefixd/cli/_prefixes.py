"""Commands that move prefixes: push, compile, pull."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prefixd import UploadResult
from prefixd._calls import active_version
from prefixd._transport import DEFAULT_URL
from prefixd.cli._shared import (
    ApiKey,
    AsJson,
    IfMatch,
    TaskName,
    Url,
    connect,
    print_json,
    read_text,
    split_name,
    stdout,
    transfer,
    virtual_tokens,
)

__all__ = ["register"]

Activate = Annotated[
    bool, typer.Option("--activate/--no-activate", help="Make it the task's active version.")
]


class Format(StrEnum):
    prefixd = "prefixd"
    peft = "peft"


def push(
    task: TaskName,
    path: Annotated[Path, typer.Argument(help="A checkpoint: a folder, or one file of weights.")],
    activate: Activate = True,
    if_match: IfMatch = None,
    create_only: Annotated[bool, typer.Option(help="Fail if the task exists.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload a prefix as a new version of TASK."""
    with connect(url, api_key) as client, transfer(path.name) as progress:
        result = client.push(
            task,
            path,
            activate=activate,
            if_match=if_match,
            create_only=create_only,
            progress=progress,
        )
    _show_upload(result, as_json)


def compile(
    task: TaskName,
    text: Annotated[str, typer.Option("--text", help="A UTF-8 file, or - for stdin.")],
    activate: Activate = True,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a version of TASK from a text, by running the frozen model over it once."""
    content = read_text(text)
    with connect(url, api_key) as client:
        result = client.compile(task, content, activate=activate)
    _show_upload(result, as_json)


def pull(
    name: Annotated[str, typer.Argument(metavar="TASK[@V]", help="The task, or one version.")],
    out: Annotated[Path | None, typer.Option(help="Where to; TASK@V here by default.")] = None,
    format: Annotated[
        Format, typer.Option(help="One prefixd file, or a folder that PEFT loads.")
    ] = Format.prefixd,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download a version (the active one by default), checked against its SHA-256."""
    task, version = split_name(name)
    with connect(url, api_key) as client:
        number = active_version(client.task(task)) if version is None else version
        suffix = ".safetensors" if format is Format.prefixd else ""
        target = out or Path(f"{task}@{number}{suffix}")
        with transfer(f"{task}@{number}") as progress:
            path = client.pull(task, target, version=number, format=format.value, progress=progress)
    stdout.print(str(path), markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    for command in (push, compile, pull):
        app.command()(command)


def _show_upload(result: UploadResult, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    verb = "created" if result.created else "already there:"
    state = "active" if result.active else "not active"
    stdout.print(
        f"{verb} {result.task}@{result.version} ({state}): {virtual_tokens(result)} virtual "
        f"tokens, {result.bytes} bytes, {result.format}, sha256 {result.sha256[:12]}",
        markup=False,
        soft_wrap=True,
    )
