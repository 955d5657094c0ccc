"""The application: routes, error handlers and the middleware around them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp

from prefixd_server.http import downloads, health, native, tasks, uploads
from prefixd_server.http.errors import install_error_handlers
from prefixd_server.http.middleware import RequestMiddleware
from prefixd_server.http.services import Services

__all__ = ["create_app"]

_DESCRIPTION = """Multi-tenant inference with trained prefixes: one frozen language model, \
a task for every prefix."""


class _Application(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """Of FastAPI's own layers the one that our routes need."""
        answering = ExceptionMiddleware(self.router, handlers=self.exception_handlers)
        return RequestMiddleware(answering, self.state.services)


def create_app(services: Services) -> FastAPI:
    """The ASGI application; while it runs, ``services.frontend`` is attached to its event loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.spool.mkdir(parents=True, exist_ok=True)
        services.frontend.attach(asyncio.get_running_loop())
        try:
            yield
        finally:
            services.close()

    app = _Application(
        title="prefixd",
        version=package_version("prefixd"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = services
    app.state.methods = methods = defaultdict[str, set[str]](set)
    for room in (native, uploads, tasks, downloads, health):
        app.router.routes.extend(room.routes.routes)
        for route in room.routes.routes:
            if isinstance(route, APIRoute):
                methods[route.path].update(route.methods or ())
    install_error_handlers(app)
    return app
