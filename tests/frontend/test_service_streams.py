"""What a stream of the frontend tells, over a real mailbox and SmolLM2's tokenizer.

The test plays the engine.
"""

from __future__ import annotations

import asyncio

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.frontend.calls import TextToken
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import Finish, FinishReason, Output, SamplingParams, Token
from tests.frontend.engines import HandEngine, started
from tests.frontend.support import EOS, Log, answer, call
from tests.frontend.tokenizers_ import byte_fallback


async def test_stream_ends_with_eos(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, log: Log
) -> None:
    stream = await frontend.open(call(request_id="req"))
    request = await engine.request()
    assert request.request_id.startswith("req-")
    assert (request.tenant, request.task, request.version) == ("acme", "e2e", None)
    assert list(request.prompt_token_ids) == codec.encode("Blue Spice is")[0]
    for output in answer(codec, request, " a café 🦥.", FinishReason.EOS):
        await engine.deliver(output)
    chunks = [chunk async for chunk in stream]
    assert [chunk.index for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert chunks[-1].token == TextToken(EOS, "", -0.5, special=True)
    completion = chunks[-1].completion
    assert completion is not None
    assert completion.text == "".join(chunk.token.text for chunk in chunks) == " a café 🦥."
    assert completion.finish_reason is FinishReason.EOS
    assert completion.tokens == tuple(chunk.token for chunk in chunks)
    assert (completion.version, completion.prefix_tokens) == (3, 20)
    assert (completion.prompt_tokens, completion.prefill) == (len(request.prompt_token_ids), ())
    assert completion.seed is None
    prompt, output = completion.prompt_tokens, len(chunks)
    assert log.finishes == [(FinishReason.EOS, prompt, output, "acme", "e2e")]
    assert (log.first_tokens, log.inter_tokens) == (1, output - 1)
    assert frontend.num_inflight == 0
    assert engine.aborted == []


async def test_half_a_character_at_the_length_limit_is_dropped(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    outputs = answer(codec, request, "ok 🦥", FinishReason.LENGTH)[:-1]
    last = Output(request.request_id, None, outputs[-1].tokens, Finish(FinishReason.LENGTH))
    await engine.deliver(*outputs[:-1], last)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].completion.text.strip() == "ok"
    assert chunks[-1].completion.finish_reason is FinishReason.LENGTH


async def test_stop_string_across_tokens(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, log: Log
) -> None:
    stream = await frontend.open(call(stop=("shop\n",)))
    request = await engine.request()
    outputs = answer(codec, request, " a coffee shop\n\nName: and more", FinishReason.LENGTH)
    for output in outputs:
        await engine.deliver(output)
    chunks = [chunk async for chunk in stream]
    completion = chunks[-1].completion
    assert completion.text == "".join(chunk.token.text for chunk in chunks) == " a coffee "
    assert completion.finish_reason is FinishReason.STOP
    assert len(chunks) < len(outputs)
    assert engine.aborted == [request.request_id]
    assert [finish[0] for finish in log.finishes] == [FinishReason.STOP]


async def test_a_stop_string_in_the_last_output_aborts_nothing(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call(stop=(" shop",)))
    request = await engine.request()
    await engine.deliver(*answer(codec, request, " a coffee shop", FinishReason.LENGTH))
    completion = [chunk async for chunk in stream][-1].completion
    assert (completion.text, completion.finish_reason) == (" a coffee", FinishReason.STOP)
    assert engine.aborted == []


async def test_text_held_for_a_stop_string_comes_with_the_last_token(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call(stop=(" shop now",)))
    request = await engine.request()
    await engine.deliver(*answer(codec, request, " a coffee shop", FinishReason.EOS))
    chunks = [chunk async for chunk in stream]
    assert [chunk.token.text for chunk in chunks] == [" a", " coffee", "", " shop"]
    assert chunks[-1].completion.text == " a coffee shop"


async def test_a_stop_token_has_no_text(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    await engine.deliver(*answer(codec, request, " coffee shop", FinishReason.STOP))
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].completion.text == " coffee"
    assert chunks[-1].completion.finish_reason is FinishReason.STOP
    assert chunks[-1].token.special


async def test_several_tokens_in_one_output(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call(stop=("|",)))
    request = await engine.request()
    tokens = tuple(Token(token_id, -1.0) for token_id in codec.encode(" a b | c d")[0])
    await engine.deliver(Output(request.request_id, started(request), tokens))
    assert [chunk.token.text for chunk in [chunk async for chunk in stream]] == [" a", " b", " "]


async def test_alternatives_and_prefill(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    sampling = SamplingParams(max_new_tokens=1, top_n_tokens=2, prompt_logprobs=True)
    stream = await frontend.open(call("Blue Spice", sampling=sampling))
    request = await engine.request()
    ids = request.prompt_token_ids
    logprobs = tuple(-float(i) for i in range(1, len(ids)))
    token = Token(codec.encode(" a")[0][0], -0.1, ((codec.encode(" the")[0][0], -0.1), (EOS, -3.0)))
    await engine.deliver(
        Output(
            request.request_id,
            started(request, prompt_logprobs=logprobs),
            (token,),
            Finish(FinishReason.LENGTH),
        )
    )
    (chunk,) = [chunk async for chunk in stream]
    assert [(top.text, top.logprob, top.special) for top in chunk.token.top] == [
        (" the", -0.1, False),
        ("<|im_end|>", -3.0, True),
    ]
    prefill = chunk.completion.prefill
    assert "".join(token.text for token in prefill) == "Blue Spice"
    assert [token.logprob for token in prefill] == [None, *logprobs]


async def test_prefill_after_a_prefix_has_all_logprobs(
    frontend: Frontend, engine: HandEngine
) -> None:
    sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=True)
    stream = await frontend.open(call(sampling=sampling))
    request = await engine.request()
    logprobs = tuple(-1.0 for _ in request.prompt_token_ids)
    start = started(request, prompt_logprobs=logprobs)
    token = (Token(100, -1.0),)
    await engine.deliver(Output(request.request_id, start, token, Finish(FinishReason.LENGTH)))
    chunk = await anext(stream)
    assert [token.logprob for token in chunk.completion.prefill] == list(logprobs)


async def test_the_first_token_keeps_its_space_after_the_prompt(
    mailbox: Mailbox, engine: HandEngine
) -> None:
    codec = TextCodec(byte_fallback())
    frontend = Frontend(mailbox, codec, max_model_len=128)
    frontend.attach(asyncio.get_running_loop())
    stream = await frontend.open(call("the quick"))
    request = await engine.request()
    assert request.leading_special_tokens == 1
    token = Token(codec.encode("fox")[0][1], -1.0)
    await engine.deliver(Output(request.request_id, started(request), (token,)))
    chunk = await anext(stream)
    assert chunk.token.text.startswith(" ")
    await stream.aclose()


async def test_a_slow_reader_gets_everything_in_order(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    await engine.deliver(*answer(codec, request, " one two three four", FinishReason.LENGTH))
    assert frontend.num_inflight == 0
    texts = []
    async for chunk in stream:
        await asyncio.sleep(0)
        texts.append(chunk.token.text)
    assert texts == [" one", " two", " three", " four"]


async def test_what_is_ready_is_taken_in_order_without_waiting(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    stream = await frontend.open(call())
    request = await engine.request()
    assert stream.ready(9) == []
    outputs = answer(codec, request, " one two three four", FinishReason.LENGTH)
    await engine.deliver(*outputs[:3])
    assert [chunk.token.text for chunk in stream.ready(2)] == [" one", " two"]
    await engine.deliver(*outputs[3:])
    assert [chunk.index for chunk in stream.ready(9)] == [3, 4]
    assert [chunk async for chunk in stream] == []
