"""Prefixes in and out: octets, multipart, compile, download; bounded, nothing left over."""

from __future__ import annotations

import hashlib
import io
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from peft import PeftModel, PrefixTuningConfig

from prefixd_server.config import Config, LimitsConfig
from tests.http.harness import Stack, prefix_file, running, stack, wait_until
from tests.prefixd_store.checkpoints import save_peft, tiny_model

OCTETS = {"content-type": "application/octet-stream"}
LIMIT = 200_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    config = Config(limits=LimitsConfig(max_upload_bytes=LIMIT, max_body_bytes=5000))
    with stack(tmp_path_factory.mktemp("server"), config) as parts, running(parts.app) as url:
        yield parts, url


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    save_peft(folder)
    return folder


def test_octets(client: httpx.Client, prefix: bytes) -> None:
    answer = client.put("/v1/tasks/octets/prefix", content=prefix, headers=OCTETS)
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert body.pop("created_at").endswith("Z")
    assert body == {
        "task": "octets",
        "version": 1,
        "sha256": hashlib.sha256(prefix).hexdigest(),
        "num_virtual_tokens": 5,
        "sites": {"decoder": [3, 2, 5, 16]},
        "format": "prefixd",
        "bytes": len(prefix),
        "active": True,
    }
    assert answer.headers["location"] == "/v1/tasks/octets/versions/1"
    assert answer.headers["etag"] == client.get("/v1/tasks/octets").headers["etag"]


def test_the_same_bytes_again(client: httpx.Client, task: str, prefix: bytes) -> None:
    answer = client.put(f"/v1/tasks/{task}/prefix", content=prefix, headers=OCTETS)
    assert (answer.status_code, answer.json()["version"]) == (200, 1)


def test_what_peft_saved(client: httpx.Client, checkpoint: Path) -> None:
    files = [("anything", (path.name, path.read_bytes())) for path in sorted(checkpoint.iterdir())]
    answer = client.put("/v1/tasks/peft/prefix", files=files, params={"activate": "false"})
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert (body["format"], body["num_virtual_tokens"]) == ("peft/prefix_tuning", 7)
    assert body["active"] is False


def test_peft_comes_back_and_loads(client: httpx.Client, checkpoint: Path, tmp_path: Path) -> None:
    files = [("f", (path.name, path.read_bytes())) for path in sorted(checkpoint.iterdir())]
    client.put("/v1/tasks/round/prefix", files=files)
    answer = client.get("/v1/tasks/round/versions/1/prefix", params={"format": "peft"})
    assert answer.headers["content-type"] == "application/zip"
    assert int(answer.headers["content-length"]) == len(answer.content)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    config = PrefixTuningConfig.from_pretrained(tmp_path)
    assert config.num_virtual_tokens == 7
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_download(client: httpx.Client, task: str, prefix: bytes) -> None:
    answer = client.get(f"/v1/tasks/{task}/versions/1/prefix")
    assert answer.content == prefix
    assert answer.headers["content-length"] == str(len(prefix))
    assert answer.headers["etag"] == f'"{hashlib.sha256(prefix).hexdigest()}"'
    assert answer.headers["content-disposition"] == f'attachment; filename="{task}-1.safetensors"'
    assert client.get(f"/v1/tasks/{task}/versions/2/prefix").status_code == 404


def test_a_torn_blob_is_not_served(client: httpx.Client, server: Stack, tmp_path: Path) -> None:
    client.put("/v1/tasks/torn/prefix", content=prefix_file(tmp_path, shift=5), headers=OCTETS)
    sha256 = client.get("/v1/tasks/torn/versions/1").json()["sha256"]
    (blob,) = server.store.root.rglob(f"{sha256}*")
    blob.write_bytes(blob.read_bytes()[:-1])
    answer = client.get("/v1/tasks/torn/versions/1/prefix")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "corrupt_blob")


def test_create_only(client: httpx.Client, task: str, prefix: bytes) -> None:
    headers = OCTETS | {"if-none-match": "*"}
    taken = client.put(f"/v1/tasks/{task}/prefix", content=prefix, headers=headers)
    assert taken.status_code == 409
    free = client.put(f"/v1/tasks/{task}-2/prefix", content=prefix, headers=headers)
    assert free.status_code == 201


def test_if_match_star_wants_the_task_to_exist(client: httpx.Client, prefix: bytes) -> None:
    headers = OCTETS | {"if-match": "*"}
    answer = client.put("/v1/tasks/not-there-yet/prefix", content=prefix, headers=headers)
    assert answer.status_code == 409
    assert client.get("/v1/tasks/not-there-yet").status_code == 404


def test_compile(client: httpx.Client) -> None:
    answer = client.post("/v1/tasks/compiled/compile", json={"text": "the quick brown fox"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["format"] == "compiled"
    version = client.get("/v1/tasks/compiled/versions/1").json()
    assert version["query_offset"] == version["num_virtual_tokens"] > 0
    assert version["verified"] is True
    assert (
        version["provenance"]["text_sha256"] == hashlib.sha256(b"the quick brown fox").hexdigest()
    )
    again = client.post("/v1/tasks/compiled/compile", json={"text": "the quick brown fox"})
    assert (again.status_code, again.json()["version"]) == (200, 1)


def test_a_text_longer_than_the_context(client: httpx.Client) -> None:
    answer = client.post("/v1/tasks/long/compile", json={"text": "xyz " * 1000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert client.get("/v1/tasks/long").status_code == 404


def _chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("announced", [True, False])
def test_an_upload_over_the_limit(client: httpx.Client, announced: bool) -> None:
    content: Any = b"x" * (LIMIT + 1) if announced else _chunks(4 * LIMIT)
    answer = client.put("/v1/tasks/big/prefix", content=content, headers=OCTETS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert answer.headers["connection"] == "close"
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_json_body_over_the_limit(client: httpx.Client, announced: bool) -> None:
    body = b'{"inputs": "' + b"x" * 20_000 + b'"}'
    content: Any = body if announced else iter([body[:100], body[100:]])
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/tasks/base/generate", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_client_that_leaves_while_sending(client: httpx.Client, server: Stack) -> None:
    where = urlsplit(str(client.base_url))
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 0)) as connection:
        connection.sendall(
            b"PUT /v1/tasks/left/prefix HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"
            b"content-type: application/octet-stream\r\n\r\n" + b"x" * 5000
        )
        wait_until(lambda: bool(server.spooled))
    wait_until(lambda: not server.spooled)
    assert client.get("/v1/tasks/left").status_code == 404


def test_a_failed_publish_leaves_nothing(
    client: httpx.Client, server: Stack, prefix: bytes
) -> None:
    headers = OCTETS | {"if-match": '"no-such-etag"'}
    answer = client.put("/v1/tasks/never/prefix", content=prefix, headers=headers)
    assert answer.status_code == 409
    assert server.spooled == []
