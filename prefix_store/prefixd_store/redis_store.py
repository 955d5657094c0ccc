"""A store in Redis 6.2 or newer: one server, Sentinel or Cluster.

A publication writes the blob's chunks under keys that nothing refers to, then one Lua script checks
that the record is still the one the change was computed from, and replaces the record, counts the
blob's users and appends the event, or does nothing. See redis_scripts.py for the keys.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefixd_store.base import (
    Change,
    RecordStore,
    check_limit,
    check_sha256,
    damaged_record,
    make_change,
)
from prefixd_store.buffers import READ_PIECE
from prefixd_store.errors import CorruptBlob, InvalidRequest, NotFound, StoreUnavailable
from prefixd_store.mutations import Mutation, decode
from prefixd_store.records import Event, TaskRecord, VersionRecord, check_name
from prefixd_store.redis_blobs import Blobs, Copy
from prefixd_store.redis_health import check_durability, redis_errors
from prefixd_store.redis_scripts import COMMIT, key_names
from prefixd_store.redis_urls import connect, public_url
from prefixd_store.store import TaskPage

__all__ = ["RedisStore"]

_log = logging.getLogger(__name__)

_ATTEMPTS = 200
_PAGE = 500
_READ_COUNT = 1000
_UPLOADS = 5
_NOTHING = b"0-0"


class RedisStore(RecordStore):
    """Use :meth:`from_url`. The client is any synchronous redis-py client that gives bytes."""

    def __init__(
        self,
        client: Any,
        *,
        name: str = "Redis",
        namespace: str = "prefixd",
        chunk_bytes: int = READ_PIECE,
        max_events: int = 100_000,
        require_aof: bool = False,
    ) -> None:
        assert 0 < chunk_bytes <= 512 << 20, chunk_bytes
        self._client = client
        self._name = name
        self._keys = key_names(namespace)
        self._blobs = Blobs(client, namespace, self._keys, chunk_bytes)
        self._max_events = max_events
        with self._redis_errors():
            client.ping()
            check_durability(client, name, require_aof=require_aof)
        # A blocking read must end before the socket's timeout does.
        self._longest_block = (client.get_connection_kwargs().get("socket_timeout") or 10.0) / 2

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "prefixd",
        chunk_bytes: int = READ_PIECE,
        max_events: int = 100_000,
        require_aof: bool = False,
        **client_options: Any,
    ) -> RedisStore:
        """Open the store that ``url`` names (redis_urls.py lists the forms).

        ``namespace`` begins every key: two deployments may share a server. Blobs are cut into
        chunks of ``chunk_bytes``; the feed keeps about ``max_events``; ``require_aof`` refuses a
        server that does not keep an append-only file. Everything else goes to redis-py. Raises
        InvalidRequest for a URL that cannot be parsed and StoreUnavailable.
        """
        name = public_url(url)
        try:
            with redis_errors(name):
                client = connect(url, **client_options)
            return cls(
                client,
                name=name,
                namespace=namespace,
                chunk_bytes=chunk_bytes,
                max_events=max_events,
                require_aof=require_aof,
            )
        except TypeError as error:
            # redis-py hands the query's names to its constructors as they are.
            raise InvalidRequest(
                f"{name}: an option that redis-py does not take: {error}", param="store"
            ) from error

    # --- tasks -----------------------------------------------------------------------------------
    def list_tasks(
        self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None
    ) -> TaskPage:
        check_limit(limit)
        check_name(tenant, param="tenant")
        start = f"[{tenant}:{prefix}"
        if cursor is not None and cursor >= prefix:
            start = f"({tenant}:{cursor}"
        with self._redis_errors():
            fields = self._client.zrangebylex(
                self._keys["index"], start.encode(), _prefix_end(tenant, prefix), 0, limit + 1
            )
            tasks = list(self._readable(fields[:limit]))
        more = fields[limit - 1].decode().partition(":")[2] if len(fields) > limit else None
        return TaskPage(tasks, more)

    def all_tasks(self) -> list[TaskRecord]:
        with self._redis_errors():
            fields = self._client.zrange(self._keys["index"], 0, -1)
            pages = [fields[i : i + _PAGE] for i in range(0, len(fields), _PAGE)]
            return [task for page in pages for task in self._readable(page)]

    def _readable(self, fields: list[bytes]) -> Iterator[TaskRecord]:
        for field, raw in zip(fields, self._hmget(fields), strict=True):
            try:
                task = self._decode(raw, *field.decode().split(":"))
            except StoreUnavailable as error:
                _log.error("left out of the list: %s", error)
                continue
            if task is not None:
                yield task

    def _hmget(self, fields: list[bytes]) -> list[bytes | None]:
        return list(self._client.hmget(self._keys["tasks"], fields)) if fields else []

    def _decode(self, raw: bytes | None, tenant: str, task: str) -> TaskRecord | None:
        try:
            return None if raw is None else decode(raw, tenant, task)
        except ValueError as error:
            raise damaged_record(f"{tenant}:{task} in {self._name}", error) from None

    def _find(self, tenant: str, task: str) -> TaskRecord | None:
        with self._redis_errors():
            return self._decode(self._raw(tenant, task), tenant, task)

    def _raw(self, tenant: str, task: str) -> bytes | None:
        raw: bytes | None = self._client.hget(self._keys["tasks"], f"{tenant}:{task}")
        return raw

    # --- changes ---------------------------------------------------------------------------------
    def _apply(self, tenant: str, task: str, mutation: Mutation) -> Change:
        with self._redis_errors():
            change = self._commit(tenant, task, mutation, None, None)
        assert change is not None, "only a blob can be lost"
        return change

    def _publish(
        self, tenant: str, task: str, mutation: Mutation, blob: Path, version: VersionRecord
    ) -> Change:
        sha256 = version.sha256
        with self._redis_errors():
            for _ in range(_UPLOADS):
                stored = self._blobs.find(tenant, sha256)
                copy = None
                if stored is None or not self._blobs.is_whole(stored):
                    copy = self._blobs.upload(tenant, sha256, blob)
                    if copy is None:
                        continue
                change = self._commit(tenant, task, mutation, copy, stored)
                if change is not None:
                    return change
        raise StoreUnavailable(
            f"blob {sha256} was collected as garbage {_UPLOADS} times before it could be published"
        )

    def _commit(
        self, tenant: str, task: str, mutation: Mutation, copy: Copy | None, replaces: Copy | None
    ) -> Change | None:
        """Make the change; None if the blob is gone that it counts on."""
        for _ in range(_ATTEMPTS):
            raw = self._raw(tenant, task)
            change = make_change(self._decode(raw, tenant, task), mutation)
            if change.after is change.before and copy is None:
                return change
            answer = self._eval_commit(tenant, task, raw, change, copy, replaces)
            if answer != b"stale":
                return change if answer == b"done" else None
            time.sleep(random.uniform(0, 0.01))
        raise StoreUnavailable(f"task {task!r} is being changed by too many at once")

    def _eval_commit(
        self,
        tenant: str,
        task: str,
        raw: bytes | None,
        change: Change,
        copy: Copy | None,
        replaces: Copy | None,
    ) -> Any:
        after = change.after
        arguments = [
            hashlib.sha1(raw).hexdigest() if raw is not None else "",
            (change.encoded or raw or b"") if after is not None else b"",
            tenant,
            task,
            after.revision if after is not None else 0,
            self._max_events,
            next((f"{tenant}:{sha256}" for sha256 in change.acquired), ""),
            str(copy or ""),
            copy.field if copy else "",
            replaces.meta if replaces else "",
            *(f"{tenant}:{sha256}" for sha256 in change.released),
        ]
        return self._client.eval(COMMIT, len(self._keys), *self._keys.values(), *arguments)

    # --- blobs -----------------------------------------------------------------------------------
    def read_blob(
        self, tenant: str, sha256: str, *, progress: Callable[[int], None] | None = None
    ) -> memoryview:
        """``progress`` is called with the number of bytes of each piece as it arrives."""
        check_name(tenant, param="tenant")
        check_sha256(sha256)
        tried: Copy | None = None
        with self._redis_errors():
            while (copy := self._blobs.find(tenant, sha256)) is not None:
                if copy == tried:
                    raise self._corrupt(CorruptBlob(f"blob {copy} misses chunks in {self._name}"))
                try:
                    data = self._blobs.read(copy, progress)
                except CorruptBlob as error:
                    raise self._corrupt(error) from None
                if data is not None:
                    return data
                tried = copy  # perhaps replaced or freed while it was read
        raise NotFound(f"blob {sha256} does not exist", param="sha256")

    def _corrupt(self, error: CorruptBlob) -> CorruptBlob:
        _log.error("%s", error)
        return error

    # --- upkeep ----------------------------------------------------------------------------------
    def events(self, after: str | None, *, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        with self._redis_errors():
            while True:
                last = (self._client.get(self._keys["last"]) or _NOTHING).decode()
                if after is None or not (0, 0) <= _order(after) <= _order(last):
                    return [Event(cursor=last, kind="reset")]
                remaining = deadline - time.monotonic()
                events = self._read_feed(after, min(remaining, self._longest_block))
                if events or remaining <= 0:
                    return events

    def _read_feed(self, after: str, wait: float) -> list[Event]:
        block = max(1, int(wait * 1000)) if wait > 0 else None
        answer = self._client.xread({self._keys["events"]: after}, count=_READ_COUNT, block=block)
        events = []
        for identifier, fields in answer[0][1] if answer else []:
            if fields[b"before"].decode() != after:
                # Trimmed away, or lost with a server that came back older: read everything anew.
                last = (self._client.get(self._keys["last"]) or _NOTHING).decode()
                return [Event(cursor=last, kind="reset")]
            after = identifier.decode()
            events.append(_event(after, fields))
        return events

    def ping(self) -> None:
        with self._redis_errors():
            self._client.ping()

    def collect_garbage(self, *, grace_seconds: float = 60.0) -> int:
        with self._redis_errors():
            return self._blobs.collect(grace_seconds)

    def close(self) -> None:
        with self._redis_errors():
            self._client.close()

    def _redis_errors(self) -> AbstractContextManager[None]:
        return redis_errors(self._name)


def _event(cursor: str, fields: dict[bytes, bytes]) -> Event:
    names = ("kind", "tenant", "task", "revision")
    return Event.model_validate(
        {"cursor": cursor, **{name: fields[name.encode()].decode() for name in names}}
    )


def _prefix_end(tenant: str, prefix: str) -> bytes:
    return f"[{tenant}:{prefix}".encode() + b"\xff"


def _order(cursor: str) -> tuple[int, int]:
    """Stream ids compare as pairs of numbers. What is no id comes before all of them."""
    milliseconds, _, sequence = cursor.partition("-")
    if not (milliseconds.isascii() and milliseconds.isdigit()):
        return (-1, 0)
    return (int(milliseconds), int(sequence) if sequence.isascii() and sequence.isdigit() else 0)
