"""Products with packed weights, in float32 and in int8, against numpy's in float64, with each
instruction set's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixd_server.models.quantized import restored
from prefixd_server.native import kernels
from prefixd_server.native.gemm import GROUP, Gemm, PackedWeight
from tests.support.isa import ISAS, kernels_of
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler"),
]

SIZES = (1, 7, 15, 16, 17, 47, 48, 49, 100, 576)
DEEP = 2500
"""more than a panel's depth, twice"""


@pytest.fixture(params=ISAS)
def gemm(request: pytest.FixtureRequest, tmp_path: Path) -> Gemm:
    return kernels_of(request.param, tmp_path).gemm


@pytest.fixture(params=["float32", "int8"])
def bits(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pack(gemm: Gemm, bits: str, *shape: int) -> tuple[Tensor, PackedWeight]:
    """A weight [out, in], and what is multiplied in its place."""
    if bits == "float32":
        return (weight := random(*shape)), gemm.pack(weight)
    integers, scales = random_int8(*shape)
    return restored(integers, scales), gemm.pack_int8(integers, scales)


def random_int8(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    integers = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    return integers, torch.rand(shape[0], -(-shape[1] // GROUP), generator=generator) / 64


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
def test_every_number_of_rows(gemm: Gemm, bits: str, out_features: int) -> None:
    for in_features in SIZES:
        bias = random(out_features)
        weight, packed = pack(gemm, bits, out_features, in_features)
        for rows in (*range(1, 18), 31, 32, 33, 40):
            x = random(rows, in_features)
            with_bias = bias if rows % 2 else None
            output = gemm.linear(x, packed, with_bias)
            assert_product(output, x, weight, with_bias)


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_deep_sums(gemm: Gemm, bits: str, rows: int) -> None:
    bias, x = random(50), random(rows, DEEP)
    weight, packed = pack(gemm, bits, 50, DEEP)
    assert_product(gemm.linear(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("in_features", [40, DEEP])
def test_strides_and_adding(gemm: Gemm, bits: str, in_features: int) -> None:
    columns = slice(2, in_features + 2)
    x = random(20, in_features + 5)[:11, columns]
    if bits == "float32":
        weight = random(60, in_features + 5)[:50, columns]
        packed = gemm.pack(weight)
    else:
        integers = random_int8(60, in_features + 5)[0][:50, columns]
        scales = random_int8(50, in_features)[1]
        weight, packed = restored(integers, scales), gemm.pack_int8(integers, scales)
    output = random(11, 70)
    before = output.clone()
    gemm.add_linear(x, packed, random(50), output[:, 8:58])
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
def test_a_row_is_the_same_to_the_bit_in_any_company(
    gemm: Gemm, bits: str, in_features: int
) -> None:
    """Of rows and of threads; so what a request is answered does not hang on its batch."""
    _, packed = pack(gemm, bits, 200, in_features)
    x, bias = random(40, in_features), random(200)
    alone = torch.cat([gemm.linear(row[None], packed, bias) for row in x])
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 5, 8, 9, 13, 32, 40):
            assert torch.equal(gemm.linear(x[:rows], packed, bias), alone[:rows]), (threads, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(gemm: Gemm, bits: str, value: float) -> None:
    _, packed = pack(gemm, bits, 50, 30)
    x = random(13, 30)
    clean = gemm.linear(x, packed)
    x[4] = value
    output = gemm.linear(x, packed)
    assert not output[4].isfinite().any()
    others = torch.arange(13) != 4
    assert torch.equal(output[others], clean[others])


def test_packed_weights_begin_at_cache_lines_and_share_no_memory(gemm: Gemm) -> None:
    made = [pack(gemm, bits, n, 33) for n in (1, 50, 300, 17) for bits in ("float32", "int8")]
    assert all(packed.data.data_ptr() % 64 == 0 for _, packed in made)
    x = random(5, 33)
    for weight, packed in made:
        assert_product(gemm.linear(x, packed), x, weight, None)


@pytest.mark.parametrize("in_features", [1, 63, 64, 66, 576, DEEP])
def test_int8_is_float32_with_the_restored_weights_to_the_bit(gemm: Gemm, in_features: int) -> None:
    weight, packed = pack(gemm, "int8", 100, in_features)
    x = random(9, in_features)
    assert torch.equal(gemm.linear(x, packed), gemm.linear(x, gemm.pack(weight)))


def test_int8_takes_little_more_than_a_quarter_of_the_memory(gemm: Gemm) -> None:
    floats, integers = (pack(gemm, bits, 96, 640)[1] for bits in ("float32", "int8"))
    assert len(integers.data) / len(floats.data) == 1 / 4 + 1 / GROUP
