"""Loading a model folder: what the rest of the server learns of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, ViTConfig

from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models import loader
from prefixd_server.models.loader import LoadedModel, load_model, resolve_device
from tests.support.models import tiny_model_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 64


def load(folder: Path | str, **config: Any) -> LoadedModel:
    return load_model(ModelConfig(model=str(folder), device="cpu", **config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_model_folder(family, root / family) for family in ("llama", "gpt2")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The Llama, to be altered."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("family", "architecture", "layers", "heads", "dim"),
    [("llama", "LlamaForCausalLM", 3, 2, 8), ("gpt2", "GPT2LMHeadModel", 2, 4, 12)],
)
def test_what_is_known_of_a_folder(
    folders: dict[str, Path], family: str, architecture: str, layers: int, heads: int, dim: int
) -> None:
    model = load(folders[family])
    geometry = model.geometry
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == (layers, heads, dim)
    assert geometry.max_positions == model.max_model_len == 4096
    assert model.architecture == architecture
    assert model.name == family
    assert model.vocab_size == len(model.tokenizer)
    assert model.eos_token_ids == {2}
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_settings_override_the_name_the_length_and_the_dtype(folders: dict[str, Path]) -> None:
    model = load(folders["gpt2"], served_name="mine", max_model_len=100, dtype="bfloat16")
    assert (model.name, model.max_model_len, model.dtype) == ("mine", 100, torch.bfloat16)
    assert model.geometry.max_positions == 100


def test_the_fingerprint_is_the_weights(folders: dict[str, Path], copied: Path) -> None:
    original = load(folders["llama"]).fingerprint
    assert original is not None
    edit_json(copied / "generation_config.json", temperature=0.5)
    assert load(copied).fingerprint == original
    assert load(copied, dtype="bfloat16").fingerprint == original
    model = AutoModelForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(copied)
    assert load(copied).fingerprint not in (None, original)


def test_pickled_weights_load_without_a_fingerprint(copied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    (copied / "model.safetensors").unlink()
    torch.save(model.state_dict(), copied / "pytorch_model.bin")
    assert load(copied).fingerprint is None


@pytest.mark.parametrize(
    ("eos", "expected"), [(7, {7}), ([7, 9], {7, 9}), (None, "the tokenizer's")]
)
def test_end_tokens_are_the_generation_configs_or_the_tokenizers(
    copied: Path, eos: Any, expected: Any
) -> None:
    edit_json(copied / "config.json", eos_token_id=None)
    edit_json(copied / "generation_config.json", eos_token_id=eos)
    model = load(copied)
    if eos is None:
        expected = {model.tokenizer.eos_token_id}
    assert model.eos_token_ids == expected


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/folder", "./nope", "~/no-such-model"])
def test_a_folder_that_is_not_there(model: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"--model {model}: there is no such folder"):
        load(model)


def test_a_family_with_attention_classes_of_its_own(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"is a bloom model; .*AttentionInterface"):
        load(tmp_path)


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="cannot be read as a model: Unrecognized"):
        load(tmp_path)


def test_files_that_are_missing_or_damaged(copied: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UnsupportedModel, match=r"empty cannot be read as a model"):
        load(empty)
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModel, match="cannot be read as a tokenizer"):
        load(copied)
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedModel, match="cannot be read as a model"):
        load(copied)
    weights.unlink()
    with pytest.raises(UnsupportedModel, match=r"no file named model\.safetensors"):
        load(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not a valid JSON file"):
        load(copied)


def test_a_context_longer_than_the_models_own(folders: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"--max-model-len 5000: .* is 4096"):
        load(folders["gpt2"], max_model_len=5000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none() -> None:
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UnsupportedModel, match="--device cuda"):
        resolve_device("cuda")


def test_a_model_that_packing_changes_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(module: Any, run: Any) -> None:
        run()
        module.get_output_embeddings().weight.data.mul_(1.01)

    monkeypatch.setattr(loader, "pack", careless)
    with pytest.raises(UnsupportedModel, match=r"other logits with packed weights.*--no-pack"):
        load_model(ModelConfig(model=str(folders["llama"])))
