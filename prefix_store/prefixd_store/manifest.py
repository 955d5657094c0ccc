"""What a prefix file says about itself: its header, checked in full before any tensor is read.

What is wrong with a header raises :class:`~prefixd_store.errors.InvalidPrefix`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from prefixd_store import strict_json
from prefixd_store.arrays import DType
from prefixd_store.errors import InvalidPrefix, TooLarge
from prefixd_store.records import Site, VersionRecord
from prefixd_store.tensorfile import TAGS, TensorFile, TensorSpec

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Limits",
    "PrefixManifest",
    "Shape",
    "leading_length",
    "manifest_of",
]

FORMAT = "prefixd"
FORMAT_VERSION = "1"

Shape = tuple[int, int, int, int]
"""[L, H_kv, P, D]: layers, key/value heads, virtual tokens, head size"""

TENSOR_SITES: dict[str, Site] = {
    f"{site}.{part}": site for site in get_args(Site) for part in ("key", "value")
}
_COUNT = re.compile(r"0|[1-9][0-9]{0,9}")
_SOURCE_FORMAT = re.compile(r"[a-z0-9][a-z0-9._/-]{0,63}")
_MAX_TEXT = 512
_MAX_PROVENANCE = 64 << 10


@dataclass(frozen=True)
class Limits:
    """What a file may be at most. The defaults are generous: a prefix is mostly under 100 MB."""

    max_bytes: int = 2 << 30
    max_header_bytes: int = 1 << 20
    max_virtual_tokens: int = 131_072
    """at each site"""


@dataclass(frozen=True)
class PrefixManifest:
    """All that a header says. ``offsets`` maps a tensor to (begin, end) in bytes of the file."""

    sites: dict[Site, Shape]
    dtype: DType
    num_virtual_tokens: int
    """:func:`leading_length` of the sites"""
    query_offset: int
    """0, or ``num_virtual_tokens``: each stream begins behind the prefix that it has"""
    base_fingerprint: str | None = None
    base_model: str | None = None
    source_format: str = FORMAT
    provenance: dict[str, Any] = field(default_factory=dict)
    offsets: dict[str, tuple[int, int]] = field(default_factory=dict)

    def version_record(self, sha256: str, bytes: int) -> VersionRecord:
        """The record to publish a file with; the store replaces the version number."""
        return VersionRecord(
            version=1,
            sha256=sha256,
            bytes=bytes,
            num_virtual_tokens=self.num_virtual_tokens,
            query_offset=self.query_offset,
            sites=self.sites,
            dtype=self.dtype,
            format=self.source_format,
            base_fingerprint=self.base_fingerprint,
            base_model=self.base_model,
            provenance=self.provenance,
        )


def leading_length(lengths: Mapping[Site, int]) -> int:
    """The one P that stands for a prefix of several lengths: the decoder's, or without one the
    encoder's, or else cross-attention's; 0 of no site."""
    return next((lengths[site] for site in get_args(Site) if site in lengths), 0)


def check_size(size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise TooLarge(
            f"prefix of {size} bytes, at most {limits.max_bytes} allowed", param="prefix"
        )


def manifest_of(header: TensorFile, limits: Limits) -> PrefixManifest:
    """The manifest of a container that holds a prefix in our format."""
    metadata = header.metadata
    _expect(metadata, "format", FORMAT)
    _expect(metadata, "format_version", FORMAT_VERSION)
    sites, dtype = _sites(header.tensors)
    if header.data_start % 8:
        raise InvalidPrefix(
            f"prefix: its data start at byte {header.data_start}, not a multiple of 8; "
            "pad the header with spaces"
        )
    tokens = _num_virtual_tokens(metadata, sites, limits)
    return PrefixManifest(
        sites=sites,
        dtype=dtype,
        num_virtual_tokens=tokens,
        query_offset=_query_offset(metadata, tokens),
        base_fingerprint=_text(metadata, "base_fingerprint"),
        base_model=_text(metadata, "base_model"),
        source_format=_source_format(metadata),
        provenance=_provenance(metadata),
        offsets={name: (spec.begin, spec.end) for name, spec in header.tensors.items()},
    )


def _expect(metadata: Mapping[str, str], key: str, wanted: str) -> None:
    got = metadata.get(key)
    if got != wanted:
        shown = "missing" if got is None else repr(got[:80])
        raise InvalidPrefix(f"metadata {key} is {shown}, expected {wanted!r}", param=key)


def _sites(tensors: Mapping[str, TensorSpec]) -> tuple[dict[Site, Shape], DType]:
    if not tensors:
        raise InvalidPrefix("the file holds no tensors; expected decoder.key and decoder.value")
    shapes: dict[str, Shape] = {}
    for name, spec in sorted(tensors.items()):
        shapes[name] = _shape(name, spec)
    tags = {spec.tag for spec in tensors.values()}
    if len(tags) > 1:
        raise InvalidPrefix(f"tensors differ in dtype ({', '.join(sorted(tags))})")
    sites = sorted({TENSOR_SITES[name] for name in shapes})
    return {site: _pair(site, shapes) for site in sites}, TAGS[tags.pop()]


def _shape(name: str, spec: TensorSpec) -> Shape:
    if name not in TENSOR_SITES:
        known = ", ".join(TENSOR_SITES)
        raise InvalidPrefix(f"unknown tensor {name[:200]!r}; known are {known}")
    if spec.tag not in TAGS:
        raise InvalidPrefix(
            f"{name} is {spec.tag[:40]}; accepted are {', '.join(TAGS)}", param=name
        )
    if len(spec.shape) != 4 or 0 in spec.shape:
        raise InvalidPrefix(
            f"{name} has shape {list(spec.shape)}; expected [L, H_kv, P, D], each at least 1",
            param=name,
        )
    layers, heads, tokens, dim = spec.shape
    return layers, heads, tokens, dim


def _pair(site: Site, shapes: Mapping[str, Shape]) -> Shape:
    key, value = shapes.get(f"{site}.key"), shapes.get(f"{site}.value")
    if key is None or value is None:
        missing = "key" if key is None else "value"
        raise InvalidPrefix(f"{site}.{missing} is missing", param=f"{site}.{missing}")
    if key[2] != value[2]:
        raise InvalidPrefix(
            f"{site}.key has {key[2]} virtual tokens but {site}.value has {value[2]}",
            param=f"{site}.value",
        )
    if key != value:
        raise InvalidPrefix(
            f"{site}.key is {list(key)} but {site}.value is {list(value)}", param=f"{site}.value"
        )
    return key


def _num_virtual_tokens(
    metadata: Mapping[str, str], sites: Mapping[Site, Shape], limits: Limits
) -> int:
    said = _count(metadata, "num_virtual_tokens")
    leading = next(site for site in get_args(Site) if site in sites)
    if sites[leading][2] != said:
        raise InvalidPrefix(
            f"metadata num_virtual_tokens is {said} but {leading} tensors are "
            f"{list(sites[leading])}",
            param="num_virtual_tokens",
        )
    for site, (_, _, tokens, _) in sites.items():
        if tokens > limits.max_virtual_tokens:
            raise InvalidPrefix(
                f"{site}: {tokens} virtual tokens, at most {limits.max_virtual_tokens} allowed",
                param="num_virtual_tokens",
            )
    return said


def _query_offset(metadata: Mapping[str, str], tokens: int) -> int:
    offset = _count(metadata, "query_offset")
    if offset not in (0, tokens):
        raise InvalidPrefix(
            f"metadata query_offset is {offset}; it must be 0 or num_virtual_tokens ({tokens})",
            param="query_offset",
        )
    return offset


def _count(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key)
    if text is None or not _COUNT.fullmatch(text):
        shown = "missing" if text is None else repr(text[:80])
        raise InvalidPrefix(f"metadata {key} is {shown}, expected a decimal integer", param=key)
    return int(text)


def _text(metadata: Mapping[str, str], key: str) -> str | None:
    text = metadata.get(key)
    if text is not None and not (1 <= len(text) <= _MAX_TEXT and text.isprintable()):
        raise InvalidPrefix(
            f"metadata {key} must be 1 to {_MAX_TEXT} printable characters", param=key
        )
    return text


def _source_format(metadata: Mapping[str, str]) -> str:
    source = metadata.get("source_format", FORMAT)
    if not _SOURCE_FORMAT.fullmatch(source):
        raise InvalidPrefix(
            f"metadata source_format {source[:80]!r} does not match {_SOURCE_FORMAT.pattern}",
            param="source_format",
        )
    return source


def _provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    raw = metadata.get("provenance", "{}").encode()
    if len(raw) > _MAX_PROVENANCE:
        raise InvalidPrefix(
            f"metadata provenance has {len(raw)} bytes, at most {_MAX_PROVENANCE} allowed",
            param="provenance",
        )
    return strict_json.loads(raw, what="metadata provenance")
