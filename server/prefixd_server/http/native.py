"""``POST /v1/tasks/{task}/generate``: text in, text out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from fastapi import Request, Response

from prefixd_server.errors import NotFound
from prefixd_server.frontend.calls import Call, Chunk
from prefixd_server.frontend.service import Stream, best
from prefixd_server.http.answers import GenerateAnswer, errors
from prefixd_server.http.auth import Tenant
from prefixd_server.http.disconnect import unless_disconnected
from prefixd_server.http.parameters import (
    check_parameters,
    is_search,
    merge_defaults,
    sampling_params,
)
from prefixd_server.http.paths import BASE_TASK, TaskReference
from prefixd_server.http.rendering import Rendering
from prefixd_server.http.route import router
from prefixd_server.http.schemas import GenerateRequest
from prefixd_server.http.services import Services, ServicesDep
from prefixd_server.http.sse import EventStream, event
from prefixd_store.records import TaskRecord

__all__ = ["routes"]

routes = router("generate")

_TOGETHER = 64
"""events in a write at most: about 10 KB, well below where a slow reader's transport says stop"""

_STREAM = {
    "description": "The answer; with `stream`, one event a token",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            # OpenAPI 3.2's word for one event, which FastAPI uses in 3.1 too.
            "itemSchema": {
                "type": "object",
                "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
                "required": ["data"],
            },
            "example": 'data: {"index": 1, "token": {"id": 42, "text": " Blue", "logprob": -0.03,'
            ' "special": false}, "top_tokens": null, "generated_text": null, "details": null}\n\n',
        }
    },
}


@routes.post(
    "/v1/tasks/{task}/generate",
    summary="Generate text",
    response_model=GenerateAnswer,
    responses={200: _STREAM, **errors(400, 404, 413, 415, 422, 429, 503, 504)},
)
async def generate(
    task: TaskReference,
    body: GenerateRequest,
    request: Request,
    services: ServicesDep,
    tenant: Tenant,
) -> Response:
    call, rendering = await _prepare(task, body, request, services, tenant)
    if body.stream:
        return await _stream(call, rendering, request, services)
    with _counted(services, tenant, rendering.task):
        drawn = await unless_disconnected(request.receive, services.frontend.draw(call))
    answer = rendering.whole(best(call, drawn), drawn)
    _log_answer(request, answer)
    return Response(orjson.dumps(answer), media_type="application/json")


async def _prepare(
    reference: str, body: GenerateRequest, request: Request, services: Services, tenant: str
) -> tuple[Call, Rendering]:
    name, _, number = reference.partition("@")
    version = int(number) if number else None
    request.state.log.update(task=name)
    record = await _record(services, tenant, name, version)
    parameters = merge_defaults(record.defaults if record else {}, body.parameters)
    check_parameters(parameters, vocab_size=services.model.vocab_size, stream=bool(body.stream))
    n = parameters.n or 1
    limit = services.config.limits.request_timeout_s
    call = Call(
        tenant=tenant,
        task=name if record else None,
        version=version,
        prompt=body.inputs,
        sampling=sampling_params(parameters),
        stop=tuple(parameters.stop or ()),
        n=n,
        best_of=1 if is_search(parameters) else parameters.best_of or n,
        truncate=parameters.truncate,
        chat=bool(record and record.defaults.get("chat_template")),
        timeout_s=min(parameters.timeout_s or limit, limit),
        priority=parameters.priority or 0,
        request_id=request.state.request_id,
    )
    return call, Rendering(name, body.inputs, parameters)


async def _record(
    services: Services, tenant: str, name: str, version: int | None
) -> TaskRecord | None:
    """The task called; None is the base model."""
    if name == BASE_TASK:
        if not services.config.http.serve_base:
            raise NotFound("this server does not serve the base model", param="task")
        if version is not None:
            raise NotFound("the base model has no versions", param="version")
        return None
    record = await services.task(tenant, name)
    if version is not None:
        record.version(version)
    elif record.active is None:
        raise NotFound(
            f"task {name!r} has no active version", param="task", code="no_active_version"
        )
    return record


async def _stream(
    call: Call, rendering: Rendering, request: Request, services: Services
) -> Response:
    """Waits for the first token, so that what fails before it has a status of its own."""
    stream = await services.frontend.open(call)
    try:
        first = await unless_disconnected(request.receive, anext(stream))
    except BaseException:
        await stream.aclose()
        raise
    counting = _counted(services, call.tenant, rendering.task)
    counting.__enter__()

    async def close() -> None:
        await stream.aclose()
        counting.__exit__(None, None, None)

    return EventStream(_events(first, stream, rendering, request), close, request.state.log)


async def _events(
    first: Chunk, stream: Stream, rendering: Rendering, request: Request
) -> AsyncIterator[bytes]:
    """One piece a write. What is ready leaves together: a write costs as much as all else that is
    done for a token here, so a loop that has fallen behind the engine catches up."""
    yield _events_ready(first, stream, rendering, request)
    async for chunk in stream:
        yield _events_ready(chunk, stream, rendering, request)


def _events_ready(chunk: Chunk, stream: Stream, rendering: Rendering, request: Request) -> bytes:
    data = _event(chunk, rendering, request)
    if more := stream.ready(_TOGETHER - 1):
        data = b"".join([data, *(_event(chunk, rendering, request) for chunk in more)])
    return data


def _event(chunk: Chunk, rendering: Rendering, request: Request) -> bytes:
    data = rendering.chunk(chunk)
    if chunk.completion is not None:
        _log_answer(request, data)
    return event(data)


def _log_answer(request: Request, answer: dict[str, Any]) -> None:
    usage = answer["usage"]
    request.state.log.update(
        version=answer["version"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


@contextmanager
def _counted(services: Services, tenant: str, task: str) -> Iterator[None]:
    services.running[tenant, task] += 1
    try:
        yield
    finally:
        services.running[tenant, task] -= 1
        if not services.running[tenant, task]:
            del services.running[tenant, task]
