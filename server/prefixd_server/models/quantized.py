"""Linear layers with weights in int8: a quarter of the memory that a step of decoding reads.

Weights are rounded once, with a scale for each group of an output's; inputs and sums stay float32.
So a weight is off by no more than half a step of its group's scale, and nothing else is off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixd_server.models.packed import PackedLinear, fast_gemm, pack, packed_linear
from prefixd_server.native.gemm import GROUP

__all__ = ["quantize", "quantized_linear", "restored", "rounded"]

log = logging.getLogger(__name__)

_LARGEST = 127
"""of a rounded weight"""
_TINIEST = 1e-30
"""a scale is at least this, so that a group of zeros stays zeros"""


def quantize(module: Any, run: Callable[[], object] | None = None) -> None:
    """What :func:`pack` does to the float32 ``module``, with all linear layers rounded, the output
    layer too. Embeddings stay. Each layer's float32 weight is freed before the next."""
    if fast_gemm() is None:
        log.warning("no CPU kernels for int8: rounded weights will take float32's memory and time")
    pack(module, run, quantized_linear)


def quantized_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """For weight [out, in] and bias [out] in float32."""
    integers, scales = rounded(weight)
    gemm = fast_gemm()
    if gemm is None:
        return packed_linear(restored(integers, scales), bias)
    return PackedLinear(gemm, gemm.pack_int8(integers, scales), bias)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in], and scales [out, groups]: a group's largest magnitude / 127."""
    out_features, in_features = weight.shape
    num_groups = -(-in_features // GROUP)
    groups = F.pad(weight.contiguous(), (0, num_groups * GROUP - in_features)).view(
        -1, num_groups, GROUP
    )
    scales = groups.abs().amax(-1).div_(_LARGEST).clamp_min_(_TINIEST)
    integers = groups.div(scales[..., None]).round_().to(torch.int8)
    return integers.view(out_features, -1)[:, :in_features], scales


def restored(integers: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [out, in] that the integers and scales of :func:`rounded` stand for."""
    return integers * scales.repeat_interleave(GROUP, 1)[:, : integers.shape[1]]
