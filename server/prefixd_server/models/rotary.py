"""Rotary embedding in one pass, for families that turn queries and keys as Llama does.

Modelling code calls a function of its own module, ``apply_rotary_pos_emb``, for a dozen small
operators. Where that function gives what the kernel gives, an attention module gets a ``forward``
that finds the kernel under this name; the library's module is left as it is for everybody else.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prefixd_server.native.kernels import Kernels

__all__ = ["use_kernel"]

_NAME = "apply_rotary_pos_emb"

Rotate = Callable[..., tuple[Tensor, Tensor]]


def use_kernel(module: nn.Module, kernels: Kernels) -> None:
    """Give the attention modules below ``module`` the kernel, where it computes the same."""
    forwards: dict[FunctionType, FunctionType | None] = {}
    for child in module.modules():
        forward = type(child).forward
        if isinstance(forward, FunctionType):
            if forward not in forwards:
                forwards[forward] = _with_kernel(forward, kernels)
            if (changed := forwards[forward]) is not None:
                child.forward = MethodType(changed, child)


def _with_kernel(forward: FunctionType, kernels: Kernels) -> FunctionType | None:
    """``forward`` with the kernel in it, in all its decorators; None: it has no use for it."""
    inner = getattr(forward, "__wrapped__", None)
    if isinstance(inner, FunctionType):
        changed = _with_kernel(inner, kernels)
        return None if changed is None else _decorated_as(forward, inner, changed)
    if _NAME not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(_NAME)
    if original is None or not _computes_the_same(original, kernels):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _serves(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)

    return _copied(forward, {**forward.__globals__, _NAME: rotate}, forward.__closure__)


def _decorated_as(
    wrapper: FunctionType, inner: FunctionType, changed: FunctionType
) -> FunctionType | None:
    """The wrapper of ``inner``, with ``changed`` in its place."""
    cells = wrapper.__closure__ or ()
    closure = tuple(CellType(changed) if _contents(c) is inner else c for c in cells)
    if closure == cells:
        return None  # a decorator that keeps what it wraps elsewhere
    return _copied(wrapper, wrapper.__globals__, closure)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


def _copied(
    function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None
) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """One packed step, all dimensions turned."""
    return (
        q.dim() == 4
        and q.shape[0] == 1
        and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        and k.shape[2:] == q.shape[2:]
        and q.stride(-1) == k.stride(-1) == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
        and q.dtype == k.dtype == cos.dtype == sin.dtype == torch.float32
    )


def _computes_the_same(original: Rotate, kernels: Kernels) -> bool:
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 5, 8, generator=random), torch.randn(1, 2, 5, 8, generator=random)
    cos, sin = torch.randn(2, 1, 5, 8, generator=random)
    try:
        expected = original(q, k, cos, sin)
        return all(
            torch.allclose(kernels.rotate(x, cos, sin), y, rtol=1e-5, atol=1e-6)
            for x, y in zip((q, k), expected, strict=True)
        )
    except Exception:
        # A function of this name with another meaning may fail in any way.
        return False
