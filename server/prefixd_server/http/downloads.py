"""A version's bytes: as they are stored, or as a PEFT folder in a zip."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import Query, Response
from starlette.responses import StreamingResponse

from prefixd_server.http.answers import errors
from prefixd_server.http.auth import Tenant
from prefixd_server.http.paths import TaskName, Version
from prefixd_server.http.route import router
from prefixd_server.http.services import ServicesDep
from prefixd_store.exporters.peft import export_peft
from prefixd_store.format import parse_prefix

__all__ = ["routes"]

routes = router("prefixes")

_PIECE = 1 << 20
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ANSWER: dict[str, Any] = {
    "description": "The file; with `format=peft` a zip of a PEFT folder",
    "content": {"application/octet-stream": _BINARY, "application/zip": _BINARY},
    "headers": {
        "ETag": {"description": "the SHA-256", "schema": {"type": "string"}},
        "Content-Disposition": {"description": "a file name", "schema": {"type": "string"}},
    },
}


@routes.get(
    "/v1/tasks/{task}/versions/{version}/prefix",
    summary="Download a version's bytes",
    response_class=Response,
    responses={200: _ANSWER, **errors(404, 422, 503)},
)
async def download(
    task: TaskName,
    version: Version,
    services: ServicesDep,
    tenant: Tenant,
    format: Annotated[Literal["prefixd", "peft"], Query()] = "prefixd",
) -> Response:
    record = await services.task(tenant, task)
    sha256 = record.version(version).sha256
    blob = await services.work(services.store.read_blob, tenant, sha256)
    stem = f"{task}-{version}"
    if format == "prefixd":
        headers = _headers(f"{stem}.safetensors", sha256, len(blob))
        return StreamingResponse(_pieces(blob), 200, headers, "application/octet-stream")
    archive = await services.work(
        _peft_zip, blob, services.spool, services.model.geometry.has_encoder
    )
    headers = _headers(f"{stem}.zip", f"{sha256}-peft", _size(archive))
    return StreamingResponse(_read(archive), 200, headers, "application/zip")


def _headers(name: str, etag: str, size: int) -> dict[str, str]:
    return {
        "content-length": str(size),
        "content-disposition": f'attachment; filename="{name}"',
        "etag": f'"{etag}"',
    }


async def _pieces(blob: memoryview) -> AsyncIterator[bytes]:
    for begin in range(0, len(blob), _PIECE):
        yield bytes(blob[begin : begin + _PIECE])


def _peft_zip(blob: memoryview, spool: Path, encoder_decoder: bool) -> BinaryIO:
    """A file with no name, so that it is gone with its last reader."""
    archive: BinaryIO = TemporaryFile(dir=spool)  # noqa: SIM115
    with TemporaryDirectory(prefix="export-", dir=spool) as name:
        folder = Path(name)
        export_peft(parse_prefix(blob), folder, encoder_decoder=encoder_decoder)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
            for path in sorted(folder.iterdir()):
                target.write(path, path.name)
    return archive


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _read(file: BinaryIO) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(_PIECE):
            yield piece
