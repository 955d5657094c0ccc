"""What every refusal has in common."""

from __future__ import annotations

import httpx

from tests.http.harness import Stack


def check_refused(answer: httpx.Response, status: int, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert 0 < len(error["message"]) <= 2000
    assert "Traceback" not in answer.text
    if param is not None:
        assert error["param"] == param


def check_untouched(server: Stack, client: httpx.Client, task: str) -> None:
    assert server.spooled == []
    assert client.get(f"/v1/tasks/{task}").status_code == 404
    assert not list((server.store.root / "tmp").iterdir())
    alive = client.post(
        "/v1/tasks/base/generate", json={"inputs": "fox", "parameters": {"max_new_tokens": 1}}
    )
    assert alive.status_code == 200
