"""Linear layers of the frozen LM by oneDNN, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prefixd_train import frozen_linear
from prefixd_train.frozen_linear import speed_up_frozen

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "uses_onednn", lambda: True)


def pair(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The layer as it was, and sped up, with frozen weights."""
    layer.requires_grad_(False)
    fast = copy.deepcopy(layer)
    speed_up_frozen(fast)
    return layer, fast


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    product = frozen_linear._onednn
    monkeypatch.setattr(
        frozen_linear, "_onednn", lambda x, w: (calls.append(len(x)), product(x, w))[1]
    )
    return calls


@pytest.mark.parametrize("make", [nn.Linear, lambda k, n: Conv1D(n, k)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (7, 24), (2, 33, 24)])
def test_output_and_gradient_are_torchs(
    make: object, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain, fast = pair(make(24, 40))  # type: ignore[operator]
    plain.bias.copy_(torch.randn(40))  # type: ignore[operator,union-attr]
    fast.load_state_dict(plain.state_dict())
    calls = counted(monkeypatch)
    weights = torch.randn(*shape[:-1], 40)
    results = []
    for layer in (plain, fast):
        x = torch.randn(shape, generator=torch.manual_seed(1), requires_grad=True)
        y = layer(x)
        # A gradient that is not contiguous, as that of an expanded tensor.
        (y * weights).sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert len(calls) == 2, "forward and backward are both oneDNN's"


def test_a_gradient_of_any_strides() -> None:
    plain, fast = pair(nn.Linear(8, 6, bias=False))
    for layer in (plain, fast):
        layer.x = torch.ones(5, 8, requires_grad=True)  # type: ignore[assignment]
        layer(layer.x).sum().backward()  # the gradient of a sum is one number, expanded
    torch.testing.assert_close(fast.x.grad, plain.x.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["trained", "float64", "autocast"])
def test_others_are_computed_as_before(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 6)
    plain, fast = pair(layer.double() if case == "float64" else layer)
    fast.requires_grad_(case == "trained")
    calls = counted(monkeypatch)
    x = torch.randn(3, 8, dtype=next(layer.parameters()).dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        y = fast(x)
        assert torch.equal(y, plain(x))
    y.sum().backward()
    assert not calls
    assert (fast.weight.grad is not None) == (case == "trained")  # type: ignore[union-attr]


def test_a_copy_uses_its_own_weights() -> None:
    _, fast = pair(nn.Linear(8, 6))
    other = copy.deepcopy(fast)
    other.weight.zero_()  # type: ignore[operator]
    other.bias.zero_()  # type: ignore[operator]
    assert not other(torch.ones(2, 8)).any()
    assert fast(torch.ones(2, 8)).any()
