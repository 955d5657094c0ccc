"""From a URL to a redis-py client.

==============================================================  ==================================
``redis://[user:password@]host[:port][/db]``                     one server
``rediss://…?ssl_ca_certs=/path/ca.pem``                         the same over TLS
``unix://[user:password@]/path/redis.sock[?db=0]``               a local socket
``redis+sentinel://[user:password@]h1:p1,h2:p2/service[/db]``    the master that Sentinels name
``redis+cluster://[user:password@]h1:p1,h2:p2``                  Redis Cluster
==============================================================  ==================================

``rediss+sentinel`` and ``rediss+cluster`` use TLS. The query takes redis-py's own options
(``socket_timeout``, ``ssl_certfile``, …) and ``sentinel_username``, ``sentinel_password``.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from prefixd_store.buffers import READ_PIECE
from prefixd_store.errors import InvalidRequest

__all__ = ["connect", "public_url"]

SOCKET_TIMEOUT = 5.0
CONNECT_TIMEOUT = 2.0

_PORTS = {"sentinel": 26379, "cluster": 6379}


def connect(url: str, **overrides: Any) -> Any:
    """A client that gives bytes. redis-py's own exceptions pass through; a URL that cannot be
    parsed is :class:`InvalidRequest`. Typed Any: redis-py's answers are unions with awaitables."""
    kind, hosts, options = _parse(url)
    options = {**_defaults(), **options, **overrides}
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, **options)
    if kind == "sentinel":
        return _sentinel_master(url, hosts, options)
    return redis.Redis.from_url(url, **{**_defaults(), **overrides})


def public_url(url: str) -> str:
    """The URL without user, password and query, for messages."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('?', 1)[0].rpartition('@')[2]}"


def _defaults() -> dict[str, Any]:
    # A lost connection is made again at once; a server that hangs is given up after one timeout.
    retry = Retry(
        ExponentialWithJitterBackoff(base=0.02, cap=0.2),
        2,
        supported_errors=(redis.ConnectionError, ConnectionError),
    )
    return {
        "decode_responses": False,
        "health_check_interval": 15,
        "protocol": 2,
        "retry": retry,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_timeout": SOCKET_TIMEOUT,
        # By 64 KiB, redis-py's default, a prefix takes hundreds of turns at the interpreter's lock.
        "socket_read_size": READ_PIECE,
    }


def _parse(url: str) -> tuple[str, list[tuple[str, int]], dict[str, Any]]:
    """(kind, hosts, redis-py options); the options are read by redis-py from a one-host URL."""
    try:
        parts = urlsplit(url)
        scheme, _, kind = parts.scheme.partition("+")
        if kind not in {"", *_PORTS}:
            raise ValueError(kind)
        userinfo, at, netloc = parts.netloc.rpartition("@")
        hosts = [_host(h, _PORTS[kind]) for h in netloc.split(",")] if kind else []
        if not kind:
            return kind, hosts, parse_url(url)  # type: ignore[no-untyped-call]
        one_host = f"{scheme}://{userinfo}{at}placeholder/?{parts.query}"
        options = parse_url(one_host)  # type: ignore[no-untyped-call]
        del options["host"]
        if options.pop("connection_class", None) is SSLConnection:
            options["ssl"] = True
        return kind, hosts, options
    except ValueError:
        # No part of the URL is repeated: where parsing failed, its password may be anywhere in it.
        raise InvalidRequest(
            "the store's URL cannot be parsed; is every special character of the password "
            "percent-encoded?",
            param="store",
        ) from None


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname, parts.port or default_port


def _sentinel_master(url: str, hosts: list[tuple[str, int]], options: dict[str, Any]) -> Any:
    service, _, db = urlsplit(url).path.strip("/").partition("/")
    if not service or not (db or "0").isdigit():
        raise InvalidRequest("a redis+sentinel URL ends in /service or /service/db", param="store")
    common = {"socket_connect_timeout", "socket_timeout"}
    sentinel_options = {k: v for k, v in options.items() if k in common or k.startswith("ssl")}
    for name in ("username", "password"):
        if value := options.pop(f"sentinel_{name}", None):
            sentinel_options[name] = value
    options["db"] = int(db or 0)
    sentinel: Any = Sentinel(hosts, sentinel_kwargs=sentinel_options, **options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(service)
