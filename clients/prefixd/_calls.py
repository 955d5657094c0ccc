"""The HTTP API, one function a call. Both clients are made from these, so each is written once.

Everywhere: ``task`` is a task's name (``generate`` and ``stream`` also take ``name@version``), and
``if_match`` is an ``etag`` of the task: the change is refused with `ConflictError` if the task has
changed since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import httpx

from prefixd._errors import InvalidArgumentError
from prefixd._models import (
    Generation,
    Health,
    Parameters,
    ServerInfo,
    Task,
    TaskPage,
    UploadResult,
    Version,
)
from prefixd._transport import Call, answer, no_answer, text_answer
from prefixd._upload import Progress, Upload

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def generate(
    task: str, inputs: str, *, version: int | None = None, **parameters: Unpack[Parameters]
) -> Call[Generation]:
    """Generate text for the prompt ``inputs`` with the prefix of ``task``.

    Greedy unless ``do_sample`` or a ``temperature`` is given. Raises `NotFoundError`,
    `InvalidValueError` (a parameter), `RateLimitError` (the queue stayed full), `DeadlineError`.
    """
    body = _generate_body(inputs, dict(parameters), stream=False)
    return Call("POST", _generate_path(task, version), answer(Generation), json=body)


def stream(
    task: str, inputs: str, *, version: int | None = None, **parameters: Unpack[Parameters]
) -> Call[None]:
    body = _generate_body(inputs, dict(parameters), stream=True)
    path = _generate_path(task, version)
    return Call("POST", path, no_answer, json=body, headers={"accept": "text/event-stream"})


def push(
    task: str,
    path: str | Path,
    *,
    activate: bool = True,
    if_match: str | None = None,
    create_only: bool = False,
    progress: Progress | None = None,
) -> Call[UploadResult]:
    """Upload a prefix as a new version of ``task``; returns when the server has it durably.

    ``path`` is a prefixd ``.safetensors`` file, or a checkpoint folder as PEFT saves one. Pickled
    weights (``.bin``, ``.pt``) are converted first, which needs torch. ``create_only`` refuses a
    task that exists. The same bytes again return the version there is, ``created`` False.

    Raises `CheckpointError` (nothing to send), `InvalidValueError` (damaged, or does not fit the
    model), `ConflictError`, `RequestTooLargeError`.
    """
    headers = _if_match(if_match) | ({"if-none-match": "*"} if create_only else {})
    upload = Upload(path, progress)
    call = _new_version(task, "PUT", "prefix", activate)
    return replace(call, headers=headers, upload=upload)


def compile(task: str, text: str, *, activate: bool = True) -> Call[UploadResult]:
    """Make a version of ``task`` from a text, by one run of the frozen model over it."""
    return replace(_new_version(task, "POST", "compile", activate), json={"text": text})


def task_page(prefix: str = "", cursor: str | None = None, limit: int = 100) -> Call[TaskPage]:
    params: dict[str, Any] = {"limit": limit}
    params |= {"prefix": prefix} if prefix else {}
    params |= {"cursor": cursor} if cursor else {}
    return Call("GET", "/v1/tasks", answer(TaskPage), params=params)


def task(name: str) -> Call[Task]:
    """One task with its versions, traffic split and ``etag``."""
    return Call("GET", _path(name), _task)


def version(task: str, version: int) -> Call[Version]:
    """One version of a task."""
    return Call("GET", f"{_path(task)}/versions/{version:d}", answer(Version))


def activate(
    task: str,
    version: int | None = None,
    *,
    split: Mapping[int, float] | None = None,
    if_match: str | None = None,
) -> Call[Task]:
    """Choose what the bare name means: one ``version``, or a ``split`` of version → weight.

    Atomic: requests in flight keep the version they began with.
    """
    if (version is None) == (split is None):
        raise InvalidArgumentError("activate takes either a version or a split")
    body: dict[str, Any] = {"version": version}
    if split is not None:
        body = {"split": {str(number): weight for number, weight in split.items()}}
    path = f"{_path(task)}/activate"
    return Call("POST", path, _task, json=body, headers=_if_match(if_match))


def update(
    task: str,
    *,
    description: str | None = None,
    pinned: bool | None = None,
    defaults: Mapping[str, Any] | None = None,
    if_match: str | None = None,
) -> Call[Task]:
    """Change the fields that are given. ``defaults`` replaces the whole of them:
    ``{"parameters": {…}, "stop": [...], "chat_template": "model"}``."""
    changes = {"description": description, "pinned": pinned, "defaults": defaults}
    body = {key: value for key, value in changes.items() if value is not None}
    return Call("PATCH", _path(task), _task, json=body, headers=_if_match(if_match))


def delete(task: str, *, if_match: str | None = None) -> Call[None]:
    """Delete a task and its versions; requests in flight finish."""
    return Call("DELETE", _path(task), no_answer, headers=_if_match(if_match))


def delete_version(task: str, version: int, *, if_match: str | None = None) -> Call[None]:
    """Delete one version. Raises `ConflictError` while it takes traffic and others exist."""
    path = f"{_path(task)}/versions/{version:d}"
    return Call("DELETE", path, no_answer, headers=_if_match(if_match))


def prefix_bytes(task: str, version: int, format: str) -> Call[None]:
    if format not in ("prefixd", "peft"):
        raise InvalidArgumentError(f"format {format!r}, expected 'prefixd' or 'peft'")
    path = f"{_path(task)}/versions/{version:d}/prefix"
    return Call("GET", path, no_answer, params={"format": format})


def info() -> Call[ServerInfo]:
    """The server's model, limits and cache."""
    return Call("GET", "/v1/info", answer(ServerInfo))


def ready() -> Call[Health]:
    """Whether the server takes requests. Not ready is an answer here, not an exception."""
    return Call("GET", "/readyz", answer(Health), accept=frozenset({503}))


def live() -> Call[Health]:
    """Whether the server's process and engine live."""
    return Call("GET", "/livez", answer(Health))


def metrics() -> Call[str]:
    """The server's metrics, in Prometheus's text format."""
    return Call("GET", "/metrics", text_answer)


def active_version(task: Task) -> int:
    """The version a pull without one means: the active one, or the heaviest of a split."""
    if task.active is not None:
        return task.active
    if not task.split:
        raise InvalidArgumentError(f"task {task.task!r} has no active version: name one")
    return max(task.split, key=lambda number: (task.split[number], number))


def _new_version(task: str, method: str, what: str, activate: bool) -> Call[UploadResult]:
    params = {"activate": activate}
    return Call(method, f"{_path(task)}/{what}", _upload_result, params=params)


def _path(task: str) -> str:
    # Checked here because a name becomes part of a URL: ".." would call something else.
    if not _NAME.fullmatch(task):
        raise InvalidArgumentError(f"task {task!r} does not match ^{_NAME.pattern}$")
    return f"/v1/tasks/{task}"


def _generate_path(task: str, version: int | None) -> str:
    name, at, number = task.partition("@")
    if at and (version is not None or not number.isdecimal()):
        raise InvalidArgumentError(f"task {task!r}, version {version}: expected one version number")
    at_version = number if at else version
    return _path(name) + (f"@{at_version}" if at_version is not None else "") + "/generate"


def _generate_body(inputs: str, parameters: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    given = {key: value for key, value in parameters.items() if value is not None}
    return {"inputs": inputs, "parameters": given, "stream": stream}


def _if_match(etag: str | None) -> dict[str, str]:
    if etag is None:
        return {}
    quoted = etag if etag == "*" or etag.endswith('"') else f'"{etag}"'
    return {"if-match": quoted}


def _task(response: httpx.Response) -> Task:
    etag = response.headers.get("etag")
    return answer(Task)(response).model_copy(update={"etag": etag})


def _upload_result(response: httpx.Response) -> UploadResult:
    created = response.status_code == httpx.codes.CREATED
    return answer(UploadResult)(response).model_copy(update={"created": created})
