"""What is trained: modules that hold a prefix and give its keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import nn

from prefixd_train.sites import PrefixKV, Site, SiteShape

__all__ = ["Parameterisation", "PrefixParameters", "make_prefix"]

Parameterisation = Literal["direct", "mlp", "mlp-deep"]


class PrefixParameters(nn.Module, ABC):
    """``forward()`` gives the keys and values; dropout acts on them only in training mode."""

    lengths: Mapping[Site, int]

    @abstractmethod
    def forward(self) -> PrefixKV: ...

    @abstractmethod
    def set_kv(self, kv: PrefixKV) -> None:
        """Start from these values: direct copies them, an MLP is fitted to them."""


def make_prefix(
    shapes: Mapping[Site, SiteShape],
    lengths: Mapping[Site, int],
    parameterisation: Parameterisation = "direct",
    *,
    hidden: int = 512,
    middle: int = 512,
    dropout: float = 0.0,
    frozen_first: int = 0,
) -> PrefixParameters:
    """``hidden``: the width of P'; ``middle``: of the MLP. ``frozen_first``: that many first tokens
    keep the values of ``set_kv`` (Cartridges). All lengths are equal, as a file has one P. Random
    values come from torch's global generator. Raises ValueError."""
    raise NotImplementedError
