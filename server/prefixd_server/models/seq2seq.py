"""Encoder-decoder models, run by transformers' own code over packed tokens and paged KV.

The encoder runs once a text, on padded rows. The decoder runs packed, ``[1, T]``, as decoder-only
models do, with two differences that a cache object settles: BART and its kin number their positions
from the cache's length, so the length is a tensor that puts each token where it stands; and
cross-attention projects the encoder's output only in the step that ran the encoder, after which the
plan has the keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from prefixd_server.attention.base import RelativeBias
from prefixd_server.attention.seq2seq import EncoderAttention, Role, Seq2SeqPlan, assign_role
from prefixd_server.errors import UnsupportedModel

__all__ = ["DecoderRules", "Seq2SeqModel"]

_SELF = ("self_attn", "SelfAttention")
_CROSS = ("encoder_attn", "EncDecAttention")


class DecoderRules(NamedTuple):
    """What the model's generation config fixes of every output."""

    start: int
    """the token that the decoder begins with (``decoder_start_token_id``)"""
    first: tuple[int, ...] = ()
    """one of these is the first new token (``forced_bos_token_id``)"""
    last: tuple[int, ...] = ()
    """one of these is the last token that ``max_new_tokens`` allows (``forced_eos_token_id``)"""
    never: tuple[int, ...] = ()
    """``suppress_tokens`` and the single tokens of ``bad_words_ids``, as Marian's padding"""

    @classmethod
    def of(cls, module: Any) -> DecoderRules:
        """Raises UnsupportedModel if the model does not say how its decoder begins."""
        config = module.generation_config
        start = config.decoder_start_token_id
        if start is None:
            start = config.bos_token_id
        if not isinstance(start, int):
            raise UnsupportedModel(
                f"{type(module).__name__} cannot be served: its decoder_start_token_id is"
                f" {start!r}, not one token"
            )
        eos = _ids(config.eos_token_id)
        bad = [ids[0] for ids in config.bad_words_ids or [] if len(ids) == 1]
        never = {*_ids(config.suppress_tokens), *(token for token in bad if token not in eos)}
        return cls(
            start,
            _ids(config.forced_bos_token_id),
            _ids(config.forced_eos_token_id),
            tuple(sorted(never)),
        )


class Seq2SeqModel:
    """transformers' model, called as the engine needs it. Marks the attention modules' roles."""

    def __init__(self, module: nn.Module) -> None:
        self.module = cast(Any, module)
        self.encoder = self.module.get_encoder()
        self.decoder = self.module.get_decoder()
        self.num_encoder_layers = _mark(self.encoder, _SELF, "encoder")
        self.num_layers = _mark(self.decoder, _SELF, "decoder")
        takes = inspect.signature(self.module.forward).parameters
        # transformers 5.24 renamed it.
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        name = type(module).__name__
        if _mark(self.decoder, _CROSS, "cross") != self.num_layers or not self.num_encoder_layers:
            raise UnsupportedModel(
                f"{name} cannot be served: its attention modules are not those of BART or T5"
                f" ({', '.join(_SELF + _CROSS)})"
            )
        self._width: int = self.module.get_input_embeddings().weight.shape[1]
        self._dtype: torch.dtype = self.module.get_input_embeddings().weight.dtype

    @property
    def has_relative_positions(self) -> bool:
        """A bias by distance, as T5, instead of positions that are embedded and can run out."""
        return any(hasattr(m, "relative_attention_bias") for m in self.encoder.modules())

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.module.device)

    def encode(self, texts: Sequence[Sequence[int]], plan: EncoderAttention) -> list[Tensor]:
        """The encoder's output for each text, [num_tokens, E], run as one padded batch."""
        longest = max(map(len, texts))
        padded = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        states = self.encoder(
            input_ids=padded.to(self.device), attention_plan=plan
        ).last_hidden_state
        return [row[: len(text)] for row, text in zip(states, texts, strict=True)]

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        encoded: Sequence[Tensor],
        plan: Seq2SeqPlan,
        keep: Sequence[int],
    ) -> Tensor:
        """One packed step of T tokens; logits [len(keep), V] of the rows ``keep`` of them.

        ``encoded`` are the encoder's outputs whose cross-attention keys the plan does not have yet.
        """
        device = self.device
        wanted = torch.tensor(positions, device=device)
        states = torch.cat(
            [torch.empty(0, self._width, dtype=self._dtype, device=device), *encoded]
        )
        rows = torch.tensor(keep, dtype=torch.int64, device=device)
        # The output layer is the largest matrix of a small model, and these models take no
        # `logits_to_keep`.
        hook = self.module.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].index_select(1, rows),)
        )
        try:
            output = self.module(
                encoder_outputs=(states[None],),
                decoder_input_ids=torch.tensor([tokens], device=device),
                # BART would otherwise make one of the cache's length, which is a tensor here.
                decoder_attention_mask=torch.ones(1, 1, device=device),
                use_cache=False,
                attention_plan=plan,
                **{self._cache_argument: _StepCache(wanted, self.num_layers, bool(encoded))},
            )
        finally:
            hook.remove()
        return cast(Tensor, output.logits[0])


class _PassingCache:
    """Keeps nothing: the plan does. Its length is what puts token t of T at its position."""

    def __init__(self, positions: Tensor, num_layers: int) -> None:
        steps = torch.arange(len(positions), device=positions.device)
        self._length = positions - steps
        # In place of cross-attention keys that are in the pages already: no tokens, [1, 1, 0, 1].
        none = torch.empty(1, 1, 0, 1, device=positions.device)
        self.layers = [SimpleNamespace(keys=none, values=none)] * num_layers

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        return self._length

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key, value


class _StepCache(EncoderDecoderCache):  # type: ignore[misc]
    def __init__(self, positions: Tensor, num_layers: int, project: bool) -> None:
        """``project``: cross-attention is given new encoder output to make keys of."""
        passing = _PassingCache(positions, num_layers)
        self.self_attention_cache = passing
        self.cross_attention_cache = passing
        self.is_updated = dict.fromkeys(range(num_layers), not project)


class _BucketedBias:
    """T5's relative position bias, looked up for any positions with the model's own buckets."""

    def __init__(self, attention: Any, *, bidirectional: bool) -> None:
        self._attention = attention
        self._bidirectional = bidirectional

    def __call__(self, relative: Tensor) -> Tensor:
        attention = self._attention
        buckets = attention._relative_position_bucket(
            relative,
            bidirectional=self._bidirectional,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return cast(Tensor, attention.relative_attention_bias(buckets))


def _mark(stack: nn.Module, names: Sequence[str], site: Any) -> int:
    """Give each attention module of a stack its role, in order; returns how many there are."""
    found = [m for name, m in stack.named_modules() if name.rpartition(".")[2] in names]
    bias: RelativeBias | None = None
    for layer, attention in enumerate(found):
        if hasattr(attention, "relative_attention_bias"):
            # T5 has one table, in layer 0, for all layers; UMT5 has one in each.
            bias = _BucketedBias(attention, bidirectional=site == "encoder")
        assign_role(attention, Role(site, layer, bias))
    return len(found)


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
