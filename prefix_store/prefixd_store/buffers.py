"""Memory for a blob on its way in."""

from __future__ import annotations

import numpy as np

__all__ = ["READ_PIECE", "new_buffer"]

READ_PIECE = 1 << 20
"""bytes read at a time: a piece is still in the CPU's cache when it is hashed, and no copy of one
under the interpreter's lock holds up other threads for long"""


def new_buffer(size: int) -> memoryview:
    """``size`` writable bytes of any content.

    A bytearray would be zeroed first, under the interpreter's lock; these pages come into being
    where they are filled, mostly in a system call that other threads need not wait for.
    """
    return np.empty(size, np.uint8).data
