from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import structlog

from tests.http.harness import Stack, prefix_file, running, stack


@pytest.fixture(scope="session", autouse=True)
def _logs_through_logging() -> None:
    """structlog prints by default, and pytest swaps the stream under the server's thread."""
    structlog.configure(
        processors=[structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    with stack(tmp_path_factory.mktemp("server")) as parts, running(parts.app) as url:
        yield parts, url


@pytest.fixture
def server(served: tuple[Stack, str]) -> Iterator[Stack]:
    """The module's server; whatever a test did, it must leave nothing running or lying about."""
    parts, _ = served
    yield parts
    parts.engine.release()
    parts.engine.fail_with = None
    parts.engine.burst = 1
    assert parts.spooled == []


@pytest.fixture
def client(server: Stack, served: tuple[Stack, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[1], timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return prefix_file(tmp_path_factory.mktemp("prefix"))


@pytest.fixture
def task(client: httpx.Client, prefix: bytes, request: pytest.FixtureRequest) -> str:
    """A task of this test's own, with one active version."""
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:100]
    headers = {"content-type": "application/octet-stream"}
    answer = client.put(f"/v1/tasks/{name}/prefix", content=prefix, headers=headers)
    assert answer.status_code in (200, 201), answer.text
    return name
