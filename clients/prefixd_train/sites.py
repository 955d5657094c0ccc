"""The words that the trainer's modules share: where a prefix goes and what it looks like there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["SITES", "Placement", "PrefixKV", "Site", "SiteShape"]

Site = Literal["decoder", "encoder", "cross"]
SITES: tuple[Site, ...] = ("decoder", "encoder", "cross")

PrefixKV = Mapping[Site, tuple[Tensor, Tensor]]
"""site -> keys and values [L, H_kv, P, D], as attention sees them (keys after RoPE)"""

Placement = Literal["prefix", "infix"]
"""prefix: [PREFIX; x; y]. infix, an ablation of the paper: [x; INFIX; y]"""


class SiteShape(NamedTuple):
    """The KV that one site of the LM takes, the same in all its layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
