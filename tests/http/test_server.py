"""What surrounds the routes: health, info, ids, log, error table."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from prefixd_server import errors as server_errors
from prefixd_server.config import Config, HttpConfig
from prefixd_server.errors import EngineDead, PrefixdError
from prefixd_server.http import errors as http_errors
from prefixd_server.http.errors import error_body, error_response, kind_of
from prefixd_server.http.logging import setup_logging
from tests.http.harness import FINGERPRINT, Stack, running, stack, wait_until

GENERATE = {"inputs": "the quick brown fox", "parameters": {"max_new_tokens": 3}}


# --- health and info ------------------------------------------------------------------------------


def test_health(client: httpx.Client, server: Stack) -> None:
    assert (client.get("/livez").json(), client.get("/readyz").json()) == (
        {"status": "ok"},
        {"status": "ready"},
    )


def test_a_dead_engine(client: httpx.Client, server: Stack) -> None:
    server.mailbox.close(EngineDead)
    try:
        for path in ("/livez", "/readyz"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "engine_dead"})
        refused = client.post("/v1/tasks/base/generate", json=GENERATE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    finally:
        server.mailbox._closed = None


def test_draining(client: httpx.Client, server: Stack) -> None:
    server.services.draining = True
    try:
        assert client.get("/readyz").json() == {"status": "draining"}
        assert client.get("/livez").status_code == 200
        assert client.get("/metrics").status_code == 200
        refused = client.get("/v1/tasks")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"]
    finally:
        server.services.draining = False


def test_a_store_that_is_away(tmp_path: Path) -> None:
    with stack(tmp_path) as parts, running(parts.app) as url:
        parts.services.registry.close()
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "store_unavailable"})
        assert httpx.post(f"{url}/v1/tasks/base/generate", json=GENERATE).status_code == 200


def test_info(client: httpx.Client) -> None:
    body = client.get("/v1/info").json()
    assert body.keys() == {"version", "model", "limits", "cache"}
    assert body["model"] == {
        "name": "tiny",
        "fingerprint": FINGERPRINT,
        "architecture": "LlamaForCausalLM",
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "encoder": None,
        "max_model_len": 512,
        "dtype": "float32",
        "device": "cpu",
    }
    assert body["cache"] == {"page_size": 16, "num_pages": 100, "free_pages": 75}
    assert body["limits"]["max_queue"] == 1024


def test_the_base_model_can_be_forbidden(tmp_path: Path) -> None:
    config = Config(http=HttpConfig(serve_base=False))
    with stack(tmp_path, config) as parts, running(parts.app) as url:
        answer = httpx.post(f"{url}/v1/tasks/base/generate", json=GENERATE)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


# --- request ids and the log ----------------------------------------------------------------------


def test_request_ids(client: httpx.Client) -> None:
    given = client.get("/livez", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    ids = {client.get("/v1/nothing").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    for bad in ("x" * 129, "a b", ""):
        answer = client.get("/livez", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"] != bad
    # A control character in a header is no HTTP at all.
    assert client.get("/livez", headers={"x-request-id": "\x7f"}).status_code == 400


def test_one_line_a_request(
    client: httpx.Client, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "prefixd.access"):
        headers = {"x-request-id": "the-one"}
        client.post(f"/v1/tasks/{task}/generate", json=GENERATE, headers=headers)
        # The client has its answer a moment before the line is written.
        wait_until(lambda: bool(_records(caplog)))
    (record,) = _records(caplog)
    fields = {key: record.__dict__[key] for key in _FIELDS}
    assert fields == {
        "method": "POST",
        "route": "/v1/tasks/{task}/generate",
        "path": f"/v1/tasks/{task}/generate",
        "status": 200,
        "tenant": "default",
        "task": task,
        "version": 1,
        "prompt_tokens": fields["prompt_tokens"],
        "completion_tokens": 3,
    }
    assert record.__dict__["duration_ms"] > 0


def _records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if getattr(r, "request_id", "") == "the-one"]


_FIELDS = (
    "method",
    "route",
    "path",
    "status",
    "tenant",
    "task",
    "version",
    "prompt_tokens",
    "completion_tokens",
)


@pytest.fixture
def _keep_logging() -> Iterator[None]:
    import structlog

    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = False
    structlog.configure(**config)


@pytest.mark.usefixtures("_keep_logging")
def test_logs_are_json_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    setup_logging("json", "info")
    structlog.get_logger("ours").info("hello", number=5)
    logging.getLogger("theirs").warning("from %s", "logging")
    logging.getLogger("theirs").debug("too small")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["logger"], line["level"], line["event"]) for line in lines] == [
        ("ours", "info", "hello"),
        ("theirs", "warning", "from logging"),
    ]
    assert lines[0]["number"] == 5


# --- errors ---------------------------------------------------------------------------------------


def test_an_unexpected_error_is_a_bare_500_and_one_record(
    client: httpx.Client,
    server: Stack,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(server.services, "pool", broken)
    answer = client.get("/v1/info")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    logged = [record for record in caplog.records if record.exc_info]
    assert [type(record.exc_info[1]) for record in logged if record.exc_info] == [ZeroDivisionError]
    assert client.get("/livez").status_code == 200


STATUSES = {
    "ClientDisconnected": 499,
    "Conflict": 409,
    "CorruptBlob": 503,
    "DeadlineExceeded": 504,
    "Draining": 503,
    "EngineDead": 503,
    "InvalidPrefix": 422,
    "InvalidRequest": 422,
    "Malformed": 400,
    "MethodNotAllowed": 405,
    "NotFound": 404,
    "Overloaded": 429,
    "PrefixdError": 500,
    "PromptTooLong": 400,
    "RouteUnknown": 404,
    "StoreUnavailable": 503,
    "TooLarge": 413,
    "Unavailable": 503,
    "UnsupportedMediaType": 415,
    "UnsupportedModel": 500,
}


def test_the_table_has_every_error() -> None:
    ours = {
        cls
        for module in (server_errors, http_errors)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, PrefixdError)
    }
    assert {cls.__name__: kind_of(cls("x")).status for cls in ours} == STATUSES


def test_a_body_is_bounded_and_can_be_encoded() -> None:
    error = PrefixdError("\ud800" + "x" * 10_000, param="p" * 10_000)
    assert error_body(error)["error"]["message"].startswith("internal error")
    answer = error_response(server_errors.InvalidRequest("\ud800" + "x" * 10_000, param="p" * 999))
    body = json.loads(bytes(answer.body))["error"]
    assert body["message"].startswith("\\ud800x")
    assert len(body["message"]) < 2100
    assert len(body["param"]) == 200
