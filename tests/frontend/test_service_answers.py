"""Whole answers of the frontend: n of best_of sequences, and beam search."""

from __future__ import annotations

import asyncio

import pytest

from prefixd_server.errors import NotFound
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import (
    BeamParams,
    Finish,
    FinishReason,
    Hypothesis,
    Output,
    SamplingParams,
    Token,
)
from tests.frontend.engines import HandEngine, started
from tests.frontend.support import EOS, Log, answer, call, error_of

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
