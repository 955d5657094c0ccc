"""What the tests of the frontend share: a call, the answer that the engine gives it, and a log."""

from __future__ import annotations

from typing import Any

from prefixd_server.errors import PrefixdError
from prefixd_server.frontend.calls import Call
from prefixd_server.frontend.flights import NoObserver
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import EngineRequest, Finish, FinishReason, Output, SamplingParams, Token
from tests.frontend.engines import started

EOS = 2


class Log(NoObserver):
    def __init__(self) -> None:
        self.finishes: list[tuple[FinishReason, int, int, str, str | None]] = []
        self.first_tokens = 0
        self.inter_tokens = 0

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.first_tokens += 1

    def inter_token(self, seconds: float, count: int) -> None:
        assert seconds >= 0
        self.inter_tokens += count

    def finished(self, reason, seconds, *, prompt_tokens, completion_tokens, tenant, task) -> None:
        assert seconds >= 0
        self.finishes.append((reason, prompt_tokens, completion_tokens, tenant, task))


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
