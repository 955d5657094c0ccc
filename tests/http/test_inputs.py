"""A route that declares what nothing reads is refused at once, not when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import Body, Cookie, Depends, Header, Request

from prefixd_server.http.route import router


def no_request() -> str:
    return "whoever"


def with_a_header(request: Request, key: Annotated[str, Header()]) -> str:
    return key


def with_another(request: Request, other: Annotated[str, Depends(with_a_header)]) -> str:
    return other


def cookie(session: Annotated[str, Cookie()]) -> None: ...


def two_bodies(one: Annotated[int, Body()], two: Annotated[int, Body()]) -> None: ...


def dependency(value: Annotated[str, Depends(no_request)]) -> None: ...


def header_of_a_dependency(value: Annotated[str, Depends(with_a_header)]) -> None: ...


def dependency_of_a_dependency(value: Annotated[str, Depends(with_another)]) -> None: ...


@pytest.mark.parametrize(
    ("endpoint", "named"),
    [
        (cookie, "session"),
        (two_bodies, "two"),
        (dependency, "no_request"),
        (header_of_a_dependency, "key"),
        (dependency_of_a_dependency, "other"),
    ],
)
def test_what_would_not_be_read_cannot_be_declared(endpoint: Any, named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        router("tests").post("/")(endpoint)
