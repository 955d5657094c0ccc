"""The words that the trainer's modules share: where a prefix goes and what it looks like there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["SITES", "InfixKV", "PrefixKV", "Site", "SiteShape"]

Site = Literal["decoder", "encoder", "cross"]
SITES: tuple[Site, ...] = ("decoder", "encoder", "cross")

PrefixKV = Mapping[Site, tuple[Tensor, Tensor]]
"""site -> keys and values [L, H_kv, P, D], as attention sees them (keys after RoPE)"""


class InfixKV(dict[Site, tuple[Tensor, Tensor]]):
    """Keys and values as a PrefixKV's, of the paper's ablation [x; INFIX; y]. Being a type of its
    own, it runs where it was trained to stand and cannot be saved as a prefix."""


class SiteShape(NamedTuple):
    """The KV that one site of the LM takes, the same in all its layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
