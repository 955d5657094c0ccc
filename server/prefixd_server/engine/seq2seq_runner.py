"""Runs one step of an encoder-decoder: the encoder for those that begin, the decoder for all."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import groupby

import torch
from torch import Tensor

from prefixd_server.attention import AttentionBackend, CrossSpan
from prefixd_server.attention.seq2seq import EncoderPlan, EncoderRow, Seq2SeqPlan
from prefixd_server.engine.runner import ModelRunner, pack, span_of
from prefixd_server.engine.scheduler import Scheduled
from prefixd_server.engine.sequence import Sequence
from prefixd_server.models.seq2seq import Seq2SeqModel

__all__ = ["Seq2SeqRunner"]


class Seq2SeqRunner(ModelRunner):
    """Sequences of any tasks and lengths share the encoder's batches and the decoder's step."""

    def __init__(
        self, model: Seq2SeqModel, backend: AttentionBackend, device: torch.device
    ) -> None:
        super().__init__(model.module, backend, device)
        self.model = model

    def _logits(self, step: Seq[Scheduled], keep: list[int]) -> Tensor:
        encoded = self._encode([sequence for sequence, _ in step if sequence.num_unencoded])
        plan = Seq2SeqPlan(
            self.backend.plan([span_of(item) for item in step]),
            self.backend.plan([_cross_span(item) for item in step]),
        )
        tokens, positions = pack(step)
        return self.model.decode(tokens, positions, encoded, plan, keep)

    def _encode(self, sequences: list[Sequence]) -> list[Tensor]:
        """The encoder's output for each, in order. Texts of similar length share a batch, so that
        padding at most doubles the work."""
        outputs: dict[Sequence, Tensor] = {}
        for _, group in groupby(sorted(sequences, key=_size), key=_size):
            batch = list(group)
            plan = EncoderPlan(self.backend.pool, [_encoder_row(sequence) for sequence in batch])
            texts = [sequence.encoder_token_ids for sequence in batch]
            outputs.update(zip(batch, self.model.encode(texts, plan), strict=True))
        return [outputs[sequence] for sequence in sequences]


def _size(sequence: Sequence) -> int:
    return len(sequence.encoder_token_ids).bit_length()


def _encoder_row(sequence: Sequence) -> EncoderRow:
    num_tokens = len(sequence.encoder_token_ids)
    if sequence.prefix is None or sequence.lease is None:
        return EncoderRow(num_tokens)
    return EncoderRow(
        num_tokens,
        sequence.lease.sites.encoder,
        sequence.prefix.sites.encoder,
        position_offset=sequence.prefix.encoder_offset,
    )


def _cross_span(item: Scheduled) -> CrossSpan:
    sequence = item.sequence
    return CrossSpan(
        query_len=item.num_tokens,
        num_keys=len(sequence.encoder_token_ids),
        pages=sequence.cross_pages,
        is_new=sequence.num_unencoded > 0,
        prefix_pages=sequence.lease.sites.cross if sequence.lease else (),
        prefix_len=sequence.prefix.sites.cross if sequence.prefix else 0,
    )
