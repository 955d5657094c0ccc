from __future__ import annotations

import re

import httpx
import pytest
from starlette.responses import HTMLResponse, JSONResponse, Response

import prefixd
from prefixd import APIError, Client, InvalidArgumentError, PrefixdError, ServerError
from prefixd._errors import STATUS_ERRORS
from tests.client.server import Server, error


def test_all_is_what_the_package_exports() -> None:
    from prefixd import _errors, _models

    exported = {name for name in vars(prefixd) if not name.startswith("_")} - {"cli"}
    assert set(prefixd.__all__) == exported | {"__version__"}
    assert prefixd.__all__ == sorted(prefixd.__all__)
    classes = {name for name in _errors.__all__ if isinstance(getattr(_errors, name), type)}
    assert classes <= set(prefixd.__all__)
    assert set(_models.__all__) - {"TaskPage"} <= set(prefixd.__all__)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: dict[int, str] = {}
    for line in (PrefixdError.__doc__ or "").splitlines():
        if match := re.match(r"^( *(?:[│├└─ ]*))(\w+(?:Error))\b", line):
            depth = len(match[1])
            parents = [path[d] for d in sorted(path) if d < depth]
            path = {d: name for d, name in path.items() if d < depth} | {depth: match[2]}
            if parents:
                drawn[match[2]] = parents[-1]
    real = {
        name: value.__bases__[0].__name__
        for name, value in vars(prefixd).items()
        if isinstance(value, type) and issubclass(value, PrefixdError) and value is not PrefixdError
    }
    assert drawn == real


@pytest.mark.parametrize("status", [*STATUS_ERRORS, 405, 418, 500, 502])
def test_status_chooses_the_class(client: Client, server: Server, status: int) -> None:
    # Over patience_s, so that 429 and 503 are not tried again.
    server.script.append(error(status, "no", {"retry-after": "3600"}))
    with pytest.raises(APIError) as caught:
        client.info()
    raised = caught.value
    fallback = ServerError if status >= 500 else APIError
    assert type(raised) is STATUS_ERRORS.get(status, fallback)
    assert str(raised) == raised.message == "no"
    assert (raised.status, raised.type, raised.code) == (status, "some_error", "some_code")
    assert (raised.param, raised.request_id, raised.retry_after) == ("some.param", "req-1", 3600.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HTMLResponse("<h1>Bad gateway</h1>", 502), "502 Bad Gateway"),
        (JSONResponse({"error": "as TGI says it", "error_type": "x"}, 500), "as TGI says it"),
        (JSONResponse({"detail": "no error"}, 500), "500 Internal Server Error"),
        (JSONResponse(["error"], 500), "500 Internal Server Error"),
        (Response(status_code=500), "500 Internal Server Error"),
    ],
)
def test_error_bodies_of_any_shape(
    client: Client, server: Server, answer: Response, message: str
) -> None:
    server.script.append(answer)
    with pytest.raises(ServerError, match=message):
        client.info()


@pytest.mark.parametrize("answer", [HTMLResponse("<h1>Hello</h1>"), JSONResponse({"version": 3})])
def test_a_success_that_is_not_ours(client: Client, server: Server, answer: Response) -> None:
    server.script.append(answer)
    with pytest.raises(prefixd.InvalidResponseError, match=r"/v1/info: .* not a ServerInfo"):
        client.info()


@pytest.mark.parametrize(
    "name", ["", "..", "../livez", "a/b", "A", "a b", "a?x", "é", "a" * 129, "a\n", "-a"]
)
def test_names_that_would_change_the_url_are_never_sent(
    client: Client, server: Server, name: str
) -> None:
    with pytest.raises(InvalidArgumentError, match="does not match"):
        client.task(name)
    with pytest.raises(InvalidArgumentError, match="does not match"):
        client.generate(name, "x")
    assert server.seen == []


def test_arguments_refused_before_anything_is_sent(client: Client, server: Server) -> None:
    with pytest.raises(InvalidArgumentError, match="expected one version"):
        client.generate("e2e@3", "x", version=4)
    with pytest.raises(InvalidArgumentError, match="expected one version"):
        client.generate("e2e@", "x")
    with pytest.raises(InvalidArgumentError, match="either a version or a split"):
        client.activate("e2e")
    with pytest.raises(InvalidArgumentError, match="either a version or a split"):
        client.activate("e2e", 1, split={1: 1.0})
    with pytest.raises(InvalidArgumentError, match="/v1/tasks/e2e/generate"):
        client.generate("e2e", "x", temperature=float("nan"))
    with pytest.raises(InvalidArgumentError, match="http://"):
        Client("localhost:8000")
    with pytest.raises(InvalidArgumentError, match="api_key"):
        Client(api_key="a\nb")
    assert server.seen == []


def test_connection_errors_keep_their_cause(waits: list[float]) -> None:
    with (
        Client("http://127.0.0.1:1", max_retries=0) as client,
        pytest.raises(
            prefixd.APIConnectionError, match=r"GET http://127.0.0.1:1/v1/info"
        ) as caught,
    ):
        client.info()
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert waits == []
