"""Packed layers compute what the model's own layers compute, for every family that is served."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import NewGELUActivation, PytorchGELUTanh
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from prefixd_server.attention import interface
from prefixd_server.config import ModelConfig
from prefixd_server.models import packed
from prefixd_server.models.loader import load_model
from prefixd_server.models.packed import can_pack, pack
from prefixd_server.models.probe import _run_packed
from prefixd_server.native import kernels
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


def packed_logits(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return _run_packed(module, TOKENS)[1]


def kinds(module: nn.Module) -> dict[str, str]:
    """The class of each layer below ``module`` by its name."""
    return {name: type(child).__name__ for name, child in module.named_modules() if name}


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")
@pytest.mark.parametrize("title", FAMILIES)
def test_the_model_file_is_let_go(title: str, tmp_path: Path) -> None:
    folder = FAMILIES[title].save(tmp_path)
    served = load_model(ModelConfig(model=str(folder)))
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    del served


@pytest.mark.parametrize("title", FAMILIES)
def test_logits_are_the_models_own(title: str, tmp_path: Path) -> None:
    folder = str(FAMILIES[title].save(tmp_path))
    own = load_model(ModelConfig(model=folder, pack_weights=False)).module
    served = load_model(ModelConfig(model=folder)).module
    assert "PackedLinear" in kinds(served).values()
    wanted = packed_logits(own)
    for _ in range(2):  # nothing of a first run is left for a second
        torch.testing.assert_close(packed_logits(served), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_logits_of_an_encoder_decoder_are_the_models_own(family: str, tmp_path: Path) -> None:
    """With the model's own attention: only the layers differ."""
    folder = tiny_seq2seq_folder(family, tmp_path)
    own = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    arguments = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False}
    with torch.inference_mode():
        wanted = own(**arguments).logits
        pack(own, partial(own, **arguments))
        assert "PackedLinear" in kinds(own).values()
        torch.testing.assert_close(own(**arguments).logits, wanted, atol=1e-4, rtol=1e-4)


LLAMA = {f"self_attn.{name}_proj" for name in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}


@pytest.mark.parametrize(
    ("title", "joined"),
    [
        ("Llama", LLAMA),
        ("Gemma 2", LLAMA),
        ("Qwen2", LLAMA),  # q, k and v have a bias
        ("OPT", {f"self_attn.{name}_proj" for name in "qkv"}),
        ("GPT-2", set()),  # one product already
        ("Phi-3", set()),
        # Reads the same input, but is called after attention.
        ("Phi", {f"self_attn.{name}_proj" for name in "qkv"}),
    ],
)
def test_layers_that_read_one_input_are_joined(
    title: str, joined: set[str], tmp_path: Path
) -> None:
    module = load_model(ModelConfig(model=str(FAMILIES[title].save(tmp_path)))).module
    found = {name for name, kind in kinds(module).items() if kind == "_Part"}
    layers = {".".join(name.split(".")[-2:]) for name in found}
    assert layers == joined
    assert len(found) == len(joined) * module.config.num_hidden_layers


def test_an_encoder_decoder_is_packed_but_not_joined(tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder("t5", tmp_path)
    found = set(kinds(load_model(ModelConfig(model=str(folder))).module).values())
    assert "PackedLinear" in found
    assert "_Part" not in found


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    folder = str(FAMILIES["Llama"].save(tmp_path))
    own = kinds(AutoModelForCausalLM.from_pretrained(folder))
    assert kinds(load_model(ModelConfig(model=folder, pack_weights=False)).module) == own
    assert kinds(load_model(ModelConfig(model=folder, dtype="bfloat16")).module) == own


def test_the_weights_that_were_packed_are_freed(tmp_path: Path) -> None:
    interface.register()
    folder = tiny_model_folder("llama", tmp_path)
    module: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.requires_grad_(False)
    table = module.get_input_embeddings().weight
    held = [weakref.ref(p) for p in module.parameters() if p.dim() > 1 and p is not table]
    assert len(held) >= 3 * 7
    pack(module, partial(module, input_ids=TOKENS, use_cache=False))
    gc.collect()
    assert [ref().shape for ref in held if ref() is not None] == []  # type: ignore[union-attr]
    assert module.get_input_embeddings().weight is table
    assert [name for name, p in module.named_parameters() if p.dim() > 1] == [
        "model.embed_tokens.weight"
    ]


# --- linear layers --------------------------------------------------------------------------------


class Siblings(nn.Module):
    """Two layers of one input, and one layer that is called twice with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 16, bias=False)
        self.c, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)
        self.d = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.cat([self.a(x), self.b(x)], -1)
        second = self.c(x * 2) + self.shared(x * 2)
        return torch.cat([first, second, self.d(x), self.shared(x), self.shared(x)], -1)


@torch.inference_mode()
def test_siblings_are_joined_and_a_layer_called_in_two_places_is_not() -> None:
    torch.manual_seed(0)
    module, x = Siblings(), torch.randn(2, 5, 32)
    wanted = module(x)
    pack(module, partial(module, x))
    assert kinds(module) == {
        "a": "_Part",
        "b": "_Part",
        "c": "PackedLinear",
        "d": "PackedLinear",
        "shared": "PackedLinear",
    }
    for _ in range(2):
        torch.testing.assert_close(module(x), wanted, atol=1e-5, rtol=1e-5)
        # The same tensor with other numbers is another input.
        x.mul_(0.5)
        wanted = module(x)


@torch.inference_mode()
def test_joined_layers_in_another_order_or_one_alone() -> None:
    """As a branch of the model's code may call them."""
    torch.manual_seed(0)
    module, x, other = Siblings(), torch.randn(5, 32), torch.randn(3, 32)
    a, b = module.a, module.b
    calls = [(a, x), (b, other), (b, x), (a, x), (a, other), (b, x), (b, x)]
    wanted = [layer(given) for layer, given in calls]
    pack(module, partial(module, x))
    parts = {a: module.a, b: module.b}
    for (layer, given), right in zip(calls, wanted, strict=True):
        torch.testing.assert_close(parts[layer](given), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (20, 17), (64, 200)])
@torch.inference_mode()
def test_any_size_and_any_strides(rows: int, bias: bool, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    own = linear[0]
    pack(linear)
    assert type(linear[0]) is packed.PackedLinear
    wide = torch.randn(1, rows, 2 * inputs)
    for x in (wide[..., :inputs].contiguous(), wide[..., :inputs], wide[..., ::2]):
        torch.testing.assert_close(linear(x), own(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_gpt2s_transposed_layers() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Conv1D(48, 16))
    own, x = module[0], torch.randn(2, 3, 16)
    own.bias.normal_()
    pack(module)
    torch.testing.assert_close(module(x), own(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_small_layers_and_subclasses_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    module = nn.ModuleDict({"small": nn.Linear(64, 8), "other": Doubled(64, 64)})
    before = dict(module.items())
    pack(module)
    assert dict(module.items()) == before


@torch.inference_mode()
def test_whoever_reads_a_packed_weight_fails() -> None:
    """It must not compute with something else: code that bypasses the layer ends in an error."""
    module = nn.Sequential(nn.Linear(32, 32))
    pack(module)
    assert module[0].weight.dtype == torch.float32
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(2, 32), module[0].weight)


# --- norms ----------------------------------------------------------------------------------------

NORMS: list[tuple[type[nn.Module], float]] = [
    (LlamaRMSNorm, 0.0),
    (T5LayerNorm, 0.0),
    (GemmaRMSNorm, 1.0),
]


def norm_of(kind: Any, size: int) -> Any:
    torch.manual_seed(0)
    norm = kind(size, eps=1e-5)
    norm.weight.data.normal_()
    return norm.requires_grad_(False)


@needs_kernels
@pytest.mark.parametrize(("kind", "plus"), NORMS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("size", [1, 8, 20, 64, 576])
@torch.inference_mode()
def test_rms_norms_with_any_weight(kind: type[nn.Module], plus: float, size: int) -> None:
    own = norm_of(kind, size)
    module = nn.Sequential(own)
    pack(module)
    assert type(module[0]) is packed.RMSNorm
    assert module[0].plus == plus
    for scale in (1e-4, 1.0, 1e4):
        x = torch.randn(3, 7, size) * scale
        torch.testing.assert_close(module(x), own(x), atol=1e-5, rtol=1e-5)


@needs_kernels
@torch.inference_mode()
def test_a_norm_over_heads_reads_strided_input() -> None:
    """Qwen3's q_norm: over the last dimension of a view of a joined product."""
    own = norm_of(LlamaRMSNorm, 16)
    module = nn.Sequential(own)
    pack(module)
    joined = torch.randn(1, 5, 3 * 64)
    for x in (joined[..., 64:128].view(1, 5, 4, 16), torch.randn(1, 4, 5, 16).transpose(1, 2)):
        assert not x.is_contiguous()
        found = module(x)
        assert found.shape == x.shape
        torch.testing.assert_close(found, own(x), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("title", ["Llama", "Gemma 2", "Qwen3", "Gemma 3, text", "OLMo 2"])
def test_the_norms_of_these_are_the_kernels(title: str, tmp_path: Path) -> None:
    found = kinds(load_model(ModelConfig(model=str(FAMILIES[title].save(tmp_path)))).module)
    norms = {kind for name, kind in found.items() if name.endswith("norm")}
    assert norms == {"RMSNorm"}


@torch.inference_mode()
def test_what_is_no_rms_norm_stays() -> None:
    class Odd(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x) + 0.01
            return result

    module = nn.Sequential(nn.LayerNorm(32), norm_of(Odd, 32), nn.LayerNorm((4, 8)))
    before = list(module)
    pack(module)
    assert list(module) == before


def test_without_kernels_the_linear_layers_are_packed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    module = nn.Sequential(nn.Linear(32, 32), norm_of(LlamaRMSNorm, 32))
    pack(module)
    assert list(kinds(module).values()) == ["_OneDNNLinear", "LlamaRMSNorm"]


@torch.inference_mode()
def test_nan_comes_out_where_it_went_in() -> None:
    """And in no other row: rows are tokens of different requests."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), norm_of(LlamaRMSNorm, 48), nn.Linear(48, 32))
    pack(module)
    x = torch.randn(40, 32)
    clean = module(x)
    x[7, 3] = float("nan")
    x[11] = float("inf")
    found = module(x)
    assert bool(found[[7, 11]].isnan().all())
    rest = [row for row in range(40) if row not in (7, 11)]
    assert torch.equal(found[rest], clean[rest])


@pytest.mark.parametrize(
    "module",
    [nn.SiLU(), nn.GELU(approximate="tanh"), NewGELUActivation(), PytorchGELUTanh()],
    ids=lambda module: type(module).__name__,
)
@torch.inference_mode()
def test_activations(module: nn.Module) -> None:
    parent = nn.ModuleDict({"act": module})
    pack(parent)
    assert type(parent["act"]) is not type(module)
    wide = 20 * torch.randn(1, 7, 150)
    for x in (
        wide,
        wide[..., 30:97],
        wide[0],
        wide[0, 0],
        wide.transpose(1, 2),
        wide.view(7, 2, 75),
    ):
        torch.testing.assert_close(parent["act"](x), module(x), rtol=1e-5, atol=1e-6)
    x = torch.tensor([float("nan"), 0.0, 200.0, -200.0, 1e4])
    torch.testing.assert_close(parent["act"](x), module(x), equal_nan=True)


@pytest.mark.parametrize("module", [nn.GELU(), nn.ReLU(), nn.LeakyReLU(), nn.PReLU()])
def test_other_activations_stay(module: nn.Module) -> None:
    parent = nn.ModuleDict({"act": module})
    pack(parent)
    assert parent["act"] is module


@torch.inference_mode()
def test_hooks_are_called() -> None:
    parent = nn.ModuleDict({"linear": nn.Linear(32, 32, bias=False)})
    pack(parent)
    x = torch.randn(2, 5, 32)
    hook = parent["linear"].register_forward_pre_hook(lambda _, args: (args[0][:, -1],))
    assert parent["linear"](x).shape == (2, 32)
    hook.remove()
    assert parent["linear"](x).shape == (2, 5, 32)
