"""What clients get wrong: a 4xx with a reason each, nothing left behind, the server serves on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.http.harness import Stack
from tests.http.refusals import check_refused, check_untouched

JSON = {"content-type": "application/json"}
OCTETS = {"content-type": "application/octet-stream"}


# --- generate: bodies that are JSON ---------------------------------------------------------------

PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": "10"}, "max_new_tokens"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"max_new_tokens": 2**70}, "max_new_tokens"),
    ({"min_new_tokens": 11, "max_new_tokens": 10}, "min_new_tokens"),
    ({"min_new_tokens": 101}, "min_new_tokens"),
    ({"do_sample": "true"}, "do_sample"),
    ({"do_sample": 1}, "do_sample"),
    ({"do_sample": False, "temperature": 0.5}, "temperature"),
    ({"do_sample": True, "temperature": 0}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": False}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 2}, "min_p"),
    ({"typical_p": 0}, "typical_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1.[key]"),
    ({"logit_bias": {"3": 101}}, "logit_bias.3"),
    ({"logit_bias": {"3": "1"}}, "logit_bias.3"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": -1, "do_sample": True}, "seed"),
    ({"seed": 2**63, "do_sample": True}, "seed"),
    ({"stop": "x"}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["x" * 257]}, "stop.0"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"n": 0}, "n"),
    ({"n": 17, "do_sample": True}, "n"),
    ({"n": 2}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"n": 4, "best_of": 2, "do_sample": True}, "best_of"),
    ({"truncate": 0}, "truncate"),
    ({"top_n_tokens": 5}, "top_n_tokens"),
    ({"top_n_tokens": 21, "details": True}, "top_n_tokens"),
    ({"decoder_input_details": True}, "decoder_input_details"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"timeout_s": -5}, "timeout_s"),
    ({"priority": 101}, "priority"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": 17}, "num_beams"),
    ({"num_beams": 2.0}, "num_beams"),
    ({"length_penalty": 1.0}, "length_penalty"),
    ({"num_beams": 1, "length_penalty": 1.0}, "length_penalty"),
    ({"num_beams": 2, "length_penalty": 11}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
    ({"num_beams": 2, "early_stopping": 1}, "early_stopping"),
    ({"num_beams": 2, "early_stopping": 0.0}, "early_stopping"),
    ({"num_beams": 2, "n": 3}, "n"),
    ({"num_beams": 2, "do_sample": True}, "do_sample"),
    ({"num_beams": 2, "temperature": 0.5}, "temperature"),
    ({"num_beams": 2, "top_k": 5}, "top_k"),
    ({"num_beams": 2, "top_p": 0.5}, "top_p"),
    ({"num_beams": 2, "min_p": 0.5}, "min_p"),
    ({"num_beams": 2, "typical_p": 0.5}, "typical_p"),
    ({"num_beams": 2, "best_of": 2}, "best_of"),
    ({"num_beams": 2, "top_n_tokens": 2, "details": True}, "top_n_tokens"),
    ({"num_beams": 2, "stop": ["x"]}, "stop"),
    ({"grammar": {"type": "json", "value": {}}}, "grammar"),
    ({"temprature": 0.5}, "temprature"),
    ({"x" * 5000: 1}, "x" * 188 + "…"),
]


@pytest.mark.parametrize(("parameters", "field"), PARAMETERS, ids=lambda case: str(case)[:50])
def test_parameters(
    client: httpx.Client, server: Stack, parameters: dict[str, Any], field: str
) -> None:
    before = len(server.engine.requests)
    body = {"inputs": "the quick brown fox", "parameters": parameters}
    answer = client.post("/v1/tasks/base/generate", json=body)
    check_refused(answer, 422, f"parameters.{field}")
    assert len(server.engine.requests) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ([], "body"),
        ("text", "body"),
        (None, "body"),
        ({"inputs": None}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": ["a", "b"]}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "stream": "yes"}, "stream"),
        ({"inputs": "x", "stream": 1}, "stream"),
        ({"inputs": "x", "model": "y"}, "model"),
        (
            {"inputs": "x", "stream": True, "parameters": {"n": 2, "do_sample": True}},
            "parameters.n",
        ),
        (
            {"inputs": "x", "stream": True, "parameters": {"best_of": 2, "do_sample": True}},
            "parameters.best_of",
        ),
        (
            {"inputs": "x", "stream": True, "parameters": {"num_beams": 2}},
            "parameters.num_beams",
        ),
        (
            {
                "inputs": "x",
                "stream": True,
                "parameters": {"details": True, "decoder_input_details": True},
            },
            "parameters.decoder_input_details",
        ),
    ],
    ids=lambda case: str(case)[:50],
)
def test_generate_bodies(client: httpx.Client, server: Stack, body: Any, param: str) -> None:
    answer = client.post("/v1/tasks/base/generate", content=json.dumps(body), headers=JSON)
    check_refused(answer, 422, param)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"{'inputs': 'x'}", 400),
        (b'{"inputs": "x"} trailing', 400),
        (b'{"inputs": "\xff\xfe"}', 400),
        ('{"inputs": "x"}'.encode("utf-16"), 400),
        (b'{"inputs": "x", "parameters": {"temperature": NaN}}', 400),
        (b'{"inputs": "x", "parameters": {"temperature": Infinity}}', 400),
        (b'{"inputs": "x", "parameters": {"temperature": 1e999}}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 100_000, 400),
        (b"[" * 50_000 + b"]" * 50_000, 400),
        (b'{"inputs": "\\ud800"}', 422),
        (b'{"inputs": "x", "\\udc00": 1}', 422),
        (b'{"inputs": "x", "parameters": {"seed": 1' + b"0" * 4000 + b"}}", 400),
        (b'{"inputs": "x", "y": ' + b"[" * 900 + b"]" * 900 + b"}", 422),
        (b'{"inputs": "x", "y": "' + b"z" * 1_000_000 + b'"}', 422),
    ],
    ids=lambda case: str(case)[:40],
)
def test_bytes_that_are_no_request(
    client: httpx.Client, server: Stack, body: bytes, status: int
) -> None:
    answer = client.post("/v1/tasks/base/generate", content=body, headers=JSON)
    check_refused(answer, status)
    check_untouched(server, client, "nothing")


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    answer = client.post("/v1/tasks/base/generate", json={"inputs": "xyz " * 1000})
    check_refused(answer, 400, "inputs")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_content_types(client: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    body = b'{"inputs": "x"}'
    check_refused(client.post("/v1/tasks/base/generate", content=body, headers=headers), 415)
    check_refused(client.put("/v1/tasks/a/prefix", content=body, headers=headers), 415)


# --- names, versions, queries ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Upper",
        "-dash",
        ".dot",
        "_x",
        "a b",
        "a%00b",
        "%2e%2e",
        "a" * 129,
        "caf%C3%A9",
        "a%0a",
        "a:b",
    ],
)
def test_names(client: httpx.Client, server: Stack, prefix: bytes, name: str) -> None:
    url = f"/v1/tasks/{name}"
    check_refused(client.get(url), 422, "task")
    check_refused(client.post(f"{url}/generate", json={"inputs": "x"}), 422, "task")
    check_refused(client.put(f"{url}/prefix", content=prefix, headers=OCTETS), 422, "task")
    check_refused(client.delete(url), 422, "task")
    assert client.get("/v1/tasks").json()["tasks"] == []


@pytest.mark.parametrize("version", ["", "0", "-1", "x", "1.0", "01", "1@2", "9" * 30])
def test_versions_in_a_name(client: httpx.Client, version: str) -> None:
    answer = client.post(f"/v1/tasks/a@{version}/generate", json={"inputs": "x"})
    check_refused(answer, 422, "task")


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.0", "01", "%201", "9" * 30])
def test_versions_in_a_path(client: httpx.Client, version: str) -> None:
    for path in (f"/v1/tasks/a/versions/{version}", f"/v1/tasks/a/versions/{version}/prefix"):
        check_refused(client.get(path), 422, "version")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/tasks?limit=0", "limit"),
        ("/v1/tasks?limit=1001", "limit"),
        ("/v1/tasks?limit=1.0", "limit"),
        ("/v1/tasks?limit=ten", "limit"),
        ("/v1/tasks?limit=1&limit=2", "limit"),
        ("/v1/tasks?prefix=A", "prefix"),
        ("/v1/tasks?cursor=", "cursor"),
        ("/v1/tasks?page=2", "page"),
        ("/v1/tasks/a?verbose=1", "verbose"),
        ("/v1/tasks/a/versions/1/prefix?format=pickle", "format"),
        ("/v1/info?x", "x"),
    ],
)
def test_queries(client: httpx.Client, path: str, param: str) -> None:
    check_refused(client.get(path + ("=" if path.endswith("?x") else "")), 422, param)


@pytest.mark.parametrize("activate", ["1", "yes", "True", ""])
def test_activate_is_true_or_false(client: httpx.Client, server: Stack, activate: str) -> None:
    answer = client.put(
        "/v1/tasks/a/prefix", params={"activate": activate}, content=b"x", headers=OCTETS
    )
    check_refused(answer, 422, "activate")


# --- changes of a task ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"version": 0},
        {"version": "1"},
        {"version": True},
        {"version": 1, "split": {"1": 1.0}},
        {"split": {}},
        {"split": {"1": 0.5}},
        {"split": {"1": 1.5, "2": -0.5}},
        {"split": {"1": 0, "2": 1}},
        {"split": {"one": 1.0}},
        {"split": {"01": 1.0}},
        {"versions": 1},
    ],
    ids=str,
)
def test_activations(client: httpx.Client, body: dict[str, Any]) -> None:
    check_refused(client.post("/v1/tasks/a/activate", json=body), 422)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body"),
        ({"description": None}, "description"),
        ({"description": "x" * 4097}, "description"),
        ({"pinned": "yes"}, "pinned"),
        ({"defaults": []}, "defaults"),
        ({"defaults": {"temperature": 1}}, "defaults.temperature"),
        ({"defaults": {"parameters": {"top_p": 5}}}, "defaults.parameters.top_p"),
        ({"defaults": {"parameters": {"grammar": {}}}}, "defaults.parameters.grammar"),
        (
            {"defaults": {"parameters": {"do_sample": False, "temperature": 1}}},
            "defaults.parameters.temperature",
        ),
        (
            {"defaults": {"parameters": {"stop_token_ids": [99999]}}},
            "defaults.parameters.stop_token_ids",
        ),
        ({"defaults": {"stop": [""]}}, "defaults.stop.0"),
        ({"active": 2}, "active"),
    ],
    ids=lambda case: str(case)[:60],
)
def test_patches(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    check_refused(client.patch("/v1/tasks/a", json=body), 422, param)


@pytest.mark.parametrize("text", ["", None, 5])
def test_compiles(client: httpx.Client, server: Stack, text: Any) -> None:
    check_refused(client.post("/v1/tasks/c/compile", json={"text": text}), 422, "text")
    check_untouched(server, client, "c")


def test_nothing_is_called_base(client: httpx.Client, server: Stack, prefix: bytes) -> None:
    answer = client.put("/v1/tasks/base/prefix", content=prefix, headers=OCTETS)
    check_refused(answer, 422, "task")
    check_refused(client.post("/v1/tasks/base/compile", json={"text": "x"}), 422, "task")
    check_untouched(server, client, "base")


@pytest.mark.parametrize(
    "headers", [{"if-none-match": '"x"'}, {"if-none-match": "*", "if-match": "*"}]
)
def test_conditions(client: httpx.Client, prefix: bytes, headers: dict[str, str]) -> None:
    answer = client.put("/v1/tasks/a/prefix", content=prefix, headers=OCTETS | headers)
    check_refused(answer, 422, "If-None-Match")


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/tasks/a/generate", "POST"),
        ("DELETE", "/v1/tasks", "GET"),
        ("POST", "/livez", "GET"),
        ("TRACE", "/v1/info", "GET"),
        ("POST", "/v1/tasks/a/prefix", "PUT"),
        ("PUT", "/v1/tasks/a", "DELETE, GET, PATCH"),
    ],
)
def test_methods(client: httpx.Client, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    check_refused(answer, 405)
    assert ", ".join(sorted(answer.headers["allow"].split(", "))) == allow
