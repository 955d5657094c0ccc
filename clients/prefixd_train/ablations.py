"""The paper's ablations: they are trained and evaluated to be compared with."""

from __future__ import annotations

from collections.abc import Mapping

from prefixd_train.lm import FrozenLM
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.sites import PrefixKV, Site

__all__ = ["EmbeddingPrefix"]


class EmbeddingPrefix(PrefixParameters):
    """Embedding-only: only the P input embeddings are trained, the LM makes the keys and values of
    them, as in prompt tuning. Decoder-only LMs. (The infix is ``placement="infix"`` of
    ``inject.forward`` and can have any parameters.)"""

    def __init__(self, lm: FrozenLM, length: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.lengths: Mapping[Site, int] = {"decoder": length}

    def forward(self) -> PrefixKV:
        raise NotImplementedError

    def set_kv(self, kv: PrefixKV) -> None:
        """Raises ValueError: embeddings start from words (:meth:`set_tokens`)."""
        raise NotImplementedError
