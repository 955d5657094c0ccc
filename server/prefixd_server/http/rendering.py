"""Completions as the native API's JSON. Plain dicts: this is the path that every token takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from prefixd_server.frontend.calls import Chunk, Completion, TextToken
from prefixd_server.http.schemas import Parameters

__all__ = ["Rendering"]


class Rendering(NamedTuple):
    """One call's choices about its answer."""

    task: str
    prompt: str
    parameters: Parameters

    def whole(self, shown: Sequence[Completion], drawn: Sequence[Completion]) -> dict[str, Any]:
        sequences = [self._sequence(completion) for completion in shown]
        return {
            **sequences[0],
            "sequences": sequences if len(sequences) > 1 else None,
            "task": self.task,
            "version": shown[0].version,
            "usage": _usage(drawn),
        }

    def chunk(self, chunk: Chunk) -> dict[str, Any]:
        wants_top = bool(self.parameters.top_n_tokens)
        data: dict[str, Any] = {
            "index": chunk.index,
            "token": _token(chunk.token),
            "top_tokens": _tokens(chunk.token.top) if wants_top else None,
            "generated_text": None,
            "details": None,
        }
        if chunk.completion is not None:
            data.update(self._ending(chunk.completion))
        return data

    def _ending(self, completion: Completion) -> dict[str, Any]:
        details = {
            "finish_reason": completion.finish_reason,
            "generated_tokens": len(completion.tokens),
            "input_length": completion.prompt_tokens,
            "seed": completion.seed,
        }
        return {
            "generated_text": self._text(completion),
            "details": details,
            "task": self.task,
            "version": completion.version,
            "usage": _usage([completion]),
        }

    def _sequence(self, completion: Completion) -> dict[str, Any]:
        details = self._details(completion) if self.parameters.details else None
        return {
            "generated_text": self._text(completion),
            "score": completion.score,
            "details": details,
        }

    def _details(self, completion: Completion) -> dict[str, Any]:
        tops = [_tokens(token.top) for token in completion.tokens]
        return {
            "finish_reason": completion.finish_reason,
            "generated_tokens": len(completion.tokens),
            "seed": completion.seed,
            "prefill": [
                {"id": token.id, "text": token.text, "logprob": token.logprob}
                for token in completion.prefill
            ],
            "tokens": _tokens(completion.tokens),
            "top_tokens": tops if self.parameters.top_n_tokens else None,
        }

    def _text(self, completion: Completion) -> str:
        return self.prompt * bool(self.parameters.return_full_text) + completion.text


def _usage(drawn: Sequence[Completion]) -> dict[str, int]:
    prompt = drawn[0].prompt_tokens
    completion = sum(len(one.tokens) for one in drawn)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prefix_tokens": drawn[0].prefix_tokens,
    }


def _token(token: TextToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }


def _tokens(tokens: Sequence[TextToken]) -> list[dict[str, Any]]:
    return [_token(token) for token in tokens]
