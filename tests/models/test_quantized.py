"""Linear layers with int8 weights: their error's bound, every family, programs of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models import loader, quantized
from prefixd_server.models.loader import load_model
from prefixd_server.models.packed import (
    FrozenLayer,
    PackedLinear,
    _is_linear,
    _weight_and_bias,
    can_pack,
)
from prefixd_server.models.probe import _run_packed
from prefixd_server.models.quantized import (
    _LARGEST,
    quantize,
    quantized_linear,
    restored,
    rounded,
)
from prefixd_server.native import kernels
from prefixd_server.native.gemm import GROUP
from prefixd_server.native.program import Kind
from tests.support.families import FAMILIES
from tests.support.models import tiny_model_folder
from tests.support.seq2seq import FAMILIES as SEQ2SEQ
from tests.support.seq2seq import tiny_seq2seq_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not can_pack(torch.device("cpu"), torch.float32), reason="torch has no oneDNN"
    ),
]
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler")

TOKENS = torch.arange(1, 9)[None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one layer ------------------------------------------------------------------------------------


@pytest.fixture(params=["own", "oneDNN's"], ids=["own kernels", "no kernels"])
def kernels_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "own":
        monkeypatch.setattr(kernels, "load", lambda: None)
    elif kernels.load() is None:
        pytest.skip("there is no C++ compiler")


@pytest.mark.usefixtures("kernels_or_not")
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (50, 37), (192, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_output_is_off_by_half_a_step_of_its_weights(
    rows: int, outputs: int, inputs: int, has_bias: bool
) -> None:
    # Rows and groups of very different sizes, which one scale for all could not serve.
    x = normal(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    size = torch.logspace(-2, 2, outputs)[:, None] * 10.0 ** (torch.arange(inputs) // GROUP % 3)
    weight = normal(outputs, inputs, seed=1) * size
    bias = normal(outputs, seed=2) if has_bias else None
    y = quantized_linear(weight, bias)(x)
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + (0 if bias is None else bias.double())
    groups = zip(x.split(GROUP, 1), weight.split(GROUP, 1), strict=True)
    bound = sum(a.abs().sum(1, keepdim=True) * w.abs().amax(1) / _LARGEST / 2 for a, w in groups)
    float32 = x.abs() @ weight.abs().T * 1e-5
    assert ((y - exact).abs() <= bound + float32 + exact.abs() * 1e-6).all()


def test_numbers_that_int8_holds_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 100), generator=generator).float()
    weight[:, ::GROUP] = 127
    assert torch.equal(restored(*rounded(weight)), weight)


@pytest.mark.usefixtures("kernels_or_not")
def test_zero_weights_and_empty_inputs() -> None:
    linear = quantized_linear(torch.zeros(32, 80), None)
    assert torch.equal(linear(normal(3, 80)), torch.zeros(3, 32))
    assert linear(torch.empty(1, 0, 80)).shape == (1, 0, 32)


def test_a_weight_in_any_memory_order() -> None:
    """That of a Conv1D is transposed."""
    weight, x = normal(48, 64), normal(3, 64, seed=1)
    transposed = weight.t().contiguous().t()
    assert torch.equal(quantized_linear(transposed, None)(x), quantized_linear(weight, None)(x))


# --- whole models ---------------------------------------------------------------------------------


def relative(logits: Tensor, wanted: Tensor) -> float:
    """Of the median token: rounding may send a token to another expert."""
    return ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()


def num_quantized(module: nn.Module) -> int:
    return sum(isinstance(m, PackedLinear) and m.packed.int8 for m in module.modules())


def round_weights(module: nn.Module) -> None:
    """Those of linear layers, which stay in float32."""
    for layer in module.modules():
        if _is_linear(layer):
            weight = restored(*rounded(_weight_and_bias(layer)[0]))
            # A new one: the embedding, which may share the old one, stays.
            layer.weight = nn.Parameter(weight.t() if isinstance(layer, Conv1D) else weight)


@pytest.mark.parametrize("title", FAMILIES)
def test_logits_are_those_of_the_rounded_weights(title: str, tmp_path: Path) -> None:
    folder = str(FAMILIES[title].save(tmp_path))
    plain = load_model(ModelConfig(model=folder, device="cpu", pack_weights=False))
    model = load_model(ModelConfig(model=folder, device="cpu", dtype="int8"))
    assert [plain.weights, model.weights] == ["float32", "int8"]
    assert model.dtype == torch.float32
    with torch.inference_mode():
        exact = _run_packed(plain.module, TOKENS)[1]
        round_weights(plain.module)
        wanted, logits = (_run_packed(m.module, TOKENS)[1] for m in (plain, model))
    assert relative(logits, wanted) < 1e-4
    assert 1e-4 < relative(logits, exact) < 0.05


@needs_kernels
@pytest.mark.parametrize("title", ["Llama", "GPT-2", "Gemma 2"])
def test_a_program_runs_int8(title: str, tmp_path: Path) -> None:
    """Checked against the modules when it was made; so its products must be these."""
    model = load_model(ModelConfig(model=str(FAMILIES[title].save(tmp_path)), dtype="int8"))
    assert model.program is not None
    linears = [op for op in model.program.operations if op.kind is Kind.LINEAR]
    assert linears
    assert all(op.int8 for op in linears)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_gives_the_logits_of_the_rounded_weights(
    family: str, tmp_path: Path
) -> None:
    folder = tiny_seq2seq_folder(family, tmp_path)
    own, other = (
        AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
        for _ in range(2)
    )
    arguments = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False}
    with torch.inference_mode():
        exact = own(**arguments).logits
        quantize(own, partial(own, **arguments))
        assert num_quantized(own) or kernels.load() is None
        round_weights(other)
        logits = own(**arguments).logits
        assert relative(logits, other(**arguments).logits) < 1e-4
        assert 1e-4 < relative(logits, exact) < 0.05


def test_the_embedding_stays_and_float_weights_are_freed_one_by_one(tmp_path: Path) -> None:
    module: Any = load_model(
        ModelConfig(model=str(tiny_model_folder("llama", tmp_path)), pack_weights=False)
    ).module
    embedding = module.get_input_embeddings().weight
    layers = [m for m in module.modules() if type(m) is nn.Linear]
    weights = [weakref.ref(m.weight) for m in layers if m.weight is not embedding]
    del layers
    alive: list[int] = []

    def counting(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in weights))
        return rounded(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "rounded", counting)
        quantize(module)
    gc.collect()
    assert module.get_input_embeddings().weight is embedding
    assert isinstance(module.get_output_embeddings(), FrozenLayer)
    assert not any(ref() for ref in weights)
    assert alive[-1] <= 1
    assert alive == sorted(alive, reverse=True)


# --- refused --------------------------------------------------------------------------------------


def cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(loader, "resolve_device", lambda device: "cuda")
    return "the model would be on cuda"


def no_onednn(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    return "is for CPUs, with oneDNN"


@pytest.mark.parametrize("where", [cuda, no_onednn])
def test_where_int8_cannot_run(
    where: Callable[[pytest.MonkeyPatch], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = where(monkeypatch)
    with pytest.raises(UnsupportedModel, match=f"--dtype int8.*{reason}"):
        load_model(ModelConfig(model=str(tmp_path), dtype="int8"))
