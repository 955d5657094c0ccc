"""How a stream of the frontend ends but by its last token: errors, aborts, deadlines, shutdown."""

from __future__ import annotations

import asyncio

import pytest

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    NotFound,
    PrefixdError,
    Unavailable,
)
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import Finish, FinishReason, Output, Token
from tests.frontend.engines import HandEngine
from tests.frontend.support import Log, answer, call, error_of


async def test_an_error_before_the_first_token(
    frontend: Frontend, engine: HandEngine, log: Log
) -> None:
    stream = await frontend.open(call())
    await engine.deliver(error_of(await engine.request(), NotFound("no task e2e")))
    with pytest.raises(NotFound, match="no task e2e"):
        await anext(stream)
    assert [chunk async for chunk in stream] == []
    assert [finish[0] for finish in log.finishes] == [FinishReason.ERROR]
    assert frontend.num_inflight == 0


async def test_an_error_after_tokens_comes_after_them(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    tokens = answer(codec, request, " a b", FinishReason.LENGTH)[:1]
    await engine.deliver(*tokens, error_of(request, DeadlineExceeded("too late")))
    assert (await anext(stream)).token.text == " a"
    with pytest.raises(DeadlineExceeded, match="too late"):
        await anext(stream)


async def test_aborted_by_the_engine_is_an_error(frontend: Frontend, engine: HandEngine) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    await engine.deliver(Output(request.request_id, finish=Finish(FinishReason.ABORTED)))
    with pytest.raises(Unavailable, match="aborted"):
        await anext(stream)


async def test_aclose_aborts_at_once_and_once(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, log: Log
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    outputs = answer(codec, request, " a b c", FinishReason.LENGTH)
    await engine.deliver(outputs[0])
    await stream.aclose()
    engine.look()
    assert engine.aborted == [request.request_id]
    await stream.aclose()
    await engine.deliver(*outputs[1:])
    assert engine.aborted == [request.request_id]
    assert [chunk async for chunk in stream] == []
    assert [finish[:3:2] for finish in log.finishes] == [(FinishReason.ABORTED, 1)]


async def test_leaving_the_block_aborts(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    async with await frontend.open(call()) as stream:
        request = await engine.request()
        await engine.deliver(answer(codec, request, " a b c", FinishReason.LENGTH)[0])
        assert (await anext(stream)).token.text == " a"
    engine.look()
    assert engine.aborted == [request.request_id]


async def test_leaving_after_the_end_aborts_nothing(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    async with await frontend.open(call()) as stream:
        request = await engine.request()
        await engine.deliver(*answer(codec, request, " a", FinishReason.LENGTH))
        assert len([chunk async for chunk in stream]) == 1
    engine.look()
    assert engine.aborted == []


async def test_cancelling_a_reader_aborts(frontend: Frontend, engine: HandEngine) -> None:
    stream = await frontend.open(call())
    reader = asyncio.ensure_future(anext(stream))
    request = await engine.request()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    engine.look()
    assert engine.aborted == [request.request_id]
    assert frontend.num_inflight == 0


async def test_closing_wakes_a_waiting_reader(frontend: Frontend, engine: HandEngine) -> None:
    stream = await frontend.open(call())
    reader = asyncio.ensure_future(anext(stream, None))
    await engine.request()
    await stream.aclose()
    assert await reader is None


async def test_an_engine_that_does_not_answer(
    frontend: Frontend, engine: HandEngine, log: Log
) -> None:
    stream = await frontend.open(call(timeout_s=0.01))
    request = await engine.request()
    with pytest.raises(DeadlineExceeded):
        await anext(stream)
    engine.look()
    assert engine.aborted == [request.request_id]
    assert [finish[0] for finish in log.finishes] == [FinishReason.ERROR]


async def test_an_engine_that_died_without_a_word(
    frontend: Frontend, mailbox: Mailbox, engine: HandEngine
) -> None:
    stream = await frontend.open(call(timeout_s=0.01))
    mailbox.close(EngineDead)
    with pytest.raises(EngineDead):
        await anext(stream)


async def test_fail_all_from_another_thread(frontend: Frontend, engine: HandEngine) -> None:
    streams = [await frontend.open(call()) for _ in range(3)]
    await asyncio.to_thread(frontend.fail_all, EngineDead("the engine has stopped"))
    for stream in streams:
        with pytest.raises(EngineDead, match="has stopped"):
            await anext(stream)
    assert frontend.num_inflight == 0


async def test_abort_all(frontend: Frontend, engine: HandEngine) -> None:
    streams = [await frontend.open(call()) for _ in range(2)]
    request = await engine.request(1)
    frontend.abort_all()
    engine.look()
    assert len(engine.aborted) == 2
    assert request.request_id in engine.aborted
    for stream in streams:
        with pytest.raises(Draining):
            await anext(stream)


async def test_join_waits_for_the_last_request(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    assert await frontend.join(0)
    stream = await frontend.open(call())
    assert not await frontend.join(0)
    waiting = asyncio.ensure_future(frontend.join(60))
    request = await engine.request()
    await engine.deliver(*answer(codec, request, " a", FinishReason.LENGTH))
    assert await waiting
    assert (await anext(stream)).completion is not None


async def test_a_bug_in_one_request_spares_the_others(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = await frontend.open(call()), await frontend.open(call())
    first, second = await engine.request(0), await engine.request(1)
    no_start = Output(first.request_id, None, (Token(5, 0.0),), Finish(FinishReason.LENGTH))
    await engine.deliver(no_start, *answer(codec, second, " a", FinishReason.LENGTH))
    with pytest.raises(PrefixdError, match="internal error"):
        await anext(broken)
    assert (await anext(whole)).completion.text == " a"
    assert first.request_id in caplog.text


async def test_outputs_after_the_loop_has_closed_do_not_hurt_the_engine(codec: TextCodec) -> None:
    mailbox = Mailbox(8)
    loop = asyncio.new_event_loop()
    Frontend(mailbox, codec, max_model_len=128).attach(loop)
    loop.close()
    mailbox.deliver([Output("gone", finish=Finish(FinishReason.ABORTED))])
