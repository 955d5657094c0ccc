"""The words that rooms exchange: small frozen values, no tensors, no behaviour.

Requests travel frontend → engine through the mailbox; outputs travel back, one list a step.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, NamedTuple

from prefixd_server.errors import PrefixdError

__all__ = [
    "BeamParams",
    "CompileOutput",
    "EngineRequest",
    "Finish",
    "FinishReason",
    "Hypothesis",
    "Output",
    "PrefixKey",
    "PrefixState",
    "PrefixVersion",
    "SamplingParams",
    "SiteLengths",
    "Started",
    "Token",
]


class PrefixKey(NamedTuple):
    """What every cache is keyed by: equal bytes of two tenants share nothing."""

    tenant: str
    sha256: str


class SiteLengths(NamedTuple):
    """Virtual tokens of a prefix by where they go; only an encoder-decoder has the last two, and
    each its own number."""

    decoder: int = 0
    encoder: int = 0
    cross: int = 0


_NOT_GIVEN = SiteLengths()


@dataclass(frozen=True, slots=True)
class PrefixVersion:
    """One immutable version of a task, as admission resolved it."""

    tenant: str
    task: str
    version: int
    sha256: str
    num_virtual_tokens: int
    """the decoder's, or those of the first other site that it has"""
    query_offset: int
    """0, or ``num_virtual_tokens``: each stream begins behind the prefix that it has"""
    starts_sequence: bool = False
    """the prefix was compiled from text and already holds the tokenizer's leading special tokens"""
    sites: SiteLengths = _NOT_GIVEN
    """none given: all ``num_virtual_tokens`` are the decoder's"""

    def __post_init__(self) -> None:
        if not any(self.sites):
            object.__setattr__(self, "sites", SiteLengths(decoder=self.num_virtual_tokens))

    @property
    def key(self) -> PrefixKey:
        return PrefixKey(self.tenant, self.sha256)

    @property
    def decoder_offset(self) -> int:
        """The position of the first prompt token; a stream without a prefix begins at 0."""
        return self.sites.decoder if self.query_offset else 0

    @property
    def encoder_offset(self) -> int:
        return self.sites.encoder if self.query_offset else 0


class PrefixState(enum.StrEnum):
    """Where a prefix is on this server. Transitions: ``prefix/lifecycle.py``."""

    STORED = "stored"
    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"
    RETIRING = "retiring"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Beam search with transformers' meanings of its parameters."""

    num_beams: int
    n: int = 1
    """how many of the best hypotheses are returned"""
    length_penalty: float = 1.0
    """a hypothesis scores its summed log-probability over its length to this power"""
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is drawn. Values are validated where they enter, in ``http/schemas.py``."""

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    """0: off"""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """drawn by the frontend when the client gave none; unused when greedy"""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    beams: BeamParams | None = None
    """search instead of drawing; temperature and filters are off, penalties move the scores"""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run, or one beam search. Sampling with ``n`` > 1 is n of these."""

    request_id: str
    tenant: str
    task: str | None
    """None: the base model"""
    version: int | None
    """None: the active one, or the split's draw, at admission"""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline: float
    """time.monotonic() after which the request is ended with DeadlineExceeded"""
    leading_special_tokens: int = 0
    """how many of the first prompt tokens the tokenizer added (BOS); see ``starts_sequence``"""
    priority: int = 0
    arrival: float = 0.0
    """time.monotonic(); ties in priority go first come, first served"""
    capture_kv: bool = False
    """compile: run the prompt through the LM, return its KV, generate nothing"""


class FinishReason(enum.StrEnum):
    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"
    ABORTED = "aborted"
    ERROR = "error"


class Token(NamedTuple):
    id: int
    logprob: float
    """of the model's own distribution, before temperature, penalties and filters"""
    top: tuple[tuple[int, float], ...] = ()
    """``top_n_tokens`` of (id, logprob), most likely first"""


class Hypothesis(NamedTuple):
    """One result of a beam search."""

    tokens: tuple[Token, ...]
    score: float
    """summed log-probability, after penalties, over length ** length_penalty"""
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has been run; comes once, with or before the first token."""

    version: int | None
    prefix_tokens: int
    prompt_token_ids: tuple[int, ...]
    """the prompt as run: without leading special tokens where the prefix holds them"""
    prompt_logprobs: tuple[float, ...] = ()
    """of prompt tokens 1 … n-1 (the first has none with no prefix); empty unless asked for"""


@dataclass(frozen=True, slots=True)
class CompileOutput:
    """The KV of a text, ready for a file: bytes of ``key`` and ``value``, each [L, H_kv, P, D]."""

    shape: tuple[int, int, int, int]
    dtype: str
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    error: PrefixdError | None = None
    compiled: CompileOutput | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    """of a beam search, which has no tokens on the way; best first, ``reason`` is the first's"""


class Output(NamedTuple):
    """What one step did for one request. Exactly one has ``finish``, and it is the last."""

    request_id: str
    started: Started | None = None
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
