"""Which attention backend a configuration gets, where there is a device and where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prefixd_server.wiring as wiring
from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are asked for; Triton's kernels cannot be compiled."""
    names: list[str] = []

    def create(name: str, pool: Any) -> Any:
        names.append(name)
        return SimpleNamespace(check=_no_compiler)

    def _no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(wiring, "create_backend", create)
    return names


def pool_on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_the_reference_serves_where_the_kernel_cannot(
    made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    wiring._make_backend(ModelConfig(), pool_on("cuda"))
    assert made == ["triton", "sdpa"]
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_kernel_that_was_asked_for_is_had_or_nothing(made: list[str], device: str) -> None:
    with pytest.raises(UnsupportedModel, match="--attention triton"):
        wiring._make_backend(ModelConfig(attention="triton"), pool_on(device))
    assert "sdpa" not in made


def test_a_cpu_never_looks_for_a_kernel(made: list[str]) -> None:
    wiring._make_backend(ModelConfig(), pool_on("cpu"))
    wiring._make_backend(ModelConfig(attention="sdpa"), pool_on("cuda"))
    assert made == ["sdpa", "sdpa"]
