"""Schemathesis over the live OpenAPI document: what it describes is what the server does.

Its engine sends valid, invalid and boundary requests to every operation, follows what it created,
and checks each answer's status, content type, headers and body against the document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.config import (
    GenerationConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.engine import events, from_schema

from prefixd import Client
from tests.support.server import LiveServer

MAX_EXAMPLES = 10

REFUSED_ALL_THE_SAME = {
    "PUT /v1/tasks/{task}/prefix": "bytes that are no prefix; If-None-Match other than *",
    "POST /v1/tasks/{task}/compile": "If-None-Match other than *",
    "POST /v1/tasks/{task}/generate": "fields that contradict one another; 1.0 for an integer",
    "PATCH /v1/tasks/{task}": "fields that contradict one another; 1.0 for an integer",
    "POST /v1/tasks/{task}/activate": "weights that do not sum to 1; 1.0 for an integer",
}
"""What is valid by a schema's words may still be refused, with 400 or 422, for these reasons."""


class Finding(NamedTuple):
    operation: str
    check: str
    message: str
    curl: str


class Run(NamedTuple):
    findings: list[Finding]
    statuses: dict[str, set[int]]
    """of each operation's answers"""


@pytest.fixture
def run(live: LiveServer, client: Client, prefixes: list[Path]) -> Run:
    # The document's own examples name version 3 of the task e2e.
    for prefix in prefixes[:3]:
        client.push("e2e", prefix)
    return fuzz(f"{live.url}/openapi.json")


def fuzz(url: str) -> Run:
    generation = GenerationConfig(
        modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
        max_examples=MAX_EXAMPLES,
        deterministic=True,
        database="none",
        no_shrink=True,
    )
    project = ProjectConfig(generation=generation)
    config = SchemathesisConfig(seed=1, projects=ProjectsConfig(default=project))
    run = Run([], defaultdict(set))
    for event in from_schema(schemathesis.openapi.from_url(url, config=config)).execute():
        assert not isinstance(event, events.FatalError | events.NonFatalError), event
        if isinstance(event, events.ScenarioFinished):
            _note_statuses(event.recorder, run)
            run.findings.extend(_findings(event.recorder))
    return run


def _note_statuses(recorder: Any, run: Run) -> None:
    for case_id, interaction in recorder.interactions.items():
        if interaction.response is not None:
            operation = recorder.cases[case_id].value.operation.label
            run.statuses[operation].add(interaction.response.status_code)


def _findings(recorder: Any) -> Iterator[Finding]:
    for case_id, checks in recorder.checks.items():
        response = recorder.interactions[case_id].response
        for check in checks:
            if check.failure_info is None:
                continue
            if _is_fine(check.name, recorder.cases[case_id].value, response):
                continue
            failure = check.failure_info.failure
            message = f"{failure.title}: {failure.message}"
            yield Finding(failure.operation, check.name, message, check.failure_info.code_sample)


def _is_fine(check: str, case: Any, response: Any) -> bool:
    if check == "positive_data_acceptance":
        return case.operation.label in REFUSED_ALL_THE_SAME and response.status_code in (400, 422)
    # A deadline that the client itself named is kept: 504, or 503 while the prefix is loading.
    return (
        check == "not_a_server_error"
        and "timeout_s" in str(case.body)
        and "request's deadline" in response.text
    )


def test_the_document_and_the_server_agree(run: Run, client: Client, prefixes: list[Path]) -> None:
    assert not run.findings, "\n\n".join("\n".join(finding) for finding in run.findings)

    assert len(run.statuses) == 15
    for operation, statuses in run.statuses.items():
        # Random bytes are never a prefix; all else must have been seen to work.
        assert statuses & {200, 201, 204} or operation.startswith("PUT "), operation
        assert statuses <= {200, 201, 204, 400, 404, 405, 409, 413, 415, 422, 503, 504}, operation

    client.push("after", prefixes[3])
    assert client.generate("after", "It still serves", max_new_tokens=4).version == 1
