"""Where a prefix starts from: words, a document, another prefix. Random is the module's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from prefixd_train.lm import FrozenLM
from prefixd_train.sites import PrefixKV, Site

__all__ = ["activations_of_tokens", "from_prefix_file", "from_text", "from_words"]


def activations_of_tokens(
    lm: FrozenLM, tokens: Sequence[int], sites: Sequence[Site] = ("decoder",)
) -> PrefixKV:
    """The LM's own keys and values of these tokens, at positions 0..len-1."""
    raise NotImplementedError


def from_words(lm: FrozenLM, words: str, lengths: Mapping[Site, int]) -> PrefixKV:
    """Activations of ``words``, repeated or cut to P tokens (the paper's)."""
    raise NotImplementedError


def from_text(
    lm: FrozenLM,
    text: str,
    lengths: Mapping[Site, int],
    *,
    choose: Literal["first", "even"] = "first",
) -> PrefixKV:
    """Activations of a text at its first P positions, or of P evenly chosen ones."""
    raise NotImplementedError


def from_prefix_file(lm: FrozenLM, path: Path, lengths: Mapping[Site, int]) -> PrefixKV:
    """The values of a prefix file of the same P. Raises ValueError."""
    raise NotImplementedError
