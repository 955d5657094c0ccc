"""Products with packed weights against numpy's in float64, with each instruction set's kernels."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixd_server.native import kernels
from prefixd_server.native.build import default_folder, library
from prefixd_server.native.gemm import Gemm
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler"),
]

SIZES = (1, 7, 15, 16, 17, 47, 48, 49, 100, 576)
DEEP = 2500
"""more than a panel's depth, twice"""


@pytest.fixture(params=["avx512", "avx2", "generic"])
def gemm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gemm:
    """A copy of the library, which chooses its kernels anew."""
    monkeypatch.setenv("PREFIXD_NATIVE_ISA", request.param)
    copy = shutil.copy(library(default_folder()), tmp_path / f"{request.param}.so")
    made = Gemm(ctypes.CDLL(copy))
    if made.isa != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_product(
    output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | float = 0.0
) -> None:
    wanted = x.double().numpy() @ weight.double().numpy().T + np.asarray(added, dtype=np.float64)
    if bias is not None:
        wanted = wanted + bias.double().numpy()
    # Of sums of k products of normal values.
    np.testing.assert_allclose(output.numpy(), wanted, atol=1e-6 * weight.shape[1], rtol=1e-6)


@pytest.mark.parametrize("out_features", SIZES)
def test_every_number_of_rows(gemm: Gemm, out_features: int) -> None:
    for in_features in SIZES:
        weight, bias = random(out_features, in_features), random(out_features)
        packed = gemm.pack(weight)
        for rows in (*range(1, 18), 31, 32, 33, 40):
            x = random(rows, in_features)
            with_bias = bias if rows % 2 else None
            output = gemm.linear(x, packed, with_bias)
            assert_product(output, x, weight, with_bias)


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_deep_sums(gemm: Gemm, rows: int) -> None:
    weight, bias, x = random(50, DEEP), random(50), random(rows, DEEP)
    assert_product(gemm.linear(x, gemm.pack(weight), bias), x, weight, bias)


@pytest.mark.parametrize("in_features", [40, DEEP])
def test_strides_and_adding(gemm: Gemm, in_features: int) -> None:
    room = random(3, 60, in_features + 5)
    weight = room[0, :50, 2 : in_features + 2]
    x = room[1, :11, 3 : in_features + 3]
    output = random(11, 70)
    before = output.clone()
    gemm.add_linear(x, gemm.pack(weight), random(50), output[:, 8:58])
    assert_product(output[:, 8:58], x, weight, random(50), before[:, 8:58])
    assert torch.equal(output[:, :8], before[:, :8]), "wrote before its columns"
    assert torch.equal(output[:, 58:], before[:, 58:]), "wrote after its columns"


def test_inputs_of_any_layout(gemm: Gemm) -> None:
    weight = random(20, 30)
    packed = gemm.pack(weight)
    for x in (random(30), random(2, 3, 30), random(30, 4).t(), random(2, 9, 60)[:, ::3, 30:]):
        output = gemm.linear(x, packed)
        assert output.shape == (*x.shape[:-1], 20)
        assert_product(output, x, weight, None)
    assert gemm.linear(torch.empty(0, 30), packed).shape == (0, 20)


@pytest.mark.parametrize("in_features", [576, DEEP])
def test_a_row_is_the_same_to_the_bit_in_any_company(gemm: Gemm, in_features: int) -> None:
    """Of rows and of threads; so what a request is answered does not hang on its batch."""
    packed, x = gemm.pack(random(200, in_features)), random(40, in_features)
    alone = torch.cat([gemm.linear(row[None], packed) for row in x])
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 5, 8, 9, 13, 32, 40):
            assert torch.equal(gemm.linear(x[:rows], packed), alone[:rows]), (threads, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(gemm: Gemm, value: float) -> None:
    weight, x = random(50, 30), random(13, 30)
    packed = gemm.pack(weight)
    clean = gemm.linear(x, packed)
    x[4] = value
    output = gemm.linear(x, packed)
    assert not output[4].isfinite().any()
    others = torch.arange(13) != 4
    assert torch.equal(output[others], clean[others])


def test_packed_weights_begin_at_cache_lines_and_share_no_memory(gemm: Gemm) -> None:
    weights = [random(n, 33) for n in (1, 50, 300, 17)]
    packed = [gemm.pack(weight) for weight in weights]
    assert all(p.data.data_ptr() % 64 == 0 for p in packed)
    x = random(5, 33)
    for weight, p in zip(weights, packed, strict=True):
        assert_product(gemm.linear(x, p), x, weight, None)
