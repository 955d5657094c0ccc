"""The request that the frontend makes of a call, or its refusal."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    Overloaded,
    PrefixdError,
    PromptTooLong,
)
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import SamplingParams
from tests.frontend.engines import HandEngine
from tests.frontend.support import call
from tests.frontend.tokenizers_ import byte_fallback


@pytest.mark.parametrize("truncate", [1, 3, 100])
async def test_truncate_keeps_the_last_tokens(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, truncate: int
) -> None:
    prompt = "one two three four five"
    async with await frontend.open(call(prompt, truncate=truncate)):
        ids = (await engine.request()).prompt_token_ids
    assert list(ids) == codec.encode(prompt)[0][-truncate:]


async def test_truncate_makes_a_long_prompt_fit_and_drops_the_bos(
    mailbox: Mailbox, engine: HandEngine
) -> None:
    frontend = Frontend(mailbox, TextCodec(byte_fallback()), max_model_len=40)
    frontend.attach(asyncio.get_running_loop())
    async with await frontend.open(call("fox " * 2000, truncate=8)):
        request = await engine.request()
    assert len(request.prompt_token_ids) == 8
    assert request.leading_special_tokens == 0


async def test_a_reused_request_id_is_no_problem(frontend: Frontend, engine: HandEngine) -> None:
    first, second = [await frontend.open(call(request_id="same")) for _ in range(2)]
    ids = {(await engine.request(i)).request_id for i in range(2)}
    assert len(ids) == 2
    await first.aclose()
    await second.aclose()
    engine.look()
    assert set(engine.aborted) == ids


async def test_deadline_and_priority(frontend: Frontend, engine: HandEngine) -> None:
    before = time.monotonic()
    async with await frontend.open(call(timeout_s=7.0, priority=-5)):
        request = await engine.request()
    assert before + 7.0 <= request.deadline <= time.monotonic() + 7.0
    assert (request.priority, request.deadline) == (-5, request.arrival + 7.0)


@pytest.mark.parametrize(
    ("changes", "kind", "param", "words"),
    [
        ({"prompt": ""}, InvalidRequest, "inputs", "empty"),
        ({"prompt": "a\udc00"}, InvalidRequest, "inputs", "U\\+DC00"),
        ({"prompt": "a " * 200}, PromptTooLong, "inputs", "201 tokens.* 32 make 233.* 128"),
        ({"prompt": "a b " * 1500}, PromptTooLong, "inputs", "3001 tokens.* 128"),
        (
            {"sampling": SamplingParams(max_new_tokens=128)},
            PromptTooLong,
            "inputs",
            "max_new_tokens 128 make",
        ),
        (
            {"sampling": SamplingParams(max_new_tokens=1, logit_bias=((49152, 1.0),))},
            InvalidRequest,
            "parameters.logit_bias",
            "token 49152; the model knows 0 … 49151",
        ),
        (
            {"sampling": SamplingParams(max_new_tokens=1, stop_token_ids=frozenset([-1]))},
            InvalidRequest,
            "parameters.stop_token_ids",
            "token -1",
        ),
    ],
)
async def test_refused(
    frontend: Frontend,
    engine: HandEngine,
    changes: dict[str, Any],
    kind: type[PrefixdError],
    param: str,
    words: str,
) -> None:
    with pytest.raises(kind, match=words) as raised:
        await frontend.open(call(**changes))
    assert raised.value.param == param
    engine.look()
    assert engine.requests == []
    assert frontend.num_inflight == 0


async def test_tokens_that_the_model_does_not_have(mailbox: Mailbox, codec: TextCodec) -> None:
    frontend = Frontend(mailbox, codec, max_model_len=128, vocab_size=1000)
    frontend.attach(asyncio.get_running_loop())
    with pytest.raises(InvalidRequest, match="the model knows 0 … 999"):
        await frontend.open(call("antidisestablishmentarianism"))


async def test_prompt_and_output_may_fill_the_context(
    frontend: Frontend, engine: HandEngine
) -> None:
    sampling = SamplingParams(max_new_tokens=28)
    async with await frontend.open(call(" a" * 100, sampling=sampling)):
        assert len((await engine.request()).prompt_token_ids) == 100


async def test_a_full_queue_takes_all_or_nothing(
    frontend: Frontend, engine: HandEngine, mailbox: Mailbox
) -> None:
    streams = [await frontend.open(call()) for _ in range(6)]
    with pytest.raises(Overloaded):
        await frontend.complete(call(n=3, best_of=3))
    assert frontend.num_inflight == 6
    engine.look()
    assert len(engine.requests) == 6
    for stream in streams:
        await stream.aclose()


@pytest.mark.parametrize("reason", [Draining, EngineDead])
async def test_closed(
    frontend: Frontend, mailbox: Mailbox, reason: type[Draining] | type[EngineDead]
) -> None:
    mailbox.close(reason)
    with pytest.raises(reason):
        await frontend.open(call())
    assert await frontend.join(0)
