"""Is it alive, is it ready, what does it serve, what does it count."""

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Any

from fastapi import Response

from prefixd_server.http.answers import (
    CacheAnswer,
    EncoderAnswer,
    InfoAnswer,
    LimitsAnswer,
    ModelAnswer,
    StatusAnswer,
)
from prefixd_server.http.metrics import CONTENT_TYPE
from prefixd_server.http.route import router
from prefixd_server.http.services import ServicesDep

__all__ = ["routes"]

routes = router("server")

_NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"model": StatusAnswer, "description": "Not now"}}
_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics"}


@routes.get("/livez", summary="Does the process work", responses=_NOT_NOW)
async def livez(response: Response, services: ServicesDep) -> StatusAnswer:
    if services.engine_alive():
        return StatusAnswer(status="ok")
    response.status_code = 503
    return StatusAnswer(status="engine_dead")


@routes.get("/readyz", summary="Send requests here?", responses=_NOT_NOW)
async def readyz(response: Response, services: ServicesDep) -> StatusAnswer:
    if services.draining:
        status = StatusAnswer(status="draining")
    elif not services.engine_alive():
        status = StatusAnswer(status="engine_dead")
    elif not services.registry.health.healthy:
        status = StatusAnswer(status="store_unavailable")
    else:
        return StatusAnswer(status="ready")
    response.status_code = 503
    return status


@routes.get(
    "/metrics", summary="Prometheus metrics", response_class=Response, responses={200: _TEXT}
)
async def metrics(services: ServicesDep) -> Response:
    return Response(services.metrics.render(), headers={"content-type": CONTENT_TYPE})


@routes.get("/v1/info", summary="The model, the limits, the cache")
async def info(services: ServicesDep) -> InfoAnswer:
    model, geometry, config = services.model, services.model.geometry, services.config
    return InfoAnswer(
        version=package_version("prefixd"),
        model=ModelAnswer(
            name=model.name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            encoder=EncoderAnswer(**geometry.encoder._asdict()) if geometry.encoder else None,
            max_model_len=model.max_model_len,
            dtype=model.dtype,
            device=model.device,
        ),
        limits=LimitsAnswer(
            **config.limits.model_dump(include=set(LimitsAnswer.model_fields)),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_queue=config.scheduler.max_queue,
        ),
        cache=CacheAnswer(**services.pool()._asdict()),
    )
