"""Linear layers in int8 on the CPU: a quarter of the weights' memory, and faster products.

Weights are rounded once, with a scale for each output; inputs are rounded in each step, with a
scale for each row (token), as in LLM.int8() without its outliers (arXiv 2208.07339) and in vLLM's
W8A8. The product of integers is exact, so a row's result depends on nothing else in the batch.
Everything else, the output layer too, stays float32.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixd_server.models.packed import FrozenLayer, pack, pack_linear

__all__ = ["QuantizedLinear", "can_quantize", "quantize"]

_LARGEST = 127
"""of a rounded weight"""
_TINIEST = 1e-30
"""a scale is at least this, so that a row of zeros stays zeros"""


def can_quantize(device: torch.device) -> bool:
    """oneDNN's integer products are fast on x86 (AVX2 and later) only."""
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def quantize(module: Any, run: Callable[[], object] | None = None) -> None:
    """Replace the linear layers below the float32 ``module`` in place, and its RMS norms as
    :func:`pack` does, each layer's float32 weight freed before the next. Embeddings stay, and the
    output layer stays float32: over 2,016 tokens of the demo model, rounding it too raised the mean
    difference of log-probabilities from float32's from 0.27 to 0.32."""
    module.set_output_embeddings(pack_linear(module.get_output_embeddings()))
    pack(module, run, QuantizedLinear)


class QuantizedLinear(FrozenLayer):
    """y = x @ W.T + b with W [out, in] in int8; x [..., in] and y [..., out] are float32.

    With s_o = max|W_o| / 127 and t_r = max|x_r| / L: y = s_o t_r (round(x / t_r) · round(W / s_o)),
    so an output is off by no more than half a step of each input and each weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.float32)
        self.out_features, self.in_features = weight.shape
        self._scale = weight.abs().amax(1).div_(_LARGEST).clamp_min_(_TINIEST)
        rounded = weight.div(self._scale[:, None]).round_().to(torch.int8).contiguous()
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = bias
        # Without VNNI, products of 8 by 8 bits are added in pairs in 16 bits, where they saturate.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(-1, keepdim=True).div_(self._levels).clamp_min_(_TINIEST)
        # oneDNN is fast with unsigned inputs only. A conversion cuts, so one half more rounds.
        middle = self._levels + 1
        rounded = rows.div(scale).add_(middle + 0.5).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, middle, self._packed, self._scale, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if self._bias is None:
            y.mul_(scale)
        else:
            y = torch.addcmul(self._bias, y, scale)
        return y.view(*x.shape[:-1], self.out_features)
