"""Formats that are not PEFT's: what is stored is what the original code feeds its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixd_store import (
    Geometry,
    InvalidPrefix,
    Prefix,
    SiteGeometry,
    import_checkpoint,
    parse_prefix,
    write_prefix,
)
from tests.prefixd_store.checkpoints import random_arrays, to_torch
from tests.prefixd_store.foreign import (
    BART,
    GOLDENS,
    GPT2,
    LLAMA,
    Expected,
    cartridge,
    faster_transformer,
    paper_bart,
    paper_gpt2,
    sent,
)


def check(prefix: Prefix, expected: Expected, source: str, *, offset: int, exact: bool) -> None:
    assert prefix.arrays.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = to_torch(prefix.arrays[name])
        assert ours.dtype == theirs.dtype
        if exact:
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert prefix.manifest.query_offset == offset
    assert prefix.manifest.source_format == source
    assert prefix.manifest.base_fingerprint is None


# --- HazyResearch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fixed", "frozen"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_cartridge(tmp_path: Path, frozen: int, name: str, dtype: torch.dtype) -> None:
    file = tmp_path / "cache_last.pt"
    expected = cartridge(file, frozen=frozen, name=name, dtype=dtype)
    prefix = sent(file, LLAMA, tmp_path / "out")
    check(prefix, expected, "cartridges", offset=frozen + 4, exact=True)
    assert prefix.manifest.provenance == {"num_frozen_tokens": frozen}


@pytest.mark.parametrize("name", ["cache-step512.pt", "kv_cache.torch", "cartridge.pt"])
def test_a_folder_with_one_cartridge(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    expected = cartridge(folder / name)
    (folder / "config.yaml").write_text("name: never read")
    check(sent(folder, LLAMA, tmp_path / "out"), expected, "cartridges", offset=5, exact=True)


# --- the paper's own code -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize(
    ("kind", "exact"), [("mlp", False), ("deep", False), ("flat", True), ("words", True)]
)
def test_paper_gpt2(tmp_path: Path, kind: str, exact: bool, tokens: int) -> None:
    expected = paper_gpt2(tmp_path / "c", kind, tokens=tokens)
    prefix = sent(tmp_path / "c", GPT2, tmp_path / "out")
    check(prefix, expected, "paper/gpt2", offset=tokens, exact=exact)


def test_words_of_the_task_may_give_the_length(tmp_path: Path) -> None:
    expected = paper_gpt2(tmp_path / "c", "words", preseqlen=200, init_shallow_word=[[1] * 5])
    prefix = sent(tmp_path / "c", GPT2, tmp_path / "out")
    check(prefix, expected, "paper/gpt2", offset=5, exact=True)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "sites", [("decoder", "cross", "encoder"), ("decoder",), ("encoder",), ("cross", "decoder")]
)
def test_paper_bart(tmp_path: Path, sites: tuple[str, ...], deep: bool) -> None:
    expected = paper_bart(tmp_path / "c", sites=sites, deep=deep)
    prefix = sent(tmp_path / "c", BART, tmp_path / "out")
    check(prefix, expected, "paper/bart", offset=0, exact=False)


def test_paper_bart_of_a_length_a_site(tmp_path: Path) -> None:
    """Where its config names no one length: each table has its own rows."""
    lengths = {"decoder": 3, "cross": 21, "encoder": 7}
    expected = paper_bart(tmp_path / "c", lengths=lengths)
    prefix = sent(tmp_path / "c", BART, tmp_path / "out")
    check(prefix, expected, "paper/bart", offset=0, exact=False)
    assert {site: shape[2] for site, shape in prefix.manifest.sites.items()} == lengths


# --- AdapterHub: goldens made by its library ------------------------------------------------------


def golden(name: str, folder: Path) -> Expected:
    folder.mkdir()
    for file in ("adapter_config.json", "pytorch_adapter.bin"):
        shutil.copy(GOLDENS / f"adapterhub-{name}" / file, folder)
    return load_file(GOLDENS / f"adapterhub-{name}" / "expected.safetensors")


@pytest.mark.parametrize(
    ("name", "geometry", "exact"),
    [
        ("gpt2", GPT2, False),
        ("gpt2-ejected", GPT2, True),
        ("llama", LLAMA, False),
        ("bart", BART, False),
    ],
)
def test_adapterhub(tmp_path: Path, name: str, geometry: Geometry, exact: bool) -> None:
    expected = golden(name, tmp_path / "c")
    prefix = sent(tmp_path / "c", geometry, tmp_path / "out")
    check(prefix, expected, "adapterhub/prefix_tuning", offset=0, exact=exact)
    assert prefix.manifest.provenance["version"] == "adapters.1.3.0"


def test_adapterhub_of_a_length_a_site(tmp_path: Path) -> None:
    """Its config names one length for all; without it each table has its own rows."""
    expected = golden("bart", tmp_path / "c")
    weights, config = tmp_path / "c" / "pytorch_adapter.bin", tmp_path / "c" / "adapter_config.json"
    state = torch.load(weights)
    for name, tensor in state.items():
        if ".cross_prefix.wte" in name:
            state[name] = tensor[:2].clone()
    torch.save(state, weights)
    with pytest.raises(InvalidPrefix, match="prefix_length 5 but the cross tensors have 2"):
        sent(tmp_path / "c", BART, tmp_path / "out")
    said = json.loads(config.read_text())
    del said["config"]["prefix_length"]
    config.write_text(json.dumps(said))
    prefix = sent(tmp_path / "c", BART, tmp_path / "out")
    shorter = {name: t[:, :, :2] if "cross" in name else t for name, t in expected.items()}
    check(prefix, shorter, "adapterhub/prefix_tuning", offset=0, exact=False)


def test_the_head_beside_an_adapter_is_not_used(tmp_path: Path) -> None:
    golden("gpt2", tmp_path / "c")
    torch.save({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "c" / "pytorch_model_head.bin")
    alone = sent(tmp_path / "c", GPT2, tmp_path / "out")
    assert alone.arrays.keys() == {"decoder.key", "decoder.value"}


def flat_adapter(folder: Path, flat: torch.Tensor, **config: Any) -> dict[str, Path]:
    folder.mkdir()
    said = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 5} | config
    (folder / "adapter_config.json").write_text(json.dumps({"config": said, "name": "t"}))
    name = "model.prefix_tuning.prefix_tunings.t.self_prefix.control_trans"
    save_file({name: flat}, folder / "adapter.safetensors")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_for_each_query_head(tmp_path: Path, dtype: torch.dtype) -> None:
    """Older versions add the prefix after ``repeat_kv``: equal heads of a group are one head."""
    torch.manual_seed(0)
    grouped = torch.randn(5, 6, 2, 8).to(dtype)  # [P, 2L, H_kv, D]
    repeated = grouped.repeat_interleave(2, dim=2)
    files = flat_adapter(tmp_path / "c", repeated.reshape(-1))
    result = import_checkpoint(files, tmp_path / "out", geometry=LLAMA)
    assert result.manifest.sites == {"decoder": (3, 2, 5, 8)}
    expected = {
        f"decoder.{part}": grouped[:, i::2].permute(1, 2, 0, 3).contiguous()
        for i, part in enumerate(("key", "value"))
    }
    prefix = parse_prefix((tmp_path / "out").read_bytes())
    check(prefix, expected, "adapterhub/prefix_tuning", offset=0, exact=True)


def test_relu(tmp_path: Path) -> None:
    golden("gpt2", tmp_path / "c")
    config = tmp_path / "c" / "adapter_config.json"
    config.write_text(config.read_text().replace('"tanh"', '"relu"'))
    state = torch.load(tmp_path / "c" / "pytorch_adapter.bin")
    parts = {n.rpartition("self_prefix.")[2]: t for n, t in state.items() if ".pool." not in n}
    hidden = parts["wte.weight"] @ parts["control_trans.0.weight"].T + parts["control_trans.0.bias"]
    rows = torch.relu(hidden) @ parts["control_trans.2.weight"].T + parts["control_trans.2.bias"]
    key = rows.view(5, 4, 4, 8)[:, 0::2].permute(1, 2, 0, 3)
    prefix = sent(tmp_path / "c", GPT2, tmp_path / "out")
    torch.testing.assert_close(to_torch(prefix.arrays["decoder.key"]), key, rtol=1e-6, atol=1e-6)


# --- FasterTransformer ----------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_faster_transformer(tmp_path: Path, ranks: int, half: bool) -> None:
    expected = faster_transformer(tmp_path / "c", ranks=ranks, half=half)
    prefix = sent(tmp_path / "c", GPT2, tmp_path / "out")
    check(prefix, expected, "fastertransformer", offset=5, exact=True)
    assert prefix.manifest.provenance == {"task_name": "sum", "tensor_parallel": ranks}


def test_one_file_stands_for_its_task(tmp_path: Path) -> None:
    faster_transformer(tmp_path / "c", task="other")
    expected = faster_transformer(tmp_path / "c", task="sum", tokens=7)
    file = tmp_path / "c" / "model.prefix_prompt.sum.weights.1.bin"
    prefix = sent(file, GPT2, tmp_path / "out")
    check(prefix, expected, "fastertransformer", offset=7, exact=True)


# --- what is stored does not depend on how it came ------------------------------------------------


def test_safetensors_of_the_same_names_are_taken_as_they_are(tmp_path: Path) -> None:
    """What a user who does not have our client uploads."""
    layers, heads, dim = LLAMA.decoder
    rng = np.random.default_rng(0)
    tensors = {
        f"{segment}_{part}.{i}": torch.from_numpy(rng.standard_normal((1, heads, n, dim)))
        .float()
        .contiguous()
        for segment, n in (("frozen", 1), ("trainable", 4))
        for part in ("keys", "values")
        for i in range(layers)
    }
    save_file(tensors, tmp_path / "c.safetensors")
    result = import_checkpoint(
        {"c.safetensors": tmp_path / "c.safetensors"}, tmp_path / "out", geometry=LLAMA
    )
    assert result.recognised.startswith("a HazyResearch cartridge")
    assert not result.verified
    assert result.manifest.sites == {"decoder": (3, 2, 5, 8)}


def test_an_encoder_of_other_heads_than_the_decoder(tmp_path: Path) -> None:
    """Sites have shapes of their own, in our file too."""
    decoder = random_arrays((3, 4, 5, 8))
    encoder = {
        name.replace("decoder", "encoder"): array
        for name, array in random_arrays((2, 2, 5, 16)).items()
    }
    write_prefix(tmp_path / "p.safetensors", decoder | encoder, query_offset=5)
    model = Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16))
    result = import_checkpoint(
        {"p.safetensors": tmp_path / "p.safetensors"}, tmp_path / "out", geometry=model
    )
    assert result.manifest.sites == {"decoder": (3, 4, 5, 8), "encoder": (2, 2, 5, 16)}
