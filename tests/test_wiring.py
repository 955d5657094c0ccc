"""Which attention backend a configuration gets, where there is a device and where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prefixd_server.wiring as wiring
from prefixd_server.errors import UnsupportedModel
from prefixd_server.native import kernels


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are asked for; only the reference runs on this machine."""
    names: list[str] = []

    def create(name: str, pool: Any) -> Any:
        names.append(name)
        return SimpleNamespace(check=lambda: None if name == "sdpa" else _no_compiler())

    def _no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(wiring, "create_backend", create)
    monkeypatch.setattr(kernels, "load", object)
    return names


def pool_on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(("device", "fastest"), [("cuda", "triton"), ("cpu", "native")])
def test_the_reference_serves_where_the_kernel_cannot(
    made: list[str], caplog: pytest.LogCaptureFixture, device: str, fastest: str
) -> None:
    wiring._make_backend("auto", pool_on(device))
    assert made == [fastest, "sdpa"]
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_kernel_that_was_asked_for_is_had_or_nothing(made: list[str], name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"--attention {name}"):
        wiring._make_backend(name, pool_on("cpu"))
    assert "sdpa" not in made


def test_the_reference_is_had_where_asked_for_or_where_the_pool_is_not_float32(
    made: list[str],
) -> None:
    wiring._make_backend("sdpa", pool_on("cuda"))
    wiring._make_backend("auto", pool_on("cpu", torch.bfloat16))
    assert made == ["sdpa", "sdpa"]


def test_kernels_that_could_not_be_compiled_are_not_asked_for(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    wiring._make_backend("auto", pool_on("cpu"))
    assert made == ["sdpa"]
