"""What a route's function is given, read from a request as the function's signature declares it.

FastAPI reads the signature and makes the OpenAPI document of it. Its own handler also knows forms,
cookies, dependencies of dependencies and much else, at a price: to read a small request took longer
than to answer it. Here is what our routes use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import iscoroutinefunction
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.params import Form

from prefixd_server.http.errors import invalid_request

__all__ = ["Inputs"]

_Field = Any  # FastAPI's ModelField, which it does not export: a parameter's name, default, check


class Inputs:
    def __init__(self, signature: Dependant) -> None:
        _refuse_what_is_not_read(signature)
        self.query_names = frozenset(field.alias for field in signature.query_params)
        self.takes_json = bool(signature.body_params)
        self._signature = signature
        self._asked: list[Any] = signature.dependencies  # Any: their calls are all coroutines

    async def read(self, request: Request, response: Response) -> dict[str, Any]:
        """The function's arguments. Raises InvalidRequest that names each one that is refused."""
        signature = self._signature
        values = {asked.name: await asked.call(request) for asked in self._asked}
        errors: list[Any] = []
        _take(signature.path_params, request.path_params, "path", values, errors)
        _take(signature.query_params, request.query_params, "query", values, errors)
        _take(signature.header_params, request.headers, "header", values, errors)
        for field in signature.body_params:
            _check(field, await request.json(), ("body",), values, errors)
        if errors:
            raise invalid_request(errors)
        if signature.request_param_name:
            values[signature.request_param_name] = request
        if signature.response_param_name:
            values[signature.response_param_name] = response
        return values


def _take(
    fields: Iterable[_Field],
    given: Mapping[str, str],
    where: str,
    values: dict[str, Any],
    errors: list[Any],
) -> None:
    for field in fields:
        value = given.get(field.alias)
        if value is not None:
            _check(field, value, (where, field.alias), values, errors)
        elif field.field_info.is_required():
            errors.append({"type": "missing", "loc": (where, field.alias), "input": None})
        else:
            values[field.name] = field.get_default()


def _check(
    field: _Field, value: Any, where: tuple[str, ...], values: dict[str, Any], errors: list[Any]
) -> None:
    values[field.name], found = field.validate(value, {}, loc=where)
    errors.extend(found or ())


def _refuse_what_is_not_read(signature: Dependant) -> None:
    """Raise NotImplementedError, when the route is declared, for what would be left out."""
    unread: list[Any] = [*signature.cookie_params, *signature.body_params[1:]]
    unread += [field for field in signature.body_params if isinstance(field.field_info, Form)]
    for asked in signature.dependencies:
        if not asked.request_param_name or not asked.name:
            raise NotImplementedError(f"{asked.call} does not take the request, or gives nothing")
        unread += [*asked.path_params, *asked.query_params, *asked.header_params]
        unread += [*asked.cookie_params, *asked.body_params, *asked.dependencies]
    if unread:
        raise NotImplementedError(f"{signature.call}: {', '.join(str(f.name) for f in unread)}")
    for declared in (signature, *signature.dependencies):
        if not iscoroutinefunction(declared.call):
            raise NotImplementedError(f"{declared.call} is not a coroutine function")
        if declared.background_tasks_param_name or declared.http_connection_param_name:
            raise NotImplementedError(f"{declared.call} takes what no route is given")
