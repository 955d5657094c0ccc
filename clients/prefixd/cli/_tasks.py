"""Commands about tasks and the server: tasks, show, versions, activate, delete, info."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.prompt import Confirm

from prefixd import Task, Version
from prefixd._transport import DEFAULT_URL
from prefixd.cli._shared import (
    ApiKey,
    AsJson,
    IfMatch,
    TaskName,
    Url,
    connect,
    one_line,
    print_json,
    split_name,
    stderr,
    stdout,
    virtual_tokens,
)
from prefixd.cli._table import Column, print_pairs, print_table

__all__ = ["age", "register"]


def tasks(
    prefix: Annotated[str, typer.Option(help="Only names that start with this.")] = "",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the tasks."""
    with connect(url, api_key) as client:
        found = list(client.tasks(prefix))
    if as_json:
        print_json(list(found))
        return
    print_table(
        [
            Column("task"),
            Column("traffic"),
            Column("tokens", right=True),
            Column("running", right=True),
            Column("pinned"),
            Column("description", gives_way=True),
        ],
        [_task_row(task) for task in found],
    )


def show(
    task: TaskName, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """Show a task and its versions."""
    with connect(url, api_key) as client:
        found = client.task(task)
    if as_json:
        print_json(found)
        return
    print_pairs(
        ("task", found.task),
        ("description", one_line(found.description)),
        ("traffic", _traffic(found)),
        ("pinned", "yes" if found.pinned else "no"),
        ("defaults", str(found.defaults or "")),
        ("requests running", str(found.requests_running)),
        ("created", f"{found.created_at:%Y-%m-%d %H:%M:%S}"),
        ("updated", f"{found.updated_at:%Y-%m-%d %H:%M:%S}"),
        ("etag", found.etag or ""),
    )
    stdout.print()
    _print_versions(found.versions)


def versions(
    task: TaskName, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """List the versions of a task."""
    with connect(url, api_key) as client:
        found = client.task(task).versions
    if as_json:
        print_json(list(found))
    else:
        _print_versions(found)


def activate(
    task: TaskName,
    version: Annotated[int | None, typer.Argument(help="The version; it gets all traffic.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="V=W,…", help="Weights instead, as in 3=0.9,4=0.1.")
    ] = None,
    if_match: IfMatch = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Choose the version, or the split of versions, that the bare name TASK means."""
    if (version is None) == (split is None):
        raise typer.BadParameter("give either VERSION or --split")
    weights = _parse_split(split) if split is not None else None
    with connect(url, api_key) as client:
        changed = client.activate(task, version, split=weights, if_match=if_match)
    stdout.print(f"{changed.task}: {_traffic(changed)}", markup=False, soft_wrap=True)


def delete(
    name: Annotated[str, typer.Argument(metavar="TASK[@V]", help="The task, or one version.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete a task with all its versions, or one version. Requests in flight finish."""
    task, version = split_name(name)
    if not yes and not _confirmed(name):
        raise typer.Exit(1)
    with connect(url, api_key) as client:
        if version is None:
            client.delete(task)
        else:
            client.delete_version(task, version)
    stdout.print(f"deleted {name}", markup=False, soft_wrap=True)


def info(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the server's model, limits and cache."""
    with connect(url, api_key) as client:
        found = client.info()
    if as_json:
        print_json(found)
        return
    sections = {"model": found.model.model_dump(), "limits": found.limits}
    if found.cache is not None:
        sections["cache"] = found.cache.model_dump()
    print_pairs(
        ("version", found.version),
        *(
            (f"{section}.{key}", str(value))
            for section, fields in sections.items()
            for key, value in fields.items()
        ),
    )


def age(since: datetime, now: datetime) -> str:
    """In its largest whole unit, as ``3d``; ``0s`` where the server's clock is ahead of ours."""
    seconds = max(int((now - since).total_seconds()), 0)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def register(app: typer.Typer) -> None:
    for command in (tasks, show, versions, activate, delete, info):
        app.command()(command)


def _traffic(task: Task) -> str:
    shares = {number: weight for number, weight in task.split.items() if weight > 0}
    if len(shares) > 1:
        return ", ".join(f"@{number} {weight:.0%}" for number, weight in sorted(shares.items()))
    return f"@{task.active}" if task.active is not None else "none"


def _parse_split(split: str) -> dict[int, float]:
    try:
        pairs = [pair.split("=") for pair in split.split(",")]
        return {int(version): float(weight) for version, weight in pairs}
    except ValueError as error:
        raise typer.BadParameter(
            f"{split!r} is not VERSION=WEIGHT,…", param_hint="--split"
        ) from error


def _confirmed(name: str) -> bool:
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{name!r}: not a terminal to ask on; say --yes")
    return Confirm.ask(f"Delete {name}?", console=stderr, default=False)


def _task_row(task: Task) -> list[str]:
    active = next((v for v in task.versions if v.version == task.active), None)
    return [
        task.task,
        _traffic(task),
        virtual_tokens(active) if active else "-",
        str(task.requests_running),
        "yes" if task.pinned else "no",
        one_line(task.description),
    ]


def _print_versions(found: Sequence[Version]) -> None:
    now = datetime.now(UTC)
    # As much as fits 80 columns: --json has the rest.
    print_table(
        [
            Column("version", right=True),
            Column("weight", right=True),
            Column("tokens", right=True),
            Column("size", right=True),
            Column("residency"),
            Column("base"),
            Column("age", right=True),
            Column("sha256"),
        ],
        [
            [
                str(version.version),
                f"{version.weight:g}",
                virtual_tokens(version),
                decimal(version.bytes),
                version.residency,
                "verified" if version.verified else "unverified",
                age(version.created_at, now),
                version.sha256[:12],
            ]
            for version in found
        ],
    )
