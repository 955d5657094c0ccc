"""Uploads that are damaged, hostile or misshapen: refused with a reason, nothing left behind."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from prefixd_server.config import Config, LimitsConfig
from prefixd_store.format import parse_prefix
from tests.http.harness import GEOMETRY, Stack, running, stack
from tests.http.refusals import check_refused, check_untouched
from tests.prefixd_store.checkpoints import raw_file

OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    config = Config(limits=LimitsConfig(max_virtual_tokens=64, max_upload_bytes=1 << 20))
    with stack(tmp_path_factory.mktemp("server"), config) as parts, running(parts.app) as url:
        yield parts, url


# --- uploads: octets ------------------------------------------------------------------------------


class Damage(NamedTuple):
    name: str
    content: bytes
    status: int = 422


def _tensors(shape: list[int], dtype: str = "F32", *, tokens: int = 5, **extra: Any) -> bytes:
    size = int(np.prod(shape)) * {"F32": 4, "F64": 8, "I64": 8, "BOOL": 1}[dtype]
    header = {
        "__metadata__": {
            "format": "prefixd",
            "format_version": "1",
            "num_virtual_tokens": str(tokens),
            "query_offset": str(tokens),
            **extra,
        },
        "decoder.key": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]},
        "decoder.value": {"dtype": dtype, "shape": shape, "data_offsets": [size, 2 * size]},
    }
    return raw_file(header, bytes(2 * size))


def _with_value(prefix: bytes, value: float) -> bytes:
    content = bytearray(prefix)
    parse_prefix(content).arrays["decoder.value"].data[1, 1, 2, 3] = value
    return bytes(content)


def _damages(prefix: bytes) -> list[Damage]:
    g = GEOMETRY
    layers, heads, dim = g.num_layers, g.num_kv_heads, g.head_dim
    return [
        Damage("empty", b""),
        Damage("seven bytes", b"1234567"),
        Damage("noise", bytes(range(256)) * 20),
        Damage("pickle", pickle.dumps({"a": [1, 2, 3]})),
        Damage("zip", b"PK\x03\x04" + bytes(500)),
        Damage("json", b'{"decoder.key": []}'),
        Damage("truncated data", prefix[:-1]),
        Damage("truncated header", prefix[:100]),
        Damage("bytes after the end", prefix + b"\0"),
        Damage("header past the end", (1 << 40).to_bytes(8, "little") + prefix[8:]),
        Damage("negative header", b"\xff" * 8 + prefix[8:]),
        Damage("oversized header", raw_file(b"{" + b" " * 900_000 + b"}" + b" " * 200_000), 413),
        Damage("header is no JSON", raw_file(b"{nope}  ")),
        Damage("header is a list", raw_file([])),
        Damage("header bomb", raw_file(b"[" * 100_000)),
        Damage("header is not UTF-8", raw_file(b'{"\xff": 1}')),
        Damage("no tensors", raw_file({"__metadata__": {"format": "prefixd"}})),
        Damage("no metadata", raw_file({"decoder.key": {}})),
        Damage("float64", _tensors([layers, heads, 5, dim], "F64")),
        Damage("integers", _tensors([layers, heads, 5, dim], "I64")),
        Damage("booleans", _tensors([layers, heads, 5, dim], "BOOL")),
        Damage("one layer too many", _tensors([layers + 1, heads, 5, dim])),
        Damage("heads", _tensors([layers, heads * 2, 5, dim])),
        Damage("width", _tensors([layers, heads, 5, dim + 1])),
        Damage("three dimensions", _tensors([layers, heads, 5])),
        Damage("zero tokens", _tensors([layers, heads, 0, dim], tokens=0)),
        Damage("tokens disagree", _tensors([layers, heads, 5, dim], tokens=6)),
        Damage("too many tokens", _tensors([layers, heads, 65, dim], tokens=65)),
        Damage("query offset", _tensors([layers, heads, 5, dim], query_offset="3")),
        Damage("another model", _tensors([layers, heads, 5, dim], base_fingerprint="other")),
        Damage("future version", _tensors([layers, heads, 5, dim], format_version="9")),
        Damage("unknown format", _tensors([layers, heads, 5, dim], format="pt")),
        Damage("NaN", _with_value(prefix, float("nan"))),
        Damage("infinity", _with_value(prefix, float("-inf"))),
    ]


def test_damaged_files(
    client: httpx.Client, server: Stack, prefix: bytes, subtests: pytest.Subtests
) -> None:
    for damage in _damages(prefix):
        with subtests.test(damage.name):
            url = "/v1/tasks/damaged/prefix"
            answer = client.put(url, content=damage.content, headers=OCTETS)
            check_refused(answer, damage.status)
            check_untouched(server, client, "damaged")


# --- uploads: multipart ---------------------------------------------------------------------------


def part(
    content: bytes, disposition: str = 'form-data; name="f"; filename="a.safetensors"'
) -> bytes:
    return b"--B\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


END = b"--B--\r\n"
MULTIPART = [
    ("empty", b"", 400),
    ("no parts", END, 422),
    ("no boundary in it", b"hello", 400),
    ("another boundary", part(b"x").replace(b"--B", b"--C") + b"--C--\r\n", 400),
    ("ends in a header", b"--B\r\nContent-Dispo", 400),
    ("ends in a part", part(b"x")[:-2], 400),
    ("no last boundary", part(b"x"), 400),
    ("header without a colon", b"--B\r\nnonsense\r\n\r\nx\r\n" + END, 400),
    ("endless header", b"--B\r\nX: " + b"y" * 100_000, 400),
    ("many headers", b"--B\r\n" + b"X: y\r\n" * 1000, 400),
    ("no disposition", b"--B\r\nX: y\r\n\r\nx\r\n" + END, 422),
    ("a field, not a file", part(b"x", 'form-data; name="f"') + END, 422),
    ("no name", part(b"x", 'form-data; name="f"; filename=""') + END, 422),
    ("path", part(b"x", 'form-data; name="f"; filename="../../etc/passwd"') + END, 422),
    ("absolute", part(b"x", 'form-data; name="f"; filename="/etc/passwd"') + END, 422),
    ("dots", part(b"x", 'form-data; name="f"; filename=".."') + END, 422),
    ("null", part(b"x", 'form-data; name="f"; filename="a\0b"') + END, 422),
    ("long name", part(b"x", f'form-data; name="f"; filename="{"n" * 300}"') + END, 422),
    ("twice", part(b"x") + part(b"x") + END, 422),
    (
        "seventeen",
        b"".join(part(b"x", f'form-data; name="f"; filename="{i}"') for i in range(17)) + END,
        422,
    ),
    ("pickle", part(b"x", 'form-data; name="f"; filename="adapter_model.bin"') + END, 422),
    ("no checkpoint", part(b"x", 'form-data; name="f"; filename="README.md"') + END, 422),
    ("noise", part(b"\0" * 5000) + END, 422),
    (
        "half a checkpoint",
        part(b'{"peft_type": "PREFIX_TUNING"}', 'form-data; filename="adapter_config.json"') + END,
        422,
    ),
    (
        "config bomb",
        part(b"[" * 100_000, 'form-data; filename="adapter_config.json"') + END,
        422,
    ),
    ("too large", part(b"x" * (1 << 20)) + END, 413),
]


@pytest.mark.parametrize(
    ("content", "status"), [case[1:] for case in MULTIPART], ids=[case[0] for case in MULTIPART]
)
def test_multipart(client: httpx.Client, server: Stack, content: bytes, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=B"}
    check_refused(client.put("/v1/tasks/parts/prefix", content=content, headers=headers), status)
    check_untouched(server, client, "parts")


@pytest.mark.parametrize("options", ["", "; boundary=", f"; boundary={'b' * 300}"])
def test_multipart_boundaries(client: httpx.Client, server: Stack, options: str) -> None:
    headers = {"content-type": f"multipart/form-data{options}"}
    answer = client.put("/v1/tasks/parts/prefix", content=part(b"x") + END, headers=headers)
    check_refused(answer, 400)
    check_untouched(server, client, "parts")
