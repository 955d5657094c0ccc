"""What a configuration becomes: the attention backend, on a device and without, and the limits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prefixd_server.wiring as wiring
from prefixd_server.config import CacheConfig, Config, ModelConfig, SchedulerConfig, StoreConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models.loader import load_model
from prefixd_server.native import kernels
from tests.support.models import tiny_model_folder


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


def test_the_budgets_of_a_step_on_the_cpu(tmp_path: Path) -> None:
    folder = tiny_model_folder("llama", tmp_path / "model")
    model = load_model(ModelConfig(model=str(folder), device="cpu", threads=1))

    def limits(**given: int) -> tuple[int, int]:
        config = Config(
            store=StoreConfig(store=str(tmp_path / "store")),
            cache=CacheConfig(kv_cache_bytes=1 << 20),
            scheduler=SchedulerConfig(**given),
        )
        server = wiring.Server(config, model=model)
        server.close()
        scheduler = server.engine.scheduler
        return scheduler.max_num_batched_tokens, scheduler.max_prefill_tokens

    assert limits() == (512, 128)
    assert limits(max_num_batched_tokens=96, max_prefill_tokens=32) == (96, 32)
