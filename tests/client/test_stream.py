from __future__ import annotations

import asyncio

import pytest

from prefixd import AsyncClient, Client, NotFoundError, StreamError
from tests.client.server import TEXT, TOKENS, Server


def test_a_stream_gives_every_token_then_the_whole(client: Client, server: Server) -> None:
    server.add_version("e2e", b"a")
    with client.stream("e2e", "hi", temperature=0.5) as stream:
        events = list(stream)
    assert [event.text for event in events] == TOKENS  # one holds U+2028, another é
    assert [event.final for event in events] == [False, False, False, True]
    last = events[-1]
    assert (last.generated_text, last.task, last.version) == (TEXT, "e2e", 1)
    assert last.details is not None
    assert last.details.finish_reason == "eos_token"
    assert last.usage is not None
    assert last.usage.total_tokens == 7
    assert server.seen[0].json == {
        "inputs": "hi",
        "parameters": {"temperature": 0.5},
        "stream": True,
    }


def test_nothing_is_sent_until_it_is_asked_for(client: Client, server: Server) -> None:
    client.stream("e2e", "hi").close()
    assert server.seen == []


def test_an_error_before_the_first_event(client: Client, server: Server) -> None:
    with pytest.raises(NotFoundError):
        next(client.stream("e2e", "hi"))


@pytest.mark.parametrize(
    ("task", "message", "type"),
    [
        ("broken", "page fault", "server_error"),
        ("cut", "ended before its last event", "stream_error"),
        ("reset", "the stream broke", "connection_error"),
        ("garbled", "unreadable event '<html>'", "stream_error"),
    ],
)
def test_failures_after_the_first_event(client: Client, task: str, message: str, type: str) -> None:
    stream = client.stream(task, "hi")
    assert next(stream).text == " Blue"
    with pytest.raises(StreamError, match=message) as caught:
        next(stream)
    assert (caught.value.type, caught.value.text) == (type, " Blue")
    assert next(stream, None) is None


def test_leaving_the_block_ends_the_request(client: Client, server: Server) -> None:
    with client.stream("endless", "hi") as stream:
        next(stream)
        next(stream)
        assert not server.disconnected.is_set()
    assert server.disconnected.wait(10)
    assert client.live().ok  # and the client goes on


async def test_async_streams(server: Server) -> None:
    server.add_version("e2e", b"a")
    async with AsyncClient(server.url) as client:
        async with client.stream("e2e", "hi") as stream:
            assert [event.text async for event in stream] == TOKENS
        with pytest.raises(NotFoundError):
            await anext(client.stream("other", "hi"))
        for task in ("broken", "cut", "reset", "garbled"):
            stream = client.stream(task, "hi")
            assert (await anext(stream)).text == " Blue"
            with pytest.raises(StreamError) as caught:
                await anext(stream)
            assert caught.value.text == " Blue"
        async with client.stream("endless", "hi") as stream:
            await anext(stream)
        assert await asyncio.to_thread(server.disconnected.wait, 10)
