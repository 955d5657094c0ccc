"""What goes wrong between us and a Redis server, and whether it keeps what it acknowledges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.cluster import RedisCluster
from redis.exceptions import NoPermissionError, RedisClusterException, RedisError

from prefixd_store.errors import StoreUnavailable

__all__ = ["check_durability", "redis_errors"]

_log = logging.getLogger(__name__)


@contextmanager
def redis_errors(name: str) -> Iterator[None]:
    """Turn every failure of redis-py and of a socket into :class:`StoreUnavailable`."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError) as error:
        raise StoreUnavailable(f"{name}: {error or type(error).__name__}") from error


def check_durability(client: Any, name: str, *, require_aof: bool) -> None:
    """Warn about servers that can lose an acknowledged upload; with ``require_aof`` refuse those
    without an append-only file."""
    try:
        persistence, memory = _info(client, "persistence"), _info(client, "memory")
    except NoPermissionError:
        if require_aof:
            raise StoreUnavailable(
                f"{name}: an append-only file is required and this user may not run INFO to see it"
            ) from None
        _log.warning("%s: this user may not run INFO; whether uploads last is unknown", name)
        return
    if any(not int(node.get("aof_enabled", 0)) for node in persistence):
        message = f"{name}: appendonly is off, so that a crash loses acknowledged uploads"
        if require_aof:
            raise StoreUnavailable(message)
        _log.warning(message)
    policies = {str(node.get("maxmemory_policy", "noeviction")) for node in memory}
    for policy in policies:
        if policy.startswith("allkeys-"):
            _log.warning("%s: maxmemory-policy %s may evict prefixes; use noeviction", name, policy)


def _info(client: Any, section: str) -> list[dict[str, Any]]:
    """INFO of the server, or of each primary of a cluster."""
    if not isinstance(client, RedisCluster):
        return [client.info(section)]
    cluster: Any = client
    return [cluster.info(section, target_nodes=node) for node in cluster.get_primaries()]
