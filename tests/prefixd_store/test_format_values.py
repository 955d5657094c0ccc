"""Values that are not finite, and casts between dtypes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prefixd_store import (
    InvalidPrefix,
    PrefixArray,
    arrays,
    read_manifest,
    validate_file,
    write_prefix,
)
from prefixd_store import format as format_module
from tests.prefixd_store.checkpoints import random_arrays, to_torch
from tests.prefixd_store.format_files import DTYPES, metadata


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scan_bytes", [16, 8 << 20])
def test_a_value_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, value: float, scan_bytes: int
) -> None:
    monkeypatch.setattr(format_module, "_SCAN_BYTES", scan_bytes)
    tensors = random_arrays(dtype=dtype)
    bad = tensors["decoder.value"].data
    bits = PrefixArray.of(np.array([value], np.float32)).cast(dtype).data[0]
    bad[1, 2, 3, 1] = bad[1, 2, 4, 0] = bits
    expected = r"decoder\.value\[1, 2, 3, 1\] is " + ("NaN" if np.isnan(value) else "infinite")

    with pytest.raises(InvalidPrefix, match=expected) as error:
        write_prefix(tmp_path / "ours", tensors, query_offset=5)
    assert error.value.param == "decoder.value"
    assert not (tmp_path / "ours").exists()

    save_file({k: to_torch(v) for k, v in tensors.items()}, tmp_path / "theirs", metadata())
    read_manifest(tmp_path / "theirs")
    with pytest.raises(InvalidPrefix, match=expected):
        validate_file(tmp_path / "theirs")


def test_the_finite_check_agrees_with_numpy_on_every_16_bit_pattern() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for array in (PrefixArray(every.view(np.float16), "float16"), PrefixArray(every, "bfloat16")):
        finite = np.isfinite(array.to_float32())
        for i in random.Random(0).sample(range(1 << 16), 2000):
            one = PrefixArray(array.data[i : i + 1], array.dtype)
            assert (arrays.first_non_finite(one) is None) == finite[i]
        assert arrays.first_non_finite(array) == int(np.argmin(finite))


def test_bfloat16_agrees_with_torch() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(every.copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(arrays.bfloat16_to_float32(every), theirs)

    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halfway = (every.astype(np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, halfway, halfway + 1, halfway - 1]).view(np.float32)
    ours = arrays.bfloat16_to_float32(arrays.float32_to_bfloat16(values))
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_agrees_with_torch(dtype: Any) -> None:
    values = np.array([0, -0.0, 1 / 3, 1e-8, 65519, 65520, 3e38], np.float32)
    ours = to_torch(PrefixArray.of(values).cast(dtype))
    assert torch.equal(ours, torch.from_numpy(values).to(getattr(torch, dtype)))
