"""Tasks and their versions: list, show, activate, change, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Response

from prefixd_server.errors import InvalidRequest
from prefixd_server.http.answers import TaskAnswer, TasksAnswer, VersionAnswer, errors
from prefixd_server.http.auth import Tenant
from prefixd_server.http.parameters import check_parameters
from prefixd_server.http.paths import IfMatch, TaskName, Version
from prefixd_server.http.route import router
from prefixd_server.http.schemas import ActivateRequest, PageSize, PatchRequest
from prefixd_server.http.services import Services, ServicesDep
from prefixd_server.types import PrefixKey
from prefixd_store.records import TaskRecord, VersionRecord

__all__ = ["routes"]

routes = router("tasks")

_ETAG = {"description": "for If-Match", "schema": {"type": "string"}}
_TASK: dict[int | str, dict[str, Any]] = {
    200: {"description": "The task", "headers": {"ETag": _ETAG}}
}


@routes.get("/v1/tasks", summary="List tasks by name", responses=errors(422, 503))
async def list_tasks(
    services: ServicesDep,
    tenant: Tenant,
    prefix: Annotated[
        str, Query(pattern=r"^[a-z0-9._-]{0,128}$", description="names that begin so")
    ] = "",
    limit: PageSize = 100,
    cursor: Annotated[
        str | None,
        Query(pattern=r"^[a-z0-9._-]{1,128}$", description="`next_cursor` of the page before"),
    ] = None,
) -> TasksAnswer:
    page = await services.ask(
        services.registry.list, tenant, prefix=prefix, limit=limit, cursor=cursor
    )
    tasks = [_task(services, record) for record in page.tasks]
    return TasksAnswer(tasks=tasks, next_cursor=page.next_cursor)


@routes.get("/v1/tasks/{task}", summary="Show a task", responses={**_TASK, **errors(404, 422, 503)})
async def show_task(
    task: TaskName, response: Response, services: ServicesDep, tenant: Tenant
) -> TaskAnswer:
    record = await services.task(tenant, task)
    return _with_etag(response, services, record)


@routes.patch(
    "/v1/tasks/{task}",
    summary="Change description, pinning or request defaults",
    responses={**_TASK, **errors(400, 404, 409, 413, 415, 422, 503)},
)
async def patch_task(
    task: TaskName,
    body: PatchRequest,
    response: Response,
    services: ServicesDep,
    tenant: Tenant,
    if_match: IfMatch = None,
) -> TaskAnswer:
    if body.defaults.parameters is not None:
        check_parameters(
            body.defaults.parameters,
            vocab_size=services.model.vocab_size,
            at="defaults.parameters",
        )
    if body.defaults.chat_template and not services.frontend.codec.has_chat_template:
        raise InvalidRequest(
            f"the tokenizer of {services.model.name} has no chat template",
            param="defaults.chat_template",
        )
    record = await services.ask(
        services.registry.update, tenant, task, body.changes(), if_match=if_match
    )
    return _with_etag(response, services, record)


@routes.post(
    "/v1/tasks/{task}/activate",
    summary="Send a task's traffic to a version, or split it",
    responses={**_TASK, **errors(400, 404, 409, 413, 415, 422, 503)},
)
async def activate(
    task: TaskName,
    body: ActivateRequest,
    response: Response,
    services: ServicesDep,
    tenant: Tenant,
    if_match: IfMatch = None,
) -> TaskAnswer:
    record = await services.ask(
        services.registry.activate, tenant, task, body.weights(), if_match=if_match
    )
    return _with_etag(response, services, record)


@routes.delete(
    "/v1/tasks/{task}",
    status_code=204,
    summary="Delete a task; requests in flight finish",
    responses=errors(404, 409, 422, 503),
)
async def delete_task(
    task: TaskName, services: ServicesDep, tenant: Tenant, if_match: IfMatch = None
) -> None:
    await services.ask(services.registry.delete_task, tenant, task, if_match=if_match)


@routes.get(
    "/v1/tasks/{task}/versions/{version}",
    summary="Show a version",
    responses=errors(404, 422, 503),
)
async def show_version(
    task: TaskName, version: Version, services: ServicesDep, tenant: Tenant
) -> VersionAnswer:
    record = await services.task(tenant, task)
    return _version(services, record, record.version(version))


@routes.delete(
    "/v1/tasks/{task}/versions/{version}",
    status_code=204,
    summary="Delete a version; requests in flight finish",
    responses=errors(404, 409, 422, 503),
)
async def delete_version(
    task: TaskName,
    version: Version,
    services: ServicesDep,
    tenant: Tenant,
    if_match: IfMatch = None,
) -> None:
    await services.ask(services.registry.delete_version, tenant, task, version, if_match=if_match)


def _with_etag(response: Response, services: Services, record: TaskRecord) -> TaskAnswer:
    response.headers["etag"] = record.etag
    return _task(services, record)


def _task(services: Services, record: TaskRecord) -> TaskAnswer:
    return TaskAnswer(
        task=record.name,
        description=record.description,
        pinned=record.pinned,
        defaults=record.defaults,
        active=record.active,
        split={str(version): weight for version, weight in sorted(record.split.items())},
        versions=[_version(services, record, v) for _, v in sorted(record.versions.items())],
        requests_running=services.running.get((record.tenant, record.name), 0),
        created_at=record.created_at,
        updated_at=record.updated_at,
    )


def _version(services: Services, task: TaskRecord, version: VersionRecord) -> VersionAnswer:
    fingerprint = services.model.fingerprint
    return VersionAnswer(
        task=task.name,
        **version.model_dump(),
        verified=fingerprint is not None and version.base_fingerprint == fingerprint,
        weight=task.split.get(version.version, 0.0),
        residency=services.residency(PrefixKey(task.tenant, version.sha256)),
    )
