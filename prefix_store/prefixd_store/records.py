"""What a store keeps about a task. A record is one JSON document, replaced as a whole."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefixd_store.errors import InvalidRequest, NotFound

__all__ = [
    "DEFAULT_TENANT",
    "NAME_PATTERN",
    "Event",
    "Site",
    "TaskRecord",
    "VersionRecord",
    "check_name",
    "utcnow",
]

DEFAULT_TENANT = "default"
"""The one tenant there is while authentication is off."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}$"
_NAME = re.compile(NAME_PATTERN.removesuffix("$") + r"\Z")

Site = Literal["decoder", "encoder", "cross"]


def check_name(name: str, *, param: str = "task") -> str:
    """Return ``name`` if it may name a task or tenant, else raise :class:`InvalidRequest`."""
    if not _NAME.match(name):
        shown = name if len(name) <= 140 else name[:140] + "…"
        raise InvalidRequest(f"{param} {shown!r} does not match {NAME_PATTERN}", param=param)
    return name


def utcnow() -> datetime:
    return datetime.now(UTC)


class _Record(BaseModel):
    # extra="ignore" lets an older server read records that a newer one wrote.
    model_config = ConfigDict(frozen=True, extra="ignore")


class VersionRecord(_Record):
    """One immutable version of a task; the prefix itself is the blob named by ``sha256``."""

    version: int = Field(ge=1)
    sha256: str
    bytes: int
    num_virtual_tokens: int
    query_offset: int
    sites: dict[Site, tuple[int, int, int, int]]
    """site -> shape [L, H_kv, P, D] of its key (and value) tensor"""
    dtype: str
    format: str
    """what was uploaded: ``prefixd``, ``peft/prefix_tuning``, ``peft/cartridge``, ``compiled``"""
    base_fingerprint: str | None = None
    """None: the upload did not say which model it was trained on (shown as unverified)"""
    base_model: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=utcnow)


class TaskRecord(_Record):
    """A task of one tenant. ``split`` maps version to weight (sum 1); empty: nothing is active."""

    tenant: str
    name: str
    revision: int = 1
    """grows with every change of this record; the ETag that If-Match compares"""
    next_version: int = 1
    versions: dict[int, VersionRecord] = Field(default_factory=dict)
    split: dict[int, float] = Field(default_factory=dict)
    description: str = ""
    pinned: bool = False
    defaults: dict[str, Any] = Field(default_factory=dict)
    """of requests: ``parameters`` (a generation-parameters object), ``stop``, ``chat_template``"""
    created_at: datetime = Field(default_factory=utcnow)
    updated_at: datetime = Field(default_factory=utcnow)

    @property
    def etag(self) -> str:
        # created_at tells a task from an earlier one of the same name that was deleted.
        return f'"{int(self.created_at.timestamp() * 1e6):x}-{self.revision}"'

    @property
    def active(self) -> int | None:
        """The version with the largest weight, the newest of equals; None: nothing is active."""
        return max(self.split, key=lambda v: (self.split[v], v)) if self.split else None

    def version(self, number: int) -> VersionRecord:
        try:
            return self.versions[number]
        except KeyError:
            raise NotFound(f"task {self.name!r} has no version {number}", param="version") from None


class Event(_Record):
    """One change, as the feed tells it. ``cursor`` orders events and resumes a feed after it.

    ``kind="reset"`` says that events were missed (the feed was trimmed): read everything anew.
    """

    cursor: str
    kind: Literal["put", "delete", "reset"]
    tenant: str = ""
    task: str = ""
    revision: int = 0
