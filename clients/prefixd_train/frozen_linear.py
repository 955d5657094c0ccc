"""Linear layers of the frozen LM on CPUs where torch's usual product is slow.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that Intel did not
make; oneDNN, which torch also has, uses AVX-512 there and takes half the time. torch has no
derivative for it, but of a frozen layer only the input's is needed, which is one more product.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = ["speed_up_frozen", "uses_onednn"]


def speed_up_frozen(module: nn.Module) -> None:
    """Has float32 linear layers (and GPT-2's Conv1D) without trained weights computed by oneDNN
    where that pays. Weights stay as they are; a layer whose weight requires a gradient, is on
    another device or runs under autocast is computed as before. Results differ in rounding only."""
    if not uses_onednn():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_linear, layer)  # type: ignore[method-assign]
        elif type(layer) is Conv1D:
            layer.forward = MethodType(_conv1d, layer)


@cache
def uses_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if not _suits(layer.weight, x):
        return F.linear(x, layer.weight, layer.bias)
    return _product(x, layer.weight, layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    if not _suits(layer.weight, x):
        return Conv1D.forward(layer, x)  # type: ignore[no-any-return]
    return _product(x, layer.weight.t(), layer.bias)


def _suits(weight: Tensor, x: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., K], weight: [N, K] in any order of strides, bias: [N]."""
    y: Tensor = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(dy, weight.t()), None


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return y
