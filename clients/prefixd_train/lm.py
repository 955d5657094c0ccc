"""Loads the LM that stays frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixd_train.sites import Site, SiteShape

__all__ = ["FrozenLM", "load_lm"]


@dataclass(frozen=True, eq=False)
class FrozenLM:
    module: Any
    """transformers' own model: eval mode, nothing requires grad, our attention function installed"""
    tokenizer: Any
    name: str
    folder: Path | None
    fingerprint: str | None
    is_encoder_decoder: bool
    shapes: Mapping[Site, SiteShape]
    """the sites that this LM has"""

    @property
    def device(self) -> Any: ...

    def checksum(self) -> str:
        """SHA-256 over all weights: the same before and after training."""
        raise NotImplementedError

    def query_offset(self, lengths: Mapping[Site, int]) -> int:
        """The position of the first own token behind a prefix of these lengths: P, but 0 where an
        encoder with absolute positions has one."""
        raise NotImplementedError


def load_lm(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache_dir: Path = Path("~/.cache/prefixd"),
) -> FrozenLM:
    """``model``: a folder, a hub name or "demo". Raises ``UnsupportedModel`` (a ValueError)."""
    raise NotImplementedError
