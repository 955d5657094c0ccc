"""The parts of a URL and the headers that several routes share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Query

from prefixd_server.http.schemas import TASK_REFERENCE_PATTERN, QueryBool, VersionNumber
from prefixd_store.records import NAME_PATTERN

__all__ = [
    "BASE_TASK",
    "Activate",
    "IfMatch",
    "IfNoneMatch",
    "TaskName",
    "TaskReference",
    "Version",
]

BASE_TASK = "base"
"""the base model's own name; no task can be called so"""

TaskName = Annotated[
    str, Path(alias="task", pattern=NAME_PATTERN, description="name", examples=["e2e"])
]
TaskReference = Annotated[
    str,
    Path(
        alias="task",
        pattern=TASK_REFERENCE_PATTERN,
        description="`name`, `name@version`, or `base`",
        examples=["e2e", "e2e@3"],
    ),
]
Version = Annotated[VersionNumber, Path(description="version", examples=[3])]
Activate = Annotated[
    QueryBool, Query(description="send the task's traffic to the new version at once")
]
IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", description="the task's ETag, or `*`: refuse with 409 otherwise"),
]
IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match",
        pattern=r"^\*$",
        description="`*`: only create, 409 if the task exists",
    ),
]
