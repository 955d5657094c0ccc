"""Tiny frozen LMs, batches and prefixes for the trainer's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefixd_train.batching import IGNORED, Batch
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.sites import Site
from tests.support.models import TINY, tiny_model_folder
from tests.support.seq2seq import tiny_seq2seq_folder

__all__ = ["IGNORED", "SITES_OF", "batch_of", "rows", "tiny_lm", "tiny_lm_folder"]

SITES_OF: dict[str, tuple[Site, ...]] = {
    "llama": ("decoder",),
    "gpt2": ("decoder",),
    "t5": ("decoder", "encoder", "cross"),
    "bart": ("decoder", "encoder", "cross"),
}


def tiny_lm_folder(family: str, folder: Path) -> Path:
    if family in TINY:
        return tiny_model_folder(family, folder)
    return tiny_seq2seq_folder(family, folder)


def tiny_lm(family: str, folder: Path, *, dtype: str = "float32") -> FrozenLM:
    return load_lm(str(tiny_lm_folder(family, folder)), dtype=dtype)


def rows(seed: int, *lengths: int, vocab: int = 40_000) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, vocab, (n,), generator=generator).tolist() for n in lengths]


def batch_of(
    lm: FrozenLM, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> Batch:
    """Each target after its source; of an encoder-decoder, from the start token on."""
    if not lm.is_encoder_decoder:
        together = [[*s, *t] for s, t in zip(sources, targets, strict=True)]
        labels = [[*[IGNORED] * len(s), *t] for s, t in zip(sources, targets, strict=True)]
        return Batch(_padded(together, 0), _mask(together), _padded(labels, IGNORED))
    start = lm.module.config.decoder_start_token_id
    return Batch(
        _padded(sources, 0),
        _mask(sources),
        _padded(targets, IGNORED),
        _padded([[start, *target[:-1]] for target in targets], 0),
    )


def _padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in lists])


def _mask(lists: Sequence[Sequence[int]]) -> Tensor:
    return _padded([[1] * len(row) for row in lists], 0)
