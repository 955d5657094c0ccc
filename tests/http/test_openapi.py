"""The generated document: every route, every failure, an example for every body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

ROUTES = {
    ("post", "/v1/tasks/{task}/generate"),
    ("put", "/v1/tasks/{task}/prefix"),
    ("get", "/v1/tasks"),
    ("get", "/v1/tasks/{task}"),
    ("patch", "/v1/tasks/{task}"),
    ("delete", "/v1/tasks/{task}"),
    ("get", "/v1/tasks/{task}/versions/{version}"),
    ("delete", "/v1/tasks/{task}/versions/{version}"),
    ("get", "/v1/tasks/{task}/versions/{version}/prefix"),
    ("post", "/v1/tasks/{task}/activate"),
    ("post", "/v1/tasks/{task}/compile"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
    ("get", "/v1/info"),
}


@pytest.fixture
def document(client: httpx.Client) -> Any:
    return client.get("/openapi.json").json()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_openapi_has_every_route(document: Any, client: httpx.Client) -> None:
    assert {(method, path) for method, path, _ in operations(document)} == ROUTES
    assert client.get("/docs").status_code == 200


def test_openapi_documents_every_failure_in_our_shape(document: Any) -> None:
    for _, path, operation in operations(document):
        assert operation["summary"]
        failures = {s: r for s, r in operation["responses"].items() if int(s) >= 400}
        if path.startswith("/v1/tasks"):
            assert {"422", "503"} <= failures.keys()
            for response in failures.values():
                content = response["content"]["application/json"]
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
                assert content["example"]["error"]["message"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_openapi_bodies_have_examples(document: Any) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation and method != "put":
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            name = schema["$ref"].rpartition("/")[2]
            assert document["components"]["schemas"][name]["examples"], path
            assert document["components"]["schemas"][name]["additionalProperties"] is False
