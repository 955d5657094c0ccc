"""A sampler, and rows and logits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefixd_server.engine.sampling import Sampler
from prefixd_server.types import SamplingParams, Token

EOS = frozenset({1, 3})


@dataclass
class Row:
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_token_ids: Sequence[int] = (0,)
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    forced_token_ids: Sequence[int] = ()


def sampler(vocab: int) -> Sampler:
    return Sampler(vocab, EOS, "cpu")


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    tokens = sampler(logits.shape[1]).sample(logits, rows)
    assert None not in tokens
    return [token for token in tokens if token]


def seeded(vocab: int, batch: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * spread
