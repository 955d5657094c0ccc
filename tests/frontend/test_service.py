"""The frontend over a real mailbox and SmolLM2's tokenizer; the test plays the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    InvalidRequest,
    NotFound,
    Overloaded,
    PrefixdError,
    PromptTooLong,
    Unavailable,
)
from prefixd_server.frontend.calls import Call, TextToken
from prefixd_server.frontend.flights import NoObserver
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import (
    BeamParams,
    CompileOutput,
    EngineRequest,
    Finish,
    FinishReason,
    Hypothesis,
    Output,
    SamplingParams,
    Token,
)
from tests.frontend.engines import HandEngine, started
from tests.frontend.tokenizers_ import byte_fallback

EOS = 2


class Log(NoObserver):
    def __init__(self) -> None:
        self.finishes: list[tuple[FinishReason, int, int, str, str | None]] = []
        self.first_tokens = 0
        self.inter_tokens = 0

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.first_tokens += 1

    def inter_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.inter_tokens += 1

    def finished(self, reason, seconds, *, prompt_tokens, completion_tokens, tenant, task) -> None:
        assert seconds >= 0
        self.finishes.append((reason, prompt_tokens, completion_tokens, tenant, task))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(max_queue=8)


@pytest.fixture
def engine(mailbox: Mailbox) -> HandEngine:
    return HandEngine(mailbox)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def frontend(mailbox: Mailbox, codec: TextCodec, log: Log) -> AsyncIterator[Frontend]:
    frontend = Frontend(mailbox, codec, max_model_len=128, observer=log, grace_s=0.0)
    frontend.attach(asyncio.get_running_loop())
    yield frontend
    frontend.close()


def call(prompt: str = "Blue Spice is", **changes: Any) -> Call:
    sampling = changes.pop("sampling", SamplingParams(max_new_tokens=32))
    return Call("acme", "e2e", None, prompt, sampling, **changes)


def answer(
    codec: TextCodec, request: EngineRequest, text: str, reason: FinishReason, logprob: float = -0.5
) -> list[Output]:
    """``text`` a token an output, then the end: EOS is a token of its own."""
    ids = codec.encode(text)[0] + ([EOS] if reason is FinishReason.EOS else [])
    return [
        Output(
            request.request_id,
            started(request) if i == 0 else None,
            (Token(token_id, logprob),),
            Finish(reason) if i == len(ids) - 1 else None,
        )
        for i, token_id in enumerate(ids)
    ]


def error_of(request: EngineRequest, error: PrefixdError) -> Output:
    return Output(request.request_id, finish=Finish(FinishReason.ERROR, error))


# --- streams -------------------------------------------------------------------------------------


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


# --- errors and ends -----------------------------------------------------------------------------


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


# --- what is refused -----------------------------------------------------------------------------


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


# --- from call to request ------------------------------------------------------------------------


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


# --- whole answers -------------------------------------------------------------------------------

SAMPLED = SamplingParams(max_new_tokens=32, temperature=1.0, seed=(1 << 63) - 2)


async def finish_all(
    engine: HandEngine, codec: TextCodec, answers: dict[int, tuple[str, float]]
) -> None:
    """Answer each sequence, in this order, with its text and log-probability."""
    await engine.request(len(answers) - 1)
    for index, (text, logprob) in answers.items():
        request = engine.requests[index]
        await engine.deliver(*answer(codec, request, text, FinishReason.LENGTH, logprob))


async def test_n_sequences_in_order_whoever_ends_first(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    task = asyncio.ensure_future(frontend.complete(call(sampling=SAMPLED, n=3, best_of=3)))
    await finish_all(engine, codec, {2: (" c", -1.0), 0: (" a", -9.0), 1: (" b", -0.1)})
    completions = await task
    assert [completion.text for completion in completions] == [" a", " b", " c"]
    seeds = [(1 << 63) - 2, (1 << 63) - 1, 0]
    assert [completion.seed for completion in completions] == seeds
    assert [request.sampling.seed for request in engine.requests] == seeds
    assert len({request.request_id for request in engine.requests}) == 3


async def test_the_best_by_mean_logprob(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    task = asyncio.ensure_future(frontend.complete(call(sampling=SAMPLED, n=2, best_of=3)))
    texts = {0: (" bad", -2.0), 1: (" long one two three", -1.0), 2: (" best", -0.5)}
    await finish_all(engine, codec, texts)
    assert [completion.text for completion in await task] == [" best", " long one two three"]


async def test_draw_returns_every_sequence(
    frontend: Frontend, engine: HandEngine, codec: TextCodec
) -> None:
    task = asyncio.ensure_future(frontend.draw(call(sampling=SAMPLED, n=1, best_of=2)))
    await finish_all(engine, codec, {0: (" a", -2.0), 1: (" b", -1.0)})
    assert [completion.text for completion in await task] == [" a", " b"]


async def test_a_beam_search_gives_its_hypotheses_in_their_order(
    frontend: Frontend, engine: HandEngine, codec: TextCodec, log: Log
) -> None:
    sampling = SamplingParams(max_new_tokens=9, beams=BeamParams(4, n=2))
    task = asyncio.ensure_future(frontend.complete(call(sampling=sampling, n=2)))
    request = await engine.request()
    assert request.sampling == sampling
    texts = {" a café": (FinishReason.EOS, -0.5), " a tea room": (FinishReason.LENGTH, -0.75)}
    found = []
    for text, (reason, score) in texts.items():
        ids = codec.encode(text)[0] + [EOS] * (reason is FinishReason.EOS)
        found.append(Hypothesis(tuple(Token(id_, -1.5) for id_ in ids), score, reason))
    await engine.deliver(Output(request.request_id, started(request)))
    assert not task.done()
    finish = Finish(FinishReason.EOS, hypotheses=tuple(found))
    await engine.deliver(Output(request.request_id, finish=finish))
    completions = await task
    assert [completion.text for completion in completions] == list(texts)
    assert [(c.finish_reason, c.score) for c in completions] == list(texts.values())
    assert [len(c.tokens) for c in completions] == [len(h.tokens) for h in found]
    assert {(c.version, c.prefix_tokens, c.seed) for c in completions} == {(3, 20, None)}
    total = sum(len(h.tokens) for h in found)
    prompt = len(request.prompt_token_ids)
    assert log.finishes == [(FinishReason.EOS, prompt, total, "acme", "e2e")]
    assert log.first_tokens == 1
    assert engine.aborted == []


@pytest.mark.parametrize("ended", ["error", "cancelled"])
async def test_a_beam_search_that_ends_early(
    frontend: Frontend, engine: HandEngine, ended: str
) -> None:
    sampling = SamplingParams(beams=BeamParams(4))
    task = asyncio.ensure_future(frontend.complete(call(sampling=sampling)))
    request = await engine.request()
    if ended == "error":
        await engine.deliver(error_of(request, NotFound("no such version")))
        with pytest.raises(NotFound):
            await task
    else:
        task.cancel()
        await asyncio.wait([task])
        engine.look()
        assert engine.aborted == [request.request_id]
    assert frontend.num_inflight == 0


async def test_one_failed_sequence_ends_them_all(frontend: Frontend, engine: HandEngine) -> None:
    task = asyncio.ensure_future(frontend.complete(call(sampling=SAMPLED, n=3, best_of=3)))
    await engine.request(2)
    await engine.deliver(error_of(engine.requests[1], NotFound("no such version")))
    with pytest.raises(NotFound, match="no such version"):
        await task
    engine.look()
    assert engine.aborted == [engine.requests[0].request_id, engine.requests[2].request_id]
    assert frontend.num_inflight == 0


async def test_cancelling_a_whole_answer_aborts_its_sequences(
    frontend: Frontend, engine: HandEngine
) -> None:
    task = asyncio.ensure_future(frontend.complete(call(n=2, best_of=2)))
    await engine.request(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.look()
    assert engine.aborted == [request.request_id for request in engine.requests]


# --- compile -------------------------------------------------------------------------------------


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
