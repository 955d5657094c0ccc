"""The frontend: text in, text out, on the event loop; the engine is behind the mailbox."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import Draining, InvalidRequest, PrefixdError, PromptTooLong
from prefixd_server.frontend.calls import Call, Completion
from prefixd_server.frontend.flights import Flights, NoObserver, Observer
from prefixd_server.frontend.receivers import Compiled, Found, Stream, Whole
from prefixd_server.frontend.sequence import SequenceText
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import CompileOutput, EngineRequest, SamplingParams

__all__ = ["Frontend", "Observer", "Stream", "best"]

_INLINE_CHARACTERS = 2048
"""Prompts up to this are tokenised on the event loop: about 0.4 ms, and no hop to a thread."""
_SEEDS = 1 << 63


class _Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    num_leading: int
    """how many of the first ones the tokenizer added"""


class Frontend:
    """Create it anywhere, ``attach`` it to the running loop, then call it on that loop only.

    ``vocab_size`` is the model's; without it the tokenizer's is taken.
    ``encoder_decoder``: the output does not continue the prompt, and has its own ``max_model_len``.
    ``grace_s``: how long after a request's deadline to wait for an engine that no longer answers.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        codec: TextCodec,
        *,
        max_model_len: int,
        vocab_size: int | None = None,
        encoder_decoder: bool = False,
        workers: int = 2,
        observer: Observer | None = None,
        grace_s: float = 5.0,
    ) -> None:
        self.codec = codec
        self.max_model_len = max_model_len
        self.vocab_size = codec.vocab_size if vocab_size is None else vocab_size
        self.encoder_decoder = encoder_decoder
        self._flights = Flights(mailbox, observer or NoObserver(), grace_s=grace_s)
        self._tokenizers = ThreadPoolExecutor(workers, "frontend-tokenize")
        self._counter = itertools.count()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on the engine's outputs are dispatched on ``loop``."""
        self._flights.attach(loop)

    def close(self) -> None:
        self._tokenizers.shutdown(wait=False, cancel_futures=True)

    async def open(self, call: Call) -> Stream:
        """Tokenise, check and submit; the stream's first chunk or error comes from iterating it.

        Raises InvalidRequest, PromptTooLong, Overloaded, Draining or EngineDead.
        """
        assert call.best_of == call.n == 1, "a stream is one sequence"
        requests = await self._requests(call)
        ids = [request.request_id for request in requests]
        streams = [
            Stream(self._text(call, request), partial(self._flights.abort, ids))
            for request in requests
        ]
        self._flights.submit(requests, streams)
        return streams[0]

    async def complete(self, call: Call) -> list[Completion]:
        """The ``n`` best of ``best_of`` sequences; see ``draw`` and ``best``."""
        return best(call, await self.draw(call))

    async def draw(self, call: Call) -> list[Completion]:
        """All ``best_of`` sequences, in order of their seeds. The first error ends them all.

        Of a beam search: the ``n`` best hypotheses, best first. Raises what ``open`` raises, and
        whatever the engine ended a sequence with.
        """
        requests = await self._requests(call)
        loop = asyncio.get_running_loop()
        if call.sampling.beams is not None:
            return await self._search(call, *requests)
        futures: list[asyncio.Future[Completion]] = [loop.create_future() for _ in requests]
        receivers = [
            Whole(self._text(call, request), future)
            for request, future in zip(requests, futures, strict=True)
        ]
        self._flights.submit(requests, receivers)
        try:
            return await asyncio.gather(*futures)
        finally:
            self._flights.abort(request.request_id for request in requests)

    async def _search(self, call: Call, request: EngineRequest) -> list[Completion]:
        future: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._flights.submit([request], [Found(partial(self._text, call, request), future)])
        try:
            return await future
        finally:
            self._flights.abort([request.request_id])

    async def compile(
        self, tenant: str, text: str, *, timeout_s: float
    ) -> tuple[CompileOutput, int]:
        """Run the base model over a text and keep its KV.

        Returns it and how many of its first tokens the tokenizer added (more than zero means that
        the prefix ``starts_sequence``). Raises what ``draw`` raises; ``param`` is ``text``.
        """
        arrival = time.monotonic()
        prompt = await self._tokenise(text, param="text")
        if len(prompt.token_ids) > self.max_model_len:
            raise PromptTooLong(
                f"the text has {len(prompt.token_ids)} tokens; the model's context has"
                f" {self.max_model_len}",
                param="text",
            )
        request = EngineRequest(
            request_id=f"compile-{next(self._counter)}",
            tenant=tenant,
            task=None,
            version=None,
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(max_new_tokens=0),
            deadline=arrival + timeout_s,
            leading_special_tokens=prompt.num_leading,
            arrival=arrival,
            capture_kv=True,
        )
        future: asyncio.Future[CompileOutput] = asyncio.get_running_loop().create_future()
        self._flights.submit([request], [Compiled(future)])
        try:
            return await future, prompt.num_leading
        finally:
            self._flights.abort([request.request_id])

    @property
    def num_inflight(self) -> int:
        """Sequences that the engine has been given and that have not ended."""
        return len(self._flights)

    async def join(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that took longer than ``timeout_s``."""
        return await self._flights.join(timeout_s)

    def abort_all(self, error: PrefixdError | None = None) -> None:
        """End every request now; clients get ``error``, by default Draining."""
        self._flights.abort_all(error or Draining("the server is shutting down"))

    def fail_all(self, error: PrefixdError) -> None:
        """The engine has died: clients get ``error``. May be called from any thread."""
        self._flights.fail_all(error)

    # --- from call to requests -------------------------------------------------------------------

    async def _requests(self, call: Call) -> list[EngineRequest]:
        arrival = time.monotonic()
        self._check_token_ids(call.sampling)
        prompt = _truncate(
            await self._tokenise(call.prompt, param="inputs", chat=call.chat), call.truncate
        )
        self._check_length(len(prompt.token_ids), call.sampling.max_new_tokens)
        # Clients may reuse a request id while it is in flight; the engine needs its own.
        unique_id = f"{call.request_id}-{next(self._counter)}"
        return [
            EngineRequest(
                request_id=f"{unique_id}-{i}",
                tenant=call.tenant,
                task=call.task,
                version=call.version,
                prompt_token_ids=prompt.token_ids,
                sampling=replace(call.sampling, seed=(call.sampling.seed + i) % _SEEDS),
                deadline=arrival + call.timeout_s,
                leading_special_tokens=prompt.num_leading,
                priority=call.priority,
                arrival=arrival,
            )
            for i in range(call.best_of)
        ]

    async def _tokenise(self, text: str, *, param: str, chat: bool = False) -> _Prompt:
        encoder = self.codec.encode_chat if chat else self.codec.encode
        encode = partial(encoder, text, param=param)
        if len(text) <= _INLINE_CHARACTERS:
            ids, num_leading = encode()
        else:
            loop = asyncio.get_running_loop()
            ids, num_leading = await loop.run_in_executor(self._tokenizers, encode)
        if len(ids) <= self.codec.num_leading + self.codec.num_trailing:
            raise InvalidRequest("the text is empty: it has no tokens", param=param)
        if max(ids) >= self.vocab_size:
            raise InvalidRequest(
                f"the text has token {max(ids)}; the model knows 0 … {self.vocab_size - 1}",
                param=param,
            )
        return _Prompt(tuple(ids), num_leading)

    def _text(self, call: Call, request: EngineRequest) -> SequenceText:
        context = () if self.encoder_decoder else request.prompt_token_ids
        return SequenceText(self.codec, request, call.stop, context=context)

    def _check_length(self, num_prompt: int, max_new_tokens: int) -> None:
        if self.encoder_decoder:
            longest = max(num_prompt, 1 + max_new_tokens)
            if longest > self.max_model_len:
                raise PromptTooLong(
                    f"the prompt has {num_prompt} tokens and max_new_tokens is {max_new_tokens};"
                    f" the model's encoder and decoder have {self.max_model_len} positions each",
                    param="inputs",
                )
            return
        total = num_prompt + max_new_tokens
        if total > self.max_model_len:
            raise PromptTooLong(
                f"the prompt's {num_prompt} tokens and max_new_tokens {max_new_tokens} make"
                f" {total}; the model's context has {self.max_model_len}",
                param="inputs",
            )

    def _check_token_ids(self, sampling: SamplingParams) -> None:
        self._check_known("logit_bias", [token_id for token_id, _ in sampling.logit_bias])
        self._check_known("stop_token_ids", sampling.stop_token_ids)

    def _check_known(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"{name} names token {token_id}; the model knows 0 … {self.vocab_size - 1}",
                    param=f"parameters.{name}",
                )


def best(call: Call, completions: Sequence[Completion]) -> list[Completion]:
    """The ``n`` with the best mean log-probability, best first; in order if n is all of them."""
    if call.n == len(completions):
        return list(completions)

    def mean(completion: Completion) -> float:
        return completion.cumulative_logprob / len(completion.tokens)

    return sorted(completions, key=mean, reverse=True)[: call.n]


def _truncate(prompt: _Prompt, limit: int | None) -> _Prompt:
    """Keep the last ``limit`` tokens."""
    if limit is None or limit >= len(prompt.token_ids):
        return prompt
    dropped = len(prompt.token_ids) - limit
    return _Prompt(prompt.token_ids[dropped:], max(0, prompt.num_leading - dropped))
