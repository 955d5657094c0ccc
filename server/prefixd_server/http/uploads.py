"""New versions: uploaded as files, or compiled from a text by the frozen LM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from fastapi import Request, Response

from prefixd_server.errors import InvalidRequest
from prefixd_server.http.answers import UploadAnswer, errors
from prefixd_server.http.auth import Tenant
from prefixd_server.http.multipart import spool_upload
from prefixd_server.http.paths import BASE_TASK, Activate, IfMatch, IfNoneMatch, TaskName
from prefixd_server.http.route import router
from prefixd_server.http.schemas import CompileRequest
from prefixd_server.http.services import Services, ServicesDep
from prefixd_server.types import CompileOutput
from prefixd_store.arrays import STORAGE, DType, PrefixArray
from prefixd_store.format import Limits, read_manifest, write_prefix
from prefixd_store.importers import import_checkpoint
from prefixd_store.records import VersionRecord
from prefixd_store.store import PutResult

__all__ = ["routes"]

routes = router("prefixes")

_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "Our safetensors file, or a checkpoint folder's files under their own names",
        "content": {
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {
                "schema": {"type": "object", "additionalProperties": _FILE, "minProperties": 1}
            },
        },
    }
}
_HEADERS = {
    "ETag": {"description": "the task's, for If-Match", "schema": {"type": "string"}},
    "Location": {"description": "the version", "schema": {"type": "string"}},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": UploadAnswer,
        "description": "These bytes already are a version",
        "headers": _HEADERS,
    },
    201: {"description": "The new version, durable", "headers": _HEADERS},
}


@routes.put(
    "/v1/tasks/{task}/prefix",
    status_code=201,
    summary="Upload a prefix as a new version",
    responses={**_ANSWERS, **errors(400, 404, 409, 413, 415, 422, 503)},
    openapi_extra=_BODY,
)
async def upload(
    task: TaskName,
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: Tenant,
    activate: Activate = True,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> UploadAnswer:
    _check_not_base(task)
    condition = _condition(if_match, if_none_match)
    limits = _limits(services)
    with _folder(services.spool) as folder:
        files = await spool_upload(request, folder, limits.max_bytes)

        def publish() -> PutResult:
            out = folder / "prefix"
            imported = import_checkpoint(
                files,
                out,
                geometry=services.model.geometry,
                fingerprint=services.model.fingerprint,
                limits=limits,
            )
            record = imported.manifest.version_record(imported.sha256, imported.bytes)
            return services.registry.publish(
                tenant, task, out, record, activate=activate, if_match=condition
            )

        return _answer(request, response, services, await services.work(publish))


@routes.post(
    "/v1/tasks/{task}/compile",
    status_code=201,
    summary="Make a prefix from a text",
    responses={**_ANSWERS, **errors(400, 404, 409, 413, 415, 422, 429, 503, 504)},
)
async def compile_text(
    task: TaskName,
    body: CompileRequest,
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: Tenant,
    activate: Activate = True,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> UploadAnswer:
    _check_not_base(task)
    condition = _condition(if_match, if_none_match)
    timeout_s = services.config.limits.request_timeout_s
    compiled, num_leading = await services.frontend.compile(tenant, body.text, timeout_s=timeout_s)
    provenance = {
        "text_sha256": hashlib.sha256(body.text.encode()).hexdigest(),
        "leading_special_tokens": num_leading,
    }
    with _folder(services.spool) as folder:

        def publish() -> PutResult:
            out = folder / "prefix"
            record = _write_compiled(out, compiled, services, provenance)
            return services.registry.publish(
                tenant, task, out, record, activate=activate, if_match=condition
            )

        return _answer(request, response, services, await services.work(publish))


def _write_compiled(
    out: Path, compiled: CompileOutput, services: Services, provenance: dict[str, Any]
) -> VersionRecord:
    dtype = cast(DType, compiled.dtype)

    def array(data: bytes) -> PrefixArray:
        return PrefixArray(np.frombuffer(data, STORAGE[dtype]).reshape(compiled.shape), dtype)

    limits = _limits(services)
    sha256 = write_prefix(
        out,
        {"decoder.key": array(compiled.key), "decoder.value": array(compiled.value)},
        query_offset=compiled.shape[2],
        base_fingerprint=services.model.fingerprint,
        base_model=services.model.name,
        source_format="compiled",
        provenance=provenance,
        limits=limits,
    )
    return read_manifest(out, limits).version_record(sha256, out.stat().st_size)


def _answer(
    request: Request, response: Response, services: Services, put: PutResult
) -> UploadAnswer:
    task, version = put.task, put.version
    if not put.created:
        response.status_code = 200
    response.headers["etag"] = task.etag
    response.headers["location"] = f"/v1/tasks/{task.name}/versions/{version.version}"
    request.state.log.update(task=task.name, version=version.version)
    return UploadAnswer(
        task=task.name,
        version=version.version,
        sha256=version.sha256,
        num_virtual_tokens=version.num_virtual_tokens,
        sites={**version.sites},
        format=version.format,
        bytes=version.bytes,
        created_at=version.created_at,
        active=version.version in task.split,
    )


def _check_not_base(task: str) -> None:
    if task == BASE_TASK:
        raise InvalidRequest(f"{BASE_TASK!r} is the base model's own name", param="task")


def _condition(if_match: str | None, if_none_match: str | None) -> str | None:
    """One value for the registry: an ETag, ``*`` (must exist) or ``!*`` (must not)."""
    if if_none_match is None:
        return if_match
    if if_match is not None:
        raise InvalidRequest("give one of If-Match and If-None-Match", param="If-None-Match")
    return "!*"


def _limits(services: Services) -> Limits:
    limits = services.config.limits
    return Limits(max_bytes=limits.max_upload_bytes, max_virtual_tokens=limits.max_virtual_tokens)


@contextmanager
def _folder(spool: Path) -> Iterator[Path]:
    """A folder of one upload's own, gone at the end whatever happens."""
    with TemporaryDirectory(prefix="upload-", dir=spool, ignore_cleanup_errors=True) as name:
        yield Path(name)
