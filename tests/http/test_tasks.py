"""Tasks and versions over HTTP: show, list, activate, change, delete, and the ETags between."""

from __future__ import annotations

from pathlib import Path

import httpx

from prefixd_server.errors import StoreUnavailable
from tests.http.harness import FINGERPRINT, Stack, prefix_file

OCTETS = {"content-type": "application/octet-stream"}


def put(client: httpx.Client, task: str, content: bytes, **query: str) -> httpx.Response:
    url = f"/v1/tasks/{task}/prefix"
    return client.put(url, content=content, headers=OCTETS, params=query)


def test_show_a_task(client: httpx.Client, task: str, prefix: bytes) -> None:
    answer = client.get(f"/v1/tasks/{task}")
    assert answer.status_code == 200
    assert answer.headers["etag"].startswith('"')
    body = answer.json()
    (version,) = body.pop("versions")
    assert body.pop("created_at").endswith("Z")
    assert body.pop("updated_at").endswith("Z")
    assert body == {
        "task": task,
        "description": "",
        "pinned": False,
        "defaults": {},
        "active": 1,
        "split": {"1": 1.0},
        "requests_running": 0,
    }
    assert version.pop("created_at").endswith("Z")
    assert len(version.pop("sha256")) == 64
    assert version == {
        "task": task,
        "version": 1,
        "num_virtual_tokens": 5,
        "query_offset": 5,
        "sites": {"decoder": [3, 2, 5, 16]},
        "dtype": "float32",
        "format": "prefixd",
        "bytes": len(prefix),
        "base_fingerprint": FINGERPRINT,
        "base_model": "tiny",
        "verified": True,
        "provenance": {},
        "weight": 1.0,
        "residency": "stored",
    }
    assert client.get(f"/v1/tasks/{task}/versions/1").json()["bytes"] == len(prefix)


def test_what_is_not_there_is_404(client: httpx.Client, task: str) -> None:
    for path in (f"/v1/tasks/{task}-2", f"/v1/tasks/{task}/versions/9", "/v1/nothing", "/"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert client.delete(f"/v1/tasks/{task}-2").status_code == 404
    assert client.delete(f"/v1/tasks/{task}/versions/9").status_code == 404
    activate = client.post(f"/v1/tasks/{task}-2/activate", json={"version": 1})
    assert activate.status_code == 404


def test_list_is_paged(client: httpx.Client, prefix: bytes) -> None:
    names = [f"page-{i}" for i in range(5)]
    for name in names:
        put(client, name, prefix)
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        params = {"prefix": "page-", "limit": "2", **cursor}
        page = client.get("/v1/tasks", params=params).json()
        found += [task["task"] for task in page["tasks"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == names


def test_activate_and_split(client: httpx.Client, task: str, tmp_path: Path) -> None:
    put(client, task, prefix_file(tmp_path, shift=1), activate="false")
    assert client.get(f"/v1/tasks/{task}").json()["active"] == 1
    answer = client.post(f"/v1/tasks/{task}/activate", json={"version": 2})
    assert (answer.status_code, answer.json()["split"]) == (200, {"2": 1.0})
    split = {"split": {"1": 0.75, "2": 0.25}}
    body = client.post(f"/v1/tasks/{task}/activate", json=split).json()
    assert (body["active"], body["split"]) == (1, split["split"])
    assert [version["weight"] for version in body["versions"]] == [0.75, 0.25]
    missing = client.post(f"/v1/tasks/{task}/activate", json={"version": 3})
    assert missing.status_code == 404


def test_if_match_guards_every_change(client: httpx.Client, task: str) -> None:
    old = client.get(f"/v1/tasks/{task}").headers["etag"]
    patch = client.patch(f"/v1/tasks/{task}", json={"pinned": True}, headers={"if-match": old})
    assert (patch.status_code, patch.json()["pinned"]) == (200, True)
    assert patch.headers["etag"] != old
    stale = {"if-match": old}
    url = f"/v1/tasks/{task}"
    for answer in (
        client.patch(url, json={"pinned": False}, headers=stale),
        client.post(f"{url}/activate", json={"version": 1}, headers=stale),
        client.post(f"{url}/compile", json={"text": "the dog"}, headers=stale),
        client.put(f"{url}/prefix", content=_other(client, task), headers=stale | OCTETS),
        client.delete(f"{url}/versions/1", headers=stale),
        client.delete(url, headers=stale),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "conflict_error")
    assert client.delete(url, headers={"if-match": patch.headers["etag"]}).status_code == 204


def _other(client: httpx.Client, task: str) -> bytes:
    return client.get(f"/v1/tasks/{task}/versions/1/prefix").content


def test_patch_replaces_only_what_it_names(client: httpx.Client, task: str) -> None:
    url = f"/v1/tasks/{task}"
    defaults = {"parameters": {"temperature": 0.5}, "stop": ["\n"]}
    client.patch(url, json={"description": "one", "defaults": defaults})
    body = client.patch(url, json={"pinned": True}).json()
    assert (body["description"], body["pinned"], body["defaults"]) == ("one", True, defaults)
    assert client.patch(url, json={"defaults": {}}).json()["defaults"] == {}


def test_a_chat_template_is_the_models_or_refused(client: httpx.Client, task: str) -> None:
    """This model has none, and a client's own would be a program to run."""
    for template in ("model", "{{ messages }}"):
        answer = client.patch(f"/v1/tasks/{task}", json={"defaults": {"chat_template": template}})
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "defaults.chat_template"
    assert client.get(f"/v1/tasks/{task}").json()["defaults"] == {}


def test_delete_a_version(client: httpx.Client, task: str, tmp_path: Path) -> None:
    put(client, task, prefix_file(tmp_path, shift=1))
    refused = client.delete(f"/v1/tasks/{task}/versions/2")
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "conflict_error")
    gone = client.delete(f"/v1/tasks/{task}/versions/1")
    assert (gone.status_code, gone.content) == (204, b"")
    versions = client.get(f"/v1/tasks/{task}").json()["versions"]
    assert [version["version"] for version in versions] == [2]


def test_delete_a_task(client: httpx.Client, task: str) -> None:
    assert client.delete(f"/v1/tasks/{task}").status_code == 204
    assert client.get(f"/v1/tasks/{task}").status_code == 404
    answer = client.post(f"/v1/tasks/{task}/generate", json={"inputs": "the"})
    assert answer.status_code == 404


def test_a_store_that_fails_is_503(
    client: httpx.Client, task: str, server: Stack, monkeypatch: object
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise StoreUnavailable("the store does not answer")

    kept = server.store.update_task
    server.store.update_task = broken  # type: ignore[method-assign, assignment]
    try:
        answer = client.patch(f"/v1/tasks/{task}", json={"pinned": True})
    finally:
        server.store.update_task = kept  # type: ignore[method-assign]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "store_unavailable"
