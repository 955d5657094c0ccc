"""Who is calling. With authentication off, everyone is the one tenant there is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from prefixd_store.records import DEFAULT_TENANT

__all__ = ["Tenant", "current_tenant"]


async def current_tenant(request: Request) -> str:
    request.state.log["tenant"] = DEFAULT_TENANT
    return DEFAULT_TENANT


Tenant = Annotated[str, Depends(current_tenant)]
