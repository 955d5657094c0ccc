"""The paper's ablations, to compare a prefix with: embeddings only, and an infix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixd_train.initialise import record_activations
from prefixd_train.lm import FrozenLM
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.sites import InfixKV, PrefixKV

__all__ = ["EmbeddingPrefix", "Infix"]


class EmbeddingPrefix(PrefixParameters):
    """Only P input embeddings are trained, as in prompt tuning; the LM makes the keys and values of
    them. Attention being causal, they are what the virtual tokens ahead of any prompt would have,
    so this is a prefix like any other, of far fewer parameters. Decoder-only LMs."""

    def __init__(self, lm: FrozenLM, length: int, *, dropout: float = 0.0) -> None:
        """Random embeddings of the size of the LM's own. Raises ValueError."""
        super().__init__()
        if lm.is_encoder_decoder:
            raise ValueError(
                f"embedding-only training needs a decoder-only LM; {lm.name} is an encoder-decoder"
            )
        self._lm = lm
        self.lengths = {"decoder": length}
        self.dropout = dropout
        table = cast(Tensor, lm.module.get_input_embeddings().weight)
        self.embeddings = nn.Parameter(torch.randn(length, table.shape[1]) * float(table.std()))

    def forward(self) -> PrefixKV:
        embeddings = F.dropout(self.embeddings, self.dropout, self.training).to(self._lm.dtype)
        positions = torch.arange(len(embeddings), device=embeddings.device)
        return record_activations(
            self._lm, inputs_embeds=embeddings[None], position_ids=positions[None]
        )

    def set_kv(self, kv: PrefixKV) -> None:
        raise ValueError("embeddings cannot start from keys and values; start them from tokens")

    @torch.no_grad()
    def set_tokens(self, tokens: Sequence[int]) -> None:
        """Start from the embeddings of P tokens. Raises ValueError for any other number."""
        if len(tokens) != len(self.embeddings):
            raise ValueError(f"{len(tokens)} tokens for {len(self.embeddings)} embeddings")
        ids = torch.tensor(list(tokens), device=self._lm.device)
        self.embeddings.copy_(self._lm.module.get_input_embeddings()(ids))


class Infix(PrefixParameters):
    """Parameters of any kind whose keys and values stand between the input and the output,
    [x; INFIX; y], so the input is read without them. Decoder-only LMs."""

    def __init__(self, parameters: PrefixParameters) -> None:
        super().__init__()
        self.inner = parameters
        self.lengths = parameters.lengths

    def forward(self) -> InfixKV:
        return InfixKV(self.inner())

    def set_kv(self, kv: PrefixKV) -> None:
        self.inner.set_kv(kv)
