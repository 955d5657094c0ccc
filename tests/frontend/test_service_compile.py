"""A prompt compiled to keys and values, through the frontend."""

from __future__ import annotations

import asyncio

import pytest

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import DeadlineExceeded, InvalidRequest, PrefixdError, PromptTooLong
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import CompileOutput, Finish, FinishReason, Output
from tests.frontend.engines import HandEngine, started
from tests.frontend.support import Log, error_of
from tests.frontend.tokenizers_ import byte_fallback


async def test_compile(mailbox: Mailbox, engine: HandEngine, log: Log) -> None:
    codec = TextCodec(byte_fallback())
    frontend = Frontend(mailbox, codec, max_model_len=128, observer=log)
    frontend.attach(asyncio.get_running_loop())
    task = asyncio.ensure_future(frontend.compile("acme", "the lazy dog", timeout_s=5.0))
    request = await engine.request()
    assert request.capture_kv
    assert (request.tenant, request.task, request.sampling.max_new_tokens) == ("acme", None, 0)
    assert list(request.prompt_token_ids) == codec.encode("the lazy dog")[0]
    kv = CompileOutput((1, 1, len(request.prompt_token_ids), 2), "float32", b"k", b"v")
    finish = Finish(FinishReason.LENGTH, compiled=kv)
    await engine.deliver(Output(request.request_id, started(request), finish=finish))
    assert await task == (kv, 1)
    assert [finish[0] for finish in log.finishes] == [FinishReason.LENGTH]


async def test_a_failed_compile(frontend: Frontend, engine: HandEngine) -> None:
    task = asyncio.ensure_future(frontend.compile("acme", "the lazy dog", timeout_s=5.0))
    await engine.deliver(error_of(await engine.request(), DeadlineExceeded("too late")))
    with pytest.raises(DeadlineExceeded, match="too late"):
        await task


@pytest.mark.parametrize(("text", "kind"), [("", InvalidRequest), ("a " * 200, PromptTooLong)])
async def test_compile_refuses(frontend: Frontend, text: str, kind: type[PrefixdError]) -> None:
    with pytest.raises(kind) as raised:
        await frontend.compile("acme", text, timeout_s=5.0)
    assert raised.value.param == "text"
