"""The paper's embedding-only ablation, to compare a prefix with.

(Its other one, the infix, is a placement and not a parameterisation: ``placement="infix"`` of
:func:`~prefixd_train.inject.forward`, with any parameters.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixd_train.initialise import record_activations
from prefixd_train.lm import FrozenLM
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.sites import PrefixKV

__all__ = ["EmbeddingPrefix"]


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
