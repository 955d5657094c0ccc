"""Runs one step of the model: packs the scheduled tokens, calls transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefixd_server.attention import AttentionBackend, SequenceSpan
from prefixd_server.engine.scheduler import Scheduled
from prefixd_server.engine.sequence import Sequence
from prefixd_server.kv.transfer import to_device

__all__ = ["ModelRunner", "StepLogits", "pack", "span_of"]


class StepLogits(NamedTuple):
    sequences: list[Sequence]
    """those whose tokens are all computed now, in the order of ``next_token``'s rows"""
    next_token: Tensor
    """[len(sequences), V]"""
    prompt: list[tuple[Sequence, Tensor, Tensor]]
    """for sequences that want prompt log-probabilities: logits [N, V] of this chunk's prompt
    positions and the N prompt tokens that they predict"""


class ModelRunner:
    def __init__(self, module: nn.Module, backend: AttentionBackend, device: torch.device) -> None:
        self.module = module
        self.backend = backend
        self.device = device

    @property
    def asynchronous(self) -> bool:
        """``run`` returns while the device still computes."""
        return self.device.type == "cuda"

    def check(self) -> None:
        """After a failure: raises where the device will compute nothing more. CUDA says so to every
        call after an illegal access; a lack of memory passes."""
        if self.asynchronous:
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def run(self, step: Seq[Scheduled]) -> StepLogits:
        rows = _LogitRows(step)
        return rows.split(self._logits(step, rows.keep))

    def _logits(self, step: Seq[Scheduled], keep: list[int]) -> Tensor:
        """Run the model over the packed step; logits [len(keep), V] of the rows ``keep``."""
        tokens, positions = pack(step)
        output = self.module(
            input_ids=to_device(tokens, self.device)[None],
            position_ids=to_device(positions, self.device)[None],
            use_cache=False,
            logits_to_keep=to_device(keep, self.device),
            attention_plan=self.backend.plan([span_of(item) for item in step]),
        )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def copy_pages(self, copies: Seq[tuple[int, int]]) -> None:
        """Before ``run``: give sequences that part ways their own copy of a page, (from, to)."""
        self.backend.pool.copy_pages(copies)

    @torch.inference_mode()
    def read_kv(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """A sequence's own keys and values on the host, each [L, H_kv, num_computed, D]."""
        return self.backend.pool.read(sequence.pages, sequence.num_computed)


def span_of(item: Scheduled) -> SequenceSpan:
    sequence = item.sequence
    return SequenceSpan(
        query_len=item.num_tokens,
        context_len=sequence.num_computed,
        pages=sequence.pages,
        prefix_pages=sequence.lease.pages if sequence.lease else (),
        prefix_len=sequence.prefix_len,
        position_offset=sequence.position_offset,
    )


def pack(step: Seq[Scheduled]) -> tuple[list[int], list[int]]:
    """Token ids and position ids of the step, each of length T."""
    tokens: list[int] = []
    positions: list[int] = []
    for sequence, count in step:
        start = sequence.num_computed
        tokens += sequence.tokens(start, start + count)
        first = sequence.position_offset + start
        positions += range(first, first + count)
    return tokens, positions


class _LogitRows:
    """Which of the T packed positions need logits. The output layer is the largest matrix of a
    small model, so only rows that are sampled from, or asked for, are computed."""

    def __init__(self, step: Seq[Scheduled]) -> None:
        self.keep: list[int] = []
        self._sampled: list[tuple[Sequence, int]] = []
        self._prompts: list[tuple[Sequence, int, list[int]]] = []
        start = 0
        for sequence, count in step:
            targets = _prompt_targets(sequence, count)
            if targets:
                self._prompts.append((sequence, len(self.keep), targets))
                self.keep += range(start, start + len(targets))
            if count == sequence.num_uncomputed and not sequence.request.capture_kv:
                self._sampled.append((sequence, len(self.keep)))
                self.keep.append(start + count - 1)
            start += count

    def split(self, logits: Tensor) -> StepLogits:
        """logits [len(keep), V]"""
        index = [row for _, row in self._sampled]
        if len(index) < len(logits):
            next_token = logits.index_select(0, to_device(index, logits.device))
        else:
            next_token = logits
        return StepLogits(
            sequences=[sequence for sequence, _ in self._sampled],
            next_token=next_token,
            prompt=[
                (sequence, logits[row : row + len(targets)], torch.tensor(targets))
                for sequence, row, targets in self._prompts
            ],
        )


def _prompt_targets(sequence: Sequence, count: int) -> list[int]:
    """The prompt tokens that this chunk's positions predict, where the request wants them."""
    if not sequence.params.prompt_logprobs or sequence.started:
        return []
    first = sequence.num_computed + 1
    # A preempted prefill computes positions again whose log-probabilities are known.
    if first <= len(sequence.prompt_logprobs):
        sequence.prompt_logprobs = sequence.prompt_logprobs[: first - 1]
    return list(sequence.prompt_token_ids[first : first + count])
