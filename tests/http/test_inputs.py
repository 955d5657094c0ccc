"""A route that declares what nothing reads is refused at once, not when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Body, Cookie, Depends, Form, Header, Request

from prefixd_server.http.route import router


async def no_request() -> str:
    return "whoever"


def blocking(request: Request) -> str:
    return "whoever"


async def with_a_header(request: Request, key: Annotated[str, Header()]) -> str:
    return key


async def with_another(request: Request, other: Annotated[str, Depends(with_a_header)]) -> str:
    return other


async def cookie(session: Annotated[str, Cookie()]) -> None: ...


async def two_bodies(one: Annotated[int, Body()], two: Annotated[int, Body()]) -> None: ...


async def form(field: Annotated[str, Form()]) -> None: ...


async def background(later: BackgroundTasks) -> None: ...


async def dependency(value: Annotated[str, Depends(no_request)]) -> None: ...


async def blocking_dependency(value: Annotated[str, Depends(blocking)]) -> None: ...


async def header_of_a_dependency(value: Annotated[str, Depends(with_a_header)]) -> None: ...


async def dependency_of_a_dependency(value: Annotated[str, Depends(with_another)]) -> None: ...


def blocking_route() -> None: ...


@pytest.mark.parametrize(
    ("endpoint", "named"),
    [
        (cookie, "session"),
        (two_bodies, "two"),
        (form, "field"),
        (background, "background"),
        (blocking_route, "blocking_route"),
        (blocking_dependency, "blocking"),
        (dependency, "no_request"),
        (header_of_a_dependency, "key"),
        (dependency_of_a_dependency, "other"),
    ],
)
def test_what_would_not_be_read_cannot_be_declared(endpoint: Any, named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        router("tests").post("/")(endpoint)


def test_a_dependency_that_gives_nothing_cannot_be_declared() -> None:
    with pytest.raises(NotImplementedError, match="gives nothing"):
        router("tests").get("/", dependencies=[Depends(blocking)])(no_request)
