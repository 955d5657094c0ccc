import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixd_store import (
    Geometry,
    ImportResult,
    InvalidPrefix,
    Limits,
    PrefixManifest,
    SiteGeometry,
    TooLarge,
    check_file_name,
    check_fits,
    import_checkpoint,
    parse_prefix,
    write_prefix,
)
from tests.prefixd_store.checkpoints import (
    GEOMETRIES,
    files_of,
    prompt_of,
    random_arrays,
    save_peft,
    to_torch,
)

LLAMA = GEOMETRIES["llama"]
NATIVE = Geometry(2, 3, 4)


def run(folder: Path, geometry: Geometry = LLAMA, **options: Any) -> ImportResult:
    """Import a folder, checking what every import promises."""
    out = folder.parent / f"{folder.name}.out"
    try:
        result = import_checkpoint(files_of(folder), out, geometry=geometry, **options)
    except Exception:
        assert not out.exists(), "a refused import leaves nothing behind"
        raise
    raw = out.read_bytes()
    assert (result.sha256, result.bytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


# --- PEFT: the same keys and values that PEFT feeds the model -------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 20, 33])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_tuning(folder: Path, family: str, tokens: int, dtype: torch.dtype) -> None:
    model = save_peft(folder, family=family, tokens=tokens, dtype=dtype)
    check_against(model, folder, GEOMETRIES[family], "peft/prefix_tuning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cartridge(folder: Path, family: str, dtype: torch.dtype) -> None:
    model = save_peft(folder, family=family, dtype=dtype, cartridge=True)
    result = check_against(model, folder, GEOMETRIES[family], "peft/cartridge")
    assert result.manifest.provenance["num_frozen_tokens"] == 1


def test_a_projected_prefix_is_saved_projected(folder: Path) -> None:
    model = save_peft(folder, projection=True)
    result = check_against(model, folder, LLAMA, "peft/prefix_tuning")
    assert result.manifest.provenance["prefix_projection"] is True


def check_against(model: Any, folder: Path, geometry: Geometry, source: str) -> ImportResult:
    (saved,) = load_file(folder / "adapter_model.safetensors").values()
    result = run(folder, geometry)
    prefix = parse_prefix((folder.parent / f"{folder.name}.out").read_bytes())
    ours = [to_torch(prefix.arrays[f"decoder.{part}"]) for part in ("key", "value")]
    for mine, theirs in zip(ours, prompt_of(model), strict=True):
        assert mine.dtype == theirs.dtype == saved.dtype
        assert torch.equal(mine, theirs)
    tokens = saved.shape[0]
    shape = (geometry.num_layers, geometry.num_kv_heads, tokens, geometry.head_dim)
    assert prefix.manifest == result.manifest
    assert result.manifest.sites == {"decoder": shape}
    assert result.manifest.query_offset == result.manifest.num_virtual_tokens == tokens
    assert result.manifest.source_format == source
    assert not result.verified
    return result


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    save_peft(folder)
    files = files_of(folder)
    first = import_checkpoint(files, tmp_path / "a", geometry=LLAMA)
    second = import_checkpoint(dict(reversed(files.items())), tmp_path / "b", geometry=LLAMA)
    assert first == second


def test_the_base_models_name_is_kept_and_extras_are_ignored(folder: Path) -> None:
    save_peft(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody reads")
    (folder / "LICENSE").write_text("…")
    edit(folder, base_model_name_or_path="acme/tiny", unheard_of={"x": [1]})
    assert (folder / "README.md").exists(), "PEFT saves one"
    assert run(folder).manifest.base_model == "acme/tiny"


# --- PEFT: what is refused ------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def fake_peft(folder: Path, tensor: torch.Tensor | None = None, **config: Any) -> None:
    """A checkpoint as PEFT 0.21 saves it for LLAMA and P=7, with changes."""
    defaults = {
        "base_model_name_or_path": None,
        "num_attention_heads": 2,
        "num_layers": 3,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 7,
        "peft_type": "PREFIX_TUNING",
        "peft_version": "0.21.0",
        "task_type": "CAUSAL_LM",
        "token_dim": 32,
    }
    (folder / "adapter_config.json").write_text("{}")
    edit(folder, **defaults | config)
    tensor = torch.zeros(7, 192) if tensor is None else tensor
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")


def test_the_fake_of_these_tests_is_accepted(folder: Path) -> None:
    fake_peft(folder)
    assert run(folder).manifest.num_virtual_tokens == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORA"}, "LORA cannot be served .* model's weights or layers"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING cannot be served .* input embeddings"),
        ({"peft_type": "P_TUNING"}, "P_TUNING cannot be served .* input embeddings"),
        ({"peft_type": ["PREFIX_TUNING"]}, "cannot be served"),
        ({"peft_type": None}, "None cannot be served"),
        (
            {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2},
            "an encoder-decoder model .* but this is a decoder-only model",
        ),
        ({"num_transformer_submodules": 2}, "an encoder-decoder model .*submodules 2"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS does not generate text"),
        ({"num_virtual_tokens": 8}, r"num_virtual_tokens 8 but prompt_embeddings is \[7, 192\]"),
        ({"num_virtual_tokens": "7"}, "num_virtual_tokens 7 but"),
        ({"num_virtual_tokens": ...}, "num_virtual_tokens None but"),
        ({"num_layers": 2}, r"says num_layers 2 \(model: 3\)"),
        ({"num_layers": 2, "num_attention_heads": 3}, "num_layers 2 .* num_attention_heads 3"),
        ({"token_dim": [32]}, "token_dim"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string"),
        ({"base_model_name_or_path": "a" * 600}, "base_model must be 1 to 512"),
    ],
)
def test_a_config_to_refuse(folder: Path, config: dict[str, Any], message: str) -> None:
    fake_peft(folder, **config)
    with pytest.raises(InvalidPrefix, match=message):
        run(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(7, 191), r"is \[P, 191\] but the model takes .*3\*2\*2\*16\] = \[P, 192\]"),
        (torch.zeros(7, 384), r"is \[P, 384\] but the model takes"),
        (torch.zeros(7 * 192), r"has shape \[1344\]"),
        (torch.zeros(7, 6, 32), r"has shape \[7, 6, 32\]"),
        (torch.zeros(0, 192), r"has shape \[0, 192\]"),
        (torch.zeros(7, 192, dtype=torch.float64), "is F64"),
        (torch.zeros(7, 192, dtype=torch.int32), "is I32"),
        (torch.full((7, 192), float("nan")), r"decoder.key\[0, 0, 0, 0\] is NaN"),
        (torch.full((7, 192), float("inf"), dtype=torch.bfloat16), "is infinite"),
    ],
)
def test_a_tensor_to_refuse(folder: Path, tensor: torch.Tensor, message: str) -> None:
    fake_peft(folder, tensor)
    with pytest.raises(InvalidPrefix, match=message):
        run(folder)


def test_the_wrong_width_of_old_peft_is_explained(folder: Path) -> None:
    # hidden_size 32 / 4 heads = 8 a head, though the model's head_dim is 16.
    fake_peft(folder, torch.zeros(7, 96), token_dim=16, peft_version=...)
    with pytest.raises(InvalidPrefix, match=r"\[P, 96\] .* \[P, 192\].*0\.18.*2881"):
        run(folder)
    fake_peft(folder, torch.zeros(7, 96), token_dim=16)
    with pytest.raises(InvalidPrefix) as error:
        run(folder)
    assert "2881" not in error.value.message, "a new PEFT is not to blame"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "adapter_config.json: not valid JSON"),
        (b"[]", "got list"),
        (b'{"peft_type": NaN}', "NaN is not JSON"),
        (b'{"peft_type": "LORA", "peft_type": "PREFIX_TUNING"}', "twice"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b" " * (1 << 20) + b"{}", "over 1048576 bytes"),
    ],
)
def test_a_config_that_is_not_sound_json(folder: Path, raw: bytes, message: str) -> None:
    fake_peft(folder)
    (folder / "adapter_config.json").write_bytes(raw)
    with pytest.raises(InvalidPrefix, match=message):
        run(folder)


def test_an_adapter_that_changes_the_model_too(folder: Path) -> None:
    fake_peft(folder)
    tensors = {"prompt_embeddings": torch.zeros(7, 192), "lm_head.weight": torch.zeros(2, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidPrefix, match=r"also changes 'lm_head.weight'"):
        run(folder)


def test_half_an_adapter(folder: Path) -> None:
    fake_peft(folder)
    (folder / "adapter_model.safetensors").rename(folder.parent / "weights")
    with pytest.raises(InvalidPrefix, match="0 tensors named prompt_embeddings"):
        run(folder)
    (folder / "adapter_config.json").unlink()
    (folder.parent / "weights").rename(folder / "adapter_model.safetensors")
    with pytest.raises(InvalidPrefix, match=r"no known checkpoint among 'adapter_model.*PEFT"):
        run(folder)


def test_a_prefix_longer_than_the_context(folder: Path) -> None:
    fake_peft(folder)
    assert run(folder, Geometry(3, 2, 16, max_positions=8))
    (folder.parent / "checkpoint.out").unlink()
    with pytest.raises(InvalidPrefix, match="7 virtual tokens leave no room"):
        run(folder, Geometry(3, 2, 16, max_positions=7))


# --- our own file --------------------------------------------------------------------------------


def test_our_file_passes_through_unchanged(folder: Path) -> None:
    digest = write_prefix(folder / "any name.safetensors", random_arrays(), query_offset=5)
    (folder / "notes.txt").write_text("ignored")
    result = run(folder, NATIVE)
    assert result.sha256 == digest
    assert (folder / "any name.safetensors").stat().st_nlink == 1, "a copy of its own"


def test_our_file_with_a_nan(folder: Path) -> None:
    tensors = {name: to_torch(array) for name, array in random_arrays().items()}
    tensors["decoder.key"][0, 1, 2, 3] = np.nan
    says = {"format": "prefixd", "format_version": "1"}
    says |= {"num_virtual_tokens": "5", "query_offset": "5"}
    save_file(tensors, folder / "p.safetensors", says)
    with pytest.raises(InvalidPrefix, match=r"decoder.key\[0, 1, 2, 3\] is NaN"):
        run(folder, NATIVE)


@pytest.mark.parametrize("geometry", [Geometry(1, 3, 4), Geometry(2, 2, 4), Geometry(2, 3, 8)])
def test_our_file_for_another_model(folder: Path, geometry: Geometry) -> None:
    write_prefix(folder / "p.safetensors", random_arrays(), query_offset=5)
    with pytest.raises(InvalidPrefix) as error:
        run(folder, geometry)
    layers, heads, dim = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    assert "[L=2, H_kv=3, P=5, D=4]" in error.value.message
    assert f"[L={layers}, H_kv={heads}, P, D={dim}]" in error.value.message


def test_fingerprints(folder: Path) -> None:
    path = folder / "p.safetensors"
    write_prefix(path, random_arrays(), query_offset=5, base_fingerprint="aa")
    assert run(folder, NATIVE, fingerprint="aa").verified
    assert not run(folder, NATIVE).verified
    (folder.parent / "checkpoint.out").unlink()
    with pytest.raises(InvalidPrefix, match="fingerprint is aa, this model's is bb"):
        run(folder, NATIVE, fingerprint="bb")


def test_sites() -> None:
    def manifest(*sites: Any) -> PrefixManifest:
        return PrefixManifest(dict.fromkeys(sites, (2, 3, 5, 4)), "float32", 5, 0)

    two_sided = Geometry(2, 3, 4, encoder=SiteGeometry(2, 3, 4))
    assert check_fits(manifest("decoder", "encoder", "cross"), two_sided, None) is False
    for sites in (("decoder", "cross"), ("encoder",)):
        with pytest.raises(InvalidPrefix, match="decoder-only model takes decoder alone"):
            check_fits(manifest(*sites), NATIVE, None)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "pt", "PTH", "torch", "ckpt", "pkl"])
def test_pickles_are_sent_back_to_the_client(folder: Path, suffix: str) -> None:
    fake_peft(folder)
    (folder / f"adapter_model.{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidPrefix, match=r"pickle.*convert it on the client.*prefixd push"):
        run(folder)


def test_a_pickle_in_disguise(folder: Path) -> None:
    fake_peft(folder)
    torch.save({"prompt_embeddings": torch.zeros(7, 192)}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidPrefix, match="not a safetensors file"):
        run(folder)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 256, "é" * 128],
)
def test_a_name_that_is_not_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidPrefix) as error:
        check_file_name(name)
    assert error.value.param == "filename"
    (tmp_path / "p").write_bytes(b"")
    with pytest.raises(InvalidPrefix):
        import_checkpoint({name: tmp_path / "p"}, tmp_path / "out", geometry=LLAMA)


def test_names_that_clash(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"{}")
    for pair in (("a.json", "A.json"), ("\u00e9", "e\u0301")):
        with pytest.raises(InvalidPrefix, match="have one name"):
            import_checkpoint(dict.fromkeys(pair, tmp_path / "p"), tmp_path / "o", geometry=LLAMA)


def test_nothing_to_import(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InvalidPrefix, match="no known checkpoint among no files"):
        run(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidPrefix, match=r"no known checkpoint among 'config.json'"):
        run(folder)


def test_too_many(folder: Path) -> None:
    fake_peft(folder)
    write_prefix(folder / "p.safetensors", random_arrays(), query_offset=5)
    with pytest.raises(InvalidPrefix, match="more than one checkpoint"):
        run(folder)
    (folder / "adapter_config.json").unlink()
    write_prefix(folder / "q.safetensors", random_arrays(), query_offset=5)
    with pytest.raises(InvalidPrefix, match=r"2 prefixes \(p.safetensors, q.safetensors\)"):
        run(folder, NATIVE)
    for i in range(70):
        (folder / f"{i}.txt").touch()
    with pytest.raises(InvalidPrefix, match="73 files, at most 64"):
        run(folder)


def test_size_limits(folder: Path) -> None:
    fake_peft(folder)
    with pytest.raises(TooLarge, match="at most 1000 allowed"):
        run(folder, limits=Limits(max_bytes=1000))
    with pytest.raises(InvalidPrefix, match="7 virtual tokens, at most 6"):
        run(folder, limits=Limits(max_virtual_tokens=6))
