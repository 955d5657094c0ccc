"""The three dtypes a prefix may have, in numpy, which lacks bfloat16: its bits are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from prefixd_store.errors import InvalidPrefix

__all__ = [
    "DType",
    "PrefixArray",
    "bfloat16_to_float32",
    "check_finite",
    "first_non_finite",
    "float32_to_bfloat16",
]

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[DType, ...] = get_args(DType)

STORAGE: dict[DType, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""How each dtype lies in memory and on disk: little-endian."""

# A float is infinite or NaN exactly when all bits of its exponent are set.
_EXPONENT: dict[DType, int] = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
_CHUNK = 1 << 20

Raw = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class PrefixArray:
    """A tensor: ``data`` is float32, float16, or uint16 holding the bit patterns of bfloat16."""

    data: Raw
    dtype: DType

    def __post_init__(self) -> None:
        expected = STORAGE[self.dtype]
        assert self.data.dtype == expected, f"{self.dtype} is held as {expected}"

    @classmethod
    def of(cls, data: Raw) -> PrefixArray:
        """Wrap a float32 or float16 array."""
        return cls(data, "float16" if data.dtype == np.float16 else "float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def to_float32(self) -> npt.NDArray[np.float32]:
        if self.dtype == "bfloat16":
            return bfloat16_to_float32(self.data)
        return self.data.astype(np.float32, copy=False)

    def cast(self, dtype: DType) -> PrefixArray:
        """Round to nearest even where ``dtype`` is narrower; overflow becomes infinity."""
        if dtype == self.dtype:
            return self
        wide = self.to_float32()
        if dtype == "bfloat16":
            return PrefixArray(float32_to_bfloat16(wide), dtype)
        with np.errstate(over="ignore"):
            return PrefixArray(wide.astype(STORAGE[dtype]), dtype)


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact: a bfloat16 is the upper half of the float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, as torch does; NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    ties_to_even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded = ((bits + ties_to_even) >> 16).astype(np.uint16)
    # The addition above may carry a NaN's payload into its exponent.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def first_non_finite(array: PrefixArray) -> int | None:
    """Flat index of the first NaN or infinity, looking at bit patterns a chunk at a time."""
    mask = _EXPONENT[array.dtype]
    flat = array.data.reshape(-1).view(f"<u{array.data.itemsize}")
    for start in range(0, flat.size, _CHUNK):
        exponents = flat[start : start + _CHUNK] & mask
        if exponents.max() == mask:
            return start + int(exponents.argmax())
    return None


def check_finite(
    name: str, array: PrefixArray, start: int = 0, shape: Sequence[int] | None = None
) -> None:
    """Raise :class:`InvalidPrefix` with the index of the first NaN or infinity of tensor ``name``.

    ``array`` may be a run of a tensor of ``shape``, beginning at its flat index ``start``.
    """
    found = first_non_finite(array)
    if found is None:
        return
    index = [int(i) for i in np.unravel_index(start + found, tuple(shape or array.shape))]
    value = PrefixArray(array.data.reshape(-1)[found : found + 1], array.dtype).to_float32()[0]
    word = "NaN" if np.isnan(value) else "infinite"
    raise InvalidPrefix(f"{name}{index} is {word}; every value must be finite", param=name)
