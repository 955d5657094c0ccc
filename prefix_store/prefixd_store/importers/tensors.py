"""Tensors of a checkpoint, and the arithmetic and layouts that several formats share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefixd_store.arrays import STORAGE, DType, PrefixArray, check_finite
from prefixd_store.errors import InvalidPrefix, TooLarge
from prefixd_store.geometry import SiteGeometry
from prefixd_store.manifest import Limits
from prefixd_store.records import Site
from prefixd_store.tensorfile import TAGS, TensorSpec

__all__ = ["SourceTensor", "check_no_more", "common_dtype", "fit_rows", "run_mlp", "split_pairs"]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor where it lies in an uploaded file; nothing is read until it is asked for."""

    name: str
    path: Path
    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> DType:
        """Raises InvalidPrefix for a dtype that a prefix may not have."""
        if self.spec.tag not in TAGS:
            raise InvalidPrefix(
                f"{self.name[:200]} is {self.spec.tag[:40]}; accepted are {', '.join(TAGS)}",
                param=self.name,
            )
        return TAGS[self.spec.tag]

    def map(self) -> PrefixArray:
        """A memory map in the file's own dtype. The tensor must not be empty."""
        data = np.memmap(self.path, STORAGE[self.dtype], "r", self.spec.begin, self.shape)
        return PrefixArray(data, self.dtype)

    def read_float32(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """All of it in memory; InvalidPrefix for NaN and infinity, which arithmetic may hide."""
        array = self.map()
        check_finite(self.name, array)
        return array.to_float32()

    def expect(self, shape: tuple[int | str, ...]) -> tuple[int, ...]:
        """The tensor's shape, if it is ``shape``, where a letter stands for any size over 0."""
        fits = len(shape) == len(self.shape) and all(
            got > 0 and (isinstance(want, str) or got == want)
            for want, got in zip(shape, self.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(size) for size in shape)
            raise InvalidPrefix(
                f"{self.name[:200]} has shape {list(self.shape)}, expected [{wanted}]",
                param=self.name,
            )
        return self.shape


def check_no_more(tensors: Collection[str], used: Collection[str], what: str) -> None:
    """Refuse a checkpoint with tensors that the prefix does not account for."""
    extra = sorted(set(tensors) - set(used))
    if extra:
        raise InvalidPrefix(
            f"{what} also has {extra[0][:200]!r} (of {len(extra)} more tensors), which a prefix "
            "has no place for: the model here is frozen and shared",
            param=extra[0][:200],
        )


def common_dtype(tensors: Collection[SourceTensor]) -> DType:
    dtypes = sorted({tensor.dtype for tensor in tensors})
    if len(dtypes) != 1:
        raise InvalidPrefix(f"tensors differ in dtype ({', '.join(dtypes)})")
    return dtypes[0]


def run_mlp(
    tensors: Mapping[str, SourceTensor],
    wte: str,
    trans: str,
    *,
    limits: Limits,
    relu: bool = False,
) -> tuple[PrefixArray, list[str]]:
    """The rows [P, width] that ``trans(wte)`` gives in float32, and the tensors that it took.

    ``wte.weight`` [P, E] goes through torch.nn.Linear layers ``trans.0``, ``trans.2`` and, in the
    deep variant, ``trans.4``, with tanh (or relu) between them: P_θ[i] = MLP_θ(P'_θ[i]), section
    4.3 of https://arxiv.org/abs/2101.00190.
    """
    depth = 3 if f"{trans}.4.weight" in tensors else 2
    names = [f"{trans}.{2 * i}.{part}" for i in range(depth) for part in ("weight", "bias")]
    names.insert(0, f"{wte}.weight")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InvalidPrefix(f"{missing[0]} is missing, which {trans} needs", param=missing[0])
    table, *layers = (tensors[name] for name in names)
    tokens, size = table.expect(("P", "E"))
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        size = weight.expect(("out", size))[0]
        bias.expect((size,))
        _check_room(tokens, size, limits)
    rows = table.read_float32()
    # What overflows is infinite, and is refused where the prefix is written.
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            if i:
                rows = np.maximum(rows, 0) if relu else np.tanh(rows)
            rows = rows @ weight.read_float32().T + bias.read_float32()
    return PrefixArray(np.ascontiguousarray(rows, np.float32), "float32"), names


def _check_room(tokens: int, width: int, limits: Limits) -> None:
    # Before any arithmetic: small factors may have a huge product.
    if tokens > limits.max_virtual_tokens:
        raise InvalidPrefix(
            f"{tokens} virtual tokens, at most {limits.max_virtual_tokens} allowed",
            param="num_virtual_tokens",
        )
    if tokens * width * 4 > limits.max_bytes:
        raise TooLarge(
            f"[{tokens}, {width}] in float32 takes {tokens * width * 4} bytes, at most "
            f"{limits.max_bytes} allowed",
            param="prefix",
        )


def fit_rows(rows: PrefixArray, layers: int, site: SiteGeometry, what: str) -> None:
    """Refuse rows [P, width] that are not a key and a value for each of ``layers`` layers."""
    tokens, width = rows.shape
    expected = layers * 2 * site.num_kv_heads * site.head_dim
    if width != expected:
        raise InvalidPrefix(
            f"{what} gives [{tokens}, {width}] but the model takes [P, L*2*H_kv*D] = "
            f"[P, {layers}*2*{site.num_kv_heads}*{site.head_dim}] = [P, {expected}]",
            param=what,
        )


def split_pairs(
    rows: PrefixArray, site: Site, num_heads: int, head_dim: int, layers: list[int] | None = None
) -> dict[str, PrefixArray]:
    """Rows [P, 2L*H*D] as the tensors of a site [L, H, P, D]; views unless ``layers`` is given.

    Viewed as [P, 2L, H, D], row 2i has layer i's keys and row 2i+1 its values. ``layers`` names the
    saved pair that each layer of the model takes.
    """
    tokens = rows.shape[0]
    pairs = rows.data.reshape(tokens, -1, 2, num_heads, head_dim)
    if layers is not None:
        pairs = pairs[:, layers]
    return {
        # [P, L, H, D] to [L, H, P, D]
        f"{site}.{part}": PrefixArray(pairs[:, :, i].transpose(1, 2, 0, 3), rows.dtype)
        for i, part in enumerate(("key", "value"))
    }
