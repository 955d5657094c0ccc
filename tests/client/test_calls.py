"""Every call of both clients, against what arrives at the server."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import prefixd
from prefixd import AsyncClient, Client, ConflictError, NotFoundError
from prefixd import _calls as calls
from tests.client.server import TEXT, Server


@pytest.fixture
async def aclient(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, timeout=10) as client:
        yield client


def test_generate(client: Client, server: Server) -> None:
    server.add_version("e2e", b"a")
    answer = client.generate("e2e", "hi", max_new_tokens=4, details=True, stop=["\n"], seed=None)
    assert (answer.generated_text, answer.task, answer.version) == (TEXT, "e2e", 1)
    assert answer.usage.prefix_tokens == 20
    assert answer.details is not None
    assert [token.text for token in answer.details.tokens] == [
        " Blue",
        " Spice",
        "\u2028is",
        " café",
    ]
    (seen,) = server.seen
    assert seen.json == {
        "inputs": "hi",
        "parameters": {"max_new_tokens": 4, "details": True, "stop": ["\n"]},
        "stream": False,
    }


def test_generate_several_sequences(client: Client, server: Server) -> None:
    server.add_version("e2e", b"a")
    answer = client.generate("e2e", "hi", n=2, logit_bias={42: -1.5})
    assert [sequence.generated_text for sequence in answer.sequences or []] == [
        f"{TEXT} 0",
        f"{TEXT} 1",
    ]
    assert server.seen[0].json["parameters"] == {"n": 2, "logit_bias": {"42": -1.5}}


@pytest.mark.parametrize(("name", "version"), [("e2e@1", None), ("e2e", 1)])
def test_generate_with_a_version(
    client: Client, server: Server, name: str, version: int | None
) -> None:
    server.add_version("e2e", b"a")
    server.add_version("e2e", b"b")
    assert client.generate("e2e", "hi").version == 2
    assert client.generate(name, "hi", version=version).version == 1
    with client.stream(name, "hi", version=version) as events:
        assert [event.version for event in events][-1] == 1


def test_what_every_request_carries(server: Server) -> None:
    with Client(server.url + "/", api_key="secret") as client:
        client.live()
    headers = server.seen[0].headers
    assert headers["authorization"] == "Bearer secret"
    assert headers["user-agent"] == f"prefixd/{prefixd.__version__}"
    assert server.seen[0].path == "/livez"


def test_tasks_follows_the_pages(client: Client, server: Server) -> None:
    for name in ("a1", "a2", "a3", "b1"):
        server.add_version(name, name.encode())
    assert [task.task for task in client.tasks()] == ["a1", "a2", "a3", "b1"]
    assert [seen.query.get("cursor") for seen in server.seen] == [None, "a2"]
    assert [task.task for task in client.tasks("a")] == ["a1", "a2", "a3"]
    assert list(client.tasks("zzz")) == []


def test_task_and_version(client: Client, server: Server) -> None:
    server.add_version("e2e", b"a")
    task = client.task("e2e")
    assert (task.active, task.split, task.etag) == (1, {1: 1.0}, server.etag("e2e"))
    assert task.versions == [client.version("e2e", 1)]
    assert task.versions[0].sites == {"decoder": [30, 3, 20, 64]}
    assert task.created_at.utcoffset() is not None
    with pytest.raises(NotFoundError):
        client.task("other")
    with pytest.raises(NotFoundError):
        client.version("e2e", 7)


def test_activate_and_split(client: Client, server: Server) -> None:
    for data in (b"a", b"b"):
        server.add_version("e2e", data)
    assert client.activate("e2e", 1).active == 1
    assert server.seen[-1].json == {"version": 1}
    task = client.activate("e2e", split={1: 0.75, 2: 0.25})
    assert server.seen[-1].json == {"split": {"1": 0.75, "2": 0.25}}
    assert task.split == {1: 0.75, 2: 0.25}


@pytest.mark.parametrize("quoted", [True, False])
def test_if_match_guards_against_lost_updates(client: Client, server: Server, quoted: bool) -> None:
    server.add_version("e2e", b"a")
    etag = client.task("e2e").etag
    assert etag is not None
    etag = etag if quoted else etag.strip('"')
    changed = client.update("e2e", description="mine", if_match=etag)
    with pytest.raises(ConflictError):
        client.update("e2e", description="late", if_match=etag)
    with pytest.raises(ConflictError):
        client.activate("e2e", 1, if_match=etag)
    with pytest.raises(ConflictError):
        client.delete("e2e", if_match=etag)
    assert changed.etag != etag
    assert client.update("e2e", pinned=True, if_match=changed.etag).description == "mine"
    client.delete("e2e", if_match="*")


def test_update_sends_only_what_is_given(client: Client, server: Server) -> None:
    server.add_version("e2e", b"a")
    task = client.update("e2e", pinned=False, defaults={"parameters": {"top_k": 3}})
    assert server.seen[-1].json == {"pinned": False, "defaults": {"parameters": {"top_k": 3}}}
    assert task.defaults == {"parameters": {"top_k": 3}}


def test_delete(client: Client, server: Server) -> None:
    for data in (b"a", b"b"):
        server.add_version("e2e", data)
    with pytest.raises(ConflictError, match="takes traffic"):
        client.delete_version("e2e", 2)
    client.delete_version("e2e", 1)
    assert [version.version for version in client.task("e2e").versions] == [2]
    client.delete("e2e")
    assert server.tasks == {}


def test_compile(client: Client, server: Server) -> None:
    result = client.compile("faq", "Long text é", activate=False)
    assert (result.version, result.created) == (1, True)
    assert server.seen[0].query == {"activate": "false"}
    assert server.seen[0].json == {"text": "Long text é"}


def test_health_is_an_answer(client: Client, server: Server) -> None:
    assert client.live().ok
    assert client.ready().status == "ready"
    server.ready = "draining"
    health = client.ready()
    assert (health.ok, health.status) == (False, "draining")
    assert len(server.seen) == 3  # the 503 was not tried again


def test_info_and_metrics(client: Client, server: Server) -> None:
    info = client.info()
    assert (info.version, info.model.name, info.model.max_model_len) == ("9.9", "a/model", 2048)
    assert info.cache is not None
    assert info.cache.free_pages == 90
    assert client.metrics() == "prefixd_swaps_total 3\n"


async def test_async_calls(aclient: AsyncClient, server: Server, folder: Path) -> None:
    assert (await aclient.push("e2e", folder)).version == 1
    assert (await aclient.compile("faq", "text")).created
    assert (await aclient.generate("e2e", "hi", top_k=3)).generated_text == TEXT
    assert [task.task async for task in aclient.tasks()] == ["e2e", "faq"]
    assert (await aclient.task("e2e")).versions == [await aclient.version("e2e", 1)]
    assert (await aclient.activate("e2e", 1)).active == 1
    assert (await aclient.update("e2e", description="d")).description == "d"
    assert (await aclient.info()).version == "9.9"
    assert (await aclient.ready()).ok
    assert (await aclient.live()).ok
    assert "prefixd" in await aclient.metrics()
    with pytest.raises(ConflictError):
        await aclient.delete_version("e2e", 1)
    await aclient.delete("e2e")
    with pytest.raises(NotFoundError):
        await aclient.task("e2e")


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(kind).items()
            if not name.startswith("_") and name not in ("close", "aclose")
        }

    assert public(Client) == public(AsyncClient)
    assert len(public(Client)) == 16


def test_methods_show_the_parameters_they_take() -> None:
    signature = inspect.signature(Client.activate)
    assert list(signature.parameters) == ["self", "task", "version", "split", "if_match"]
    assert signature.return_annotation == "Task"
    assert Client.activate.__doc__ == calls.activate.__doc__
    for name, method in vars(Client).items():
        if not name.startswith("_") and name != "close":
            assert method.__doc__, name


def test_the_package_is_typed() -> None:
    assert (Path(prefixd.__file__).parent / "py.typed").exists()
