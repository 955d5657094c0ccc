"""What ``http`` asks of the frontend and what it gets back: text in, text out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from prefixd_server.types import FinishReason, SamplingParams

__all__ = ["Call", "Chunk", "Completion", "TextToken"]


@dataclass(frozen=True, slots=True)
class Call:
    """One validated generate call, defaults merged in."""

    tenant: str
    task: str | None
    """None: the base model"""
    version: int | None
    prompt: str
    sampling: SamplingParams
    """with ``seed`` filled in; sequence i of ``best_of`` runs with seed + i"""
    stop: tuple[str, ...] = ()
    n: int = 1
    best_of: int = 1
    """requests drawn; a beam search is one, and gives ``n`` completions"""
    truncate: int | None = None
    chat: bool = False
    """``prompt`` is one user message, to be put through the model's own chat template"""
    timeout_s: float = 600.0
    priority: int = 0
    request_id: str = ""


class TextToken(NamedTuple):
    id: int
    text: str
    """what it adds to the text; may be empty while a character or stop string is incomplete"""
    logprob: float | None
    special: bool
    top: tuple[TextToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sequence."""

    text: str
    finish_reason: FinishReason
    tokens: tuple[TextToken, ...]
    prefill: tuple[TextToken, ...]
    """the prompt's tokens; empty unless ``sampling.prompt_logprobs``"""
    seed: int | None
    """None when greedy"""
    version: int | None
    prompt_tokens: int
    prefix_tokens: int
    score: float | None = None
    """of a beam search's hypothesis"""

    @property
    def cumulative_logprob(self) -> float:
        return sum(token.logprob or 0.0 for token in self.tokens)


@dataclass(slots=True)
class Chunk:
    """One token of a stream; ``index`` counts from 1. The last one carries the completion."""

    index: int
    token: TextToken
    completion: Completion | None = None
