"""int8 linear layers: their error's bound, rows that do not see each other, every family."""

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

from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models import loader
from prefixd_server.models.loader import load_model
from prefixd_server.models.probe import _run_packed
from prefixd_server.models.quantized import QuantizedLinear, can_quantize, quantize
from tests.support.families import FAMILIES
from tests.support.models import tiny_model_folder
from tests.support.seq2seq import FAMILIES as SEQ2SEQ
from tests.support.seq2seq import tiny_seq2seq_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not can_quantize(torch.device("cpu")), reason="int8 is for x86 with oneDNN"),
]

TOKENS = torch.arange(1, 9)[None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one layer ------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["vnni", "without vnni"])
def levels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """127 levels to each side of zero, or 63 on a processor without VNNI."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param)
    return 127 if request.param else 63


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (50, 37), (192, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_output_is_off_by_half_a_step_of_its_inputs_and_weights(
    levels: int, rows: int, outputs: int, inputs: int, has_bias: bool
) -> None:
    # Rows and outputs of very different sizes, which one scale for all could not serve.
    x = normal(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    weight = normal(outputs, inputs, seed=1) * torch.logspace(-2, 2, outputs)[:, None]
    bias = normal(outputs, seed=2) if has_bias else None
    y = QuantizedLinear(weight, bias)(x)
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + (0 if bias is None else bias.double())
    x_step = x.abs().amax(1, keepdim=True) / levels
    weight_step = weight.abs().amax(1) / 127
    bound = (
        x_step / 2 * weight.abs().sum(1)
        + x.abs().sum(1, keepdim=True) * weight_step / 2
        + inputs * x_step * weight_step / 4
    )
    assert ((y - exact).abs() <= bound * 1.001 + exact.abs() * 1e-6).all()


def test_products_do_not_saturate(levels: int) -> None:
    """The largest inputs and weights of one sign: pairs of products are largest."""
    y = QuantizedLinear(torch.full((32, 256), 3.0), None)(torch.full((4, 256), -2.0))
    torch.testing.assert_close(y, torch.full((4, 32), -1536.0))


def test_integers_are_exact(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-levels, levels + 1, (5, 64), generator=generator).float()
    weight = torch.randint(-127, 128, (48, 64), generator=generator).float()
    x[:, 0], weight[:, 0] = levels, 127
    assert torch.equal(QuantizedLinear(weight, None)(x), x @ weight.T)


def test_a_row_does_not_see_the_others() -> None:
    """To the bit, however many there are and whatever is in them."""
    linear = QuantizedLinear(normal(96, 64), normal(96))
    x = normal(200, 64, seed=1)
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(linear(x), alone)
    assert torch.equal(linear(x[None])[0], alone)
    x[1::2] *= 1e6
    x[3], x[5], x[7] = 0, float("nan"), float("inf")
    mixed = linear(x)
    assert torch.equal(mixed[::2], alone[::2])
    torch.testing.assert_close(mixed[3], linear._bias)
    assert not mixed[[5, 7]].isfinite().any()


def test_a_weight_in_any_memory_order() -> None:
    """That of a Conv1D is transposed."""
    weight, x = normal(48, 64), normal(3, 64, seed=1)
    transposed = weight.t().contiguous().t()
    assert torch.equal(QuantizedLinear(transposed, None)(x), QuantizedLinear(weight, None)(x))


def test_zero_weights_and_empty_inputs() -> None:
    linear = QuantizedLinear(torch.zeros(32, 16), None)
    assert torch.equal(linear(normal(3, 16)), torch.zeros(3, 32))
    assert linear(torch.empty(1, 0, 16)).shape == (1, 0, 32)


# --- whole models ---------------------------------------------------------------------------------


def relative(logits: Tensor, wanted: Tensor) -> float:
    """Of the median token: rounding may send a token to another expert."""
    return ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()


def num_quantized(module: nn.Module) -> int:
    return sum(isinstance(child, QuantizedLinear) for child in module.modules())


@pytest.mark.parametrize("title", FAMILIES)
def test_logits_are_close_to_float32(title: str, tmp_path: Path) -> None:
    folder = str(FAMILIES[title].save(tmp_path))
    configs = [ModelConfig(model=folder, device="cpu", dtype=d) for d in ("float32", "int8")]
    models = [load_model(config) for config in configs]
    with torch.inference_mode():
        wanted, logits = (_run_packed(model.module, TOKENS)[1] for model in models)
    assert models[1].dtype == torch.float32
    assert [model.weights for model in models] == ["float32", "int8"]
    assert 1e-5 < relative(logits, wanted) < 0.1


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_is_close_to_float32(family: str, tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder(family, tmp_path)
    own = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    arguments = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False}
    with torch.inference_mode():
        wanted = own(**arguments).logits
        quantize(own, partial(own, **arguments))
        assert num_quantized(own)
        assert 1e-5 < relative(own(**arguments).logits, wanted) < 0.1


def test_both_embeddings_stay_and_float_weights_are_freed_one_by_one(tmp_path: Path) -> None:
    module: Any = load_model(
        ModelConfig(model=str(tiny_model_folder("llama", tmp_path)), pack_weights=False)
    ).module
    embedding = module.get_input_embeddings().weight
    layers = [m for m in module.modules() if type(m) is nn.Linear]
    weights = [weakref.ref(m.weight) for m in layers if m.weight is not embedding]
    del layers
    alive: list[int] = []
    init = QuantizedLinear.__init__

    def counting(self: QuantizedLinear, *args: Any) -> None:
        alive.append(sum(ref() is not None for ref in weights))
        init(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLinear, "__init__", counting)
        quantize(module)
    gc.collect()
    assert module.get_input_embeddings().weight is embedding
    assert not isinstance(module.get_output_embeddings(), QuantizedLinear)
    assert not any(ref() for ref in weights)
    assert alive[-1] <= 1
    assert alive == sorted(alive, reverse=True)


# --- refused --------------------------------------------------------------------------------------


def cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(loader, "resolve_device", lambda device: "cuda")
    return "the model would be on cuda"


def no_onednn(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    return "x86 CPUs"


@pytest.mark.parametrize("where", [cuda, no_onednn])
def test_where_int8_cannot_run(
    where: Callable[[pytest.MonkeyPatch], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = where(monkeypatch)
    with pytest.raises(UnsupportedModel, match=f"--dtype int8 .*{reason}"):
        load_model(ModelConfig(model=str(tmp_path), dtype="int8"))
