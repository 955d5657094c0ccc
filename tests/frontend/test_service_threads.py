"""The frontend against an engine in a thread of its own, many requests at once."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from typing import Any

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import DeadlineExceeded
from prefixd_server.frontend.calls import Call
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import EngineRequest, FinishReason, SamplingParams, Token
from tests.frontend.engines import ScriptedEngine

EOS = 2


def make(codec: TextCodec, mailbox: Mailbox) -> Frontend:
    frontend = Frontend(mailbox, codec, max_model_len=200_000)
    frontend.attach(asyncio.get_running_loop())
    return frontend


def call(prompt: str, **changes: Any) -> Call:
    return Call("acme", "e2e", 1, prompt, SamplingParams(max_new_tokens=100_000), **changes)


async def test_every_request_gets_its_own_text_in_order(codec: TextCodec) -> None:
    def echo(request: EngineRequest) -> Iterator[Token]:
        return (Token(token_id, -1.0) for token_id in (*request.prompt_token_ids, EOS))

    async def streamed(frontend: Frontend, prompt: str) -> str:
        async with await frontend.open(call(prompt)) as stream:
            chunks = [chunk async for chunk in stream]
        assert [chunk.index for chunk in chunks] == list(range(1, len(chunks) + 1))
        assert chunks[-1].completion.finish_reason is FinishReason.EOS
        return "".join(chunk.token.text for chunk in chunks)

    async def whole(frontend: Frontend, prompt: str) -> str:
        texts = {found.text for found in await frontend.complete(call(prompt, n=2, best_of=2))}
        return texts.pop() if len(texts) == 1 else "differ"

    chance = random.Random(0)
    words = [" fox", " café", " 日本語", " 🦥", "\n", " e\u0301"]
    # Some are long enough to be tokenised in a thread, so answers overtake each other.
    prompts = [
        f"{i}:" + "".join(chance.choices(words, k=9)) + " internationally" * chance.choice([0, 150])
        for i in range(40)
    ]
    mailbox = Mailbox(256)
    frontend = make(codec, mailbox)
    with ScriptedEngine(mailbox, echo) as engine:
        ways = itertools.cycle([streamed, whole])
        got = await asyncio.gather(*(next(ways)(frontend, prompt) for prompt in prompts))
        assert await frontend.join(60)
    assert got == prompts
    assert engine.most_at_once > 1
    assert not engine.aborted


async def test_endless_requests_end_when_their_client_leaves(codec: TextCodec) -> None:
    def endless(request: EngineRequest) -> Iterator[Token]:
        return itertools.repeat(Token(request.prompt_token_ids[-1], -1.0))

    async def leave_after(frontend: Frontend, count: int) -> None:
        async with await frontend.open(call("fox")) as stream:
            async for chunk in stream:
                if chunk.index == count:
                    return

    mailbox = Mailbox(64)
    frontend = make(codec, mailbox)
    with ScriptedEngine(mailbox, endless) as engine:
        await asyncio.gather(*(leave_after(frontend, count) for count in range(1, 20)))
        assert frontend.num_inflight == 0
        # In the order of the mailbox the aborts come first: when this one ends, they are done.
        await frontend.complete(call("x", stop=("xxx",)))
    assert len(engine.aborted) >= 19
    assert engine.num_running <= 1


async def test_errors_reach_their_own_client_only(codec: TextCodec) -> None:
    def some_fail(request: EngineRequest) -> Iterator[Token]:
        yield Token(request.prompt_token_ids[0], -1.0)
        if len(request.prompt_token_ids) == 1:
            raise DeadlineExceeded("late")
        yield Token(EOS, -1.0)

    mailbox = Mailbox(64)
    frontend = make(codec, mailbox)
    calls = [call("fox" if i % 3 else "fox fox") for i in range(30)]
    with ScriptedEngine(mailbox, some_fail):
        results = await asyncio.gather(*map(frontend.complete, calls), return_exceptions=True)
    for i, result in enumerate(results):
        assert isinstance(result, DeadlineExceeded) if i % 3 else result[0].text == "fox"
