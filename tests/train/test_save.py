"""The file says what it is and how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixd_store import InvalidPrefix, geometry_folder, parse_prefix, validate_file
from prefixd_store.geometry import check_fits
from prefixd_train.ablations import EmbeddingPrefix
from prefixd_train.parameterise import make_prefix
from prefixd_train.save import InfixNotServed, config_digest, fold, save_prefix
from tests.support.training import SITES_OF, tiny_lm

P = 4


@pytest.mark.parametrize("family", SITES_OF)
@pytest.mark.parametrize("parameterisation", ["direct", "mlp"])
def test_the_folded_values_are_in_the_file_with_their_origin(
    family: str, parameterisation: str, tmp_path: Path
) -> None:
    lm = tiny_lm(family, tmp_path / "model")
    torch.manual_seed(0)
    prefix = make_prefix(
        lm.shapes,
        dict.fromkeys(SITES_OF[family], P),
        parameterisation,  # type: ignore[arg-type]
        dropout=0.5,
    )
    path = tmp_path / "prefix.safetensors"
    training = {"learning_rate": 5e-5, "epochs": 3}
    save_prefix(path, lm, prefix, training=training, provenance={"score": 1.5})
    assert prefix.training, "saving in the midst of training must not end it"
    manifest = validate_file(path)
    assert manifest.base_fingerprint == lm.fingerprint is not None
    assert manifest.base_model == lm.name == "model"
    # The encoder of BART numbers its positions from 0.
    assert manifest.query_offset == (0 if family == "bart" else P)
    assert manifest.provenance == {
        "score": 1.5,
        "trainer": "prefixd_train",
        "training": training,
        "training_sha256": config_digest({"epochs": 3, "learning_rate": 5e-5}),
    }
    check_fits(manifest, geometry_folder(lm.folder), lm.fingerprint)
    arrays = parse_prefix(path.read_bytes()).arrays
    for site, pair in fold(prefix).items():
        for part, tensor in zip(("key", "value"), pair, strict=True):
            assert torch.equal(torch.from_numpy(arrays[f"{site}.{part}"].data.copy()), tensor)


def test_narrow_dtypes_and_what_is_not_finite(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2", tmp_path / "model")
    prefix = make_prefix(lm.shapes, {"decoder": P})
    path = tmp_path / "prefix.safetensors"
    save_prefix(path, lm, prefix, training={}, dtype="bfloat16")
    saved = parse_prefix(path.read_bytes()).arrays["decoder.key"].to_float32()
    expected = fold(prefix)["decoder"][0].bfloat16().float()
    assert torch.equal(torch.from_numpy(saved.copy()), expected)
    with torch.no_grad():
        next(iter(prefix.parameters()))[0, 0] = float("nan")
    with pytest.raises(InvalidPrefix, match="NaN"):
        save_prefix(tmp_path / "broken", lm, prefix, training={})
    assert not (tmp_path / "broken").exists()


def test_an_infix_is_refused_and_embeddings_are_saved_as_what_they_make(tmp_path: Path) -> None:
    lm = tiny_lm("llama", tmp_path / "model")
    prefix = EmbeddingPrefix(lm, P)
    with pytest.raises(InfixNotServed, match="depends on the input"):
        save_prefix(tmp_path / "infix", lm, prefix, training={}, placement="infix")
    save_prefix(tmp_path / "prefix", lm, prefix, training={})
    assert validate_file(tmp_path / "prefix").sites == {"decoder": (3, 2, P, 8)}
