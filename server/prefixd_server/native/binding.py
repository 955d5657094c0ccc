"""C functions of a compiled library as typed Python functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["bind"]


def bind(function: Any, arguments: list[Any], result: Any = None) -> Callable[..., Any]:
    """Of ctypes types; calls release the GIL."""
    function.argtypes = arguments
    function.restype = result
    bound: Callable[..., Any] = function
    return bound
