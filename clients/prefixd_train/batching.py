"""Which examples make a step and a batch, in which order, and as which tensors.

The order of an epoch is a pure function of the lengths, the seed, the epoch and the examples of a
step: a run that was killed finds its place again from its step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefixd_train.data import Example
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM

__all__ = ["IGNORED", "Batch", "Collator", "epoch_batches", "epoch_steps", "share"]

IGNORED = -100
"""the label of a position without loss, as torch's cross_entropy has it"""

# Batches are cut from so many at a time, sorted by length: little padding, and still much chance.
_BUCKET_BATCHES = 50


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids, padded on the right.

    Labels are transformers': of a decoder-only LM ``labels[b, t]`` is ``input_ids[b, t]`` where the
    loss counts it; of an encoder-decoder it is what position ``t`` of ``decoder_input_ids`` has to
    predict.
    """

    input_ids: Tensor
    """[B, S] int64; the encoder's for an encoder-decoder, else source and target"""
    attention_mask: Tensor
    """[B, S] int64, 0 at padding"""
    labels: Tensor
    """[B, S], or [B, T] for an encoder-decoder; IGNORED where there is no loss"""
    decoder_input_ids: Tensor | None = None
    """[B, T], of an encoder-decoder"""
    lines: Sequence[int] = ()
    """where each row is from, as ``Examples.lines``; for an objective that knows more of it"""

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: str | torch.device) -> Batch:
        decoder = self.decoder_input_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            decoder_input_ids=None if decoder is None else decoder.to(device),
        )


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Every example's index once, in batches of like lengths; only the last cut may be short.

    The same arguments give the same batches.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(len(lengths))
    sizes = np.asarray(lengths)
    bucket = batch_size * _BUCKET_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), bucket):
        some = order[start : start + bucket]
        some = some[np.argsort(sizes[some], kind="stable")]
        batches += [some[i : i + batch_size].tolist() for i in range(0, len(some), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def epoch_steps(
    lengths: Sequence[int], batch_size: int, grad_accum: int, *, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The batches of each optimiser step. Which examples a step takes depends on the product of
    ``batch_size`` and ``grad_accum``, not on how it is cut."""
    steps = epoch_batches(lengths, batch_size * grad_accum, seed=seed, epoch=epoch)
    return [[step[i : i + batch_size] for i in range(0, len(step), batch_size)] for step in steps]


def share(batch: Sequence[int], rank: int, num_processes: int) -> list[int]:
    """What one of several processes takes of a batch; may be nothing of a short one."""
    return list(batch[rank::num_processes])


@dataclass(frozen=True)
class Collator:
    """Makes one tensor of each part of some examples. Source and target of a decoder-only LM make
    one row."""

    pad_id: int
    decoder_start_id: int | None = None
    """the token that an encoder-decoder's decoder begins with; None for the rest"""

    @classmethod
    def of(cls, lm: FrozenLM) -> Collator:
        """Raises TrainError for an LM that does not say where a text ends or a decoder begins."""
        eos, pad = lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id
        if eos is None:
            raise TrainError(f"{lm.name}'s tokenizer has no end-of-sequence token")
        start = None
        if lm.is_encoder_decoder:
            generation = lm.module.generation_config
            start = generation.decoder_start_token_id
            start = generation.bos_token_id if start is None else start
            if not isinstance(start, int):
                raise TrainError(f"{lm.name}'s decoder_start_token_id is {start!r}, not one token")
        return cls(eos if pad is None else pad, start)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        targets = [list(example.target) for example in examples]
        if self.decoder_start_id is not None:
            begun = [[self.decoder_start_id, *target[:-1]] for target in targets]
            inputs, mask = _padded([list(example.source) for example in examples], self.pad_id)
            labels, decoder_inputs = _padded(targets, IGNORED)[0], _padded(begun, self.pad_id)[0]
            return Batch(inputs, mask, labels, decoder_inputs)
        inputs, mask = _padded([[*one.source, *one.target] for one in examples], self.pad_id)
        unseen = [[IGNORED] * len(one.source) + list(one.target) for one in examples]
        return Batch(inputs, mask, _padded(unseen, IGNORED)[0])


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """[B, longest row] filled on the right, and which of it are rows (1) or padding (0)."""
    width = max(len(row) for row in rows)
    values = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return values, mask
