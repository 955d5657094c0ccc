"""The file says what it is and how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixd import CheckpointError
from prefixd_store import InvalidPrefix, geometry_folder, parse_prefix, validate_file
from prefixd_store.geometry import check_fits
from prefixd_train.ablations import EmbeddingPrefix, Infix
from prefixd_train.lm import load_lm
from prefixd_train.loop import Trainer
from prefixd_train.parameterise import PrefixParameters, make_prefix
from prefixd_train.prepare import read_data
from prefixd_train.save import InfixNotServed, config_digest, fold, save_prefix
from tests.support.server import LiveServer
from tests.support.training import SITES_OF, tiny_lm
from tests.train.conftest import Options

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


@pytest.mark.parametrize("parameterisation", ["mlp", "embeddings"])
def test_embeddings_can_be_pushed_and_an_infix_cannot(
    parameterisation: str, tmp_path: Path, options: Options, llama_folder: Path
) -> None:
    """However it is handed over: what was trained as an infix makes no file that could be sent."""
    lm = load_lm(str(llama_folder))
    torch.manual_seed(0)
    parameters: PrefixParameters = EmbeddingPrefix(lm, P)
    if parameterisation == "mlp":
        parameters = make_prefix(lm.shapes, {"decoder": P}, "mlp", hidden=8, middle=8)
    settings = options(max_steps=2)
    examples = read_data(settings, lm, {"decoder": P}).train
    path = tmp_path / "prefix.safetensors"
    with LiveServer(llama_folder, str(tmp_path / "store")) as server, server.client() as client:
        infix = Infix(parameters)
        Trainer(lm, infix, examples, settings).run()
        for trained in (infix, fold(infix), infix()):
            with pytest.raises(InfixNotServed, match="depends on the input"):
                save_prefix(path, lm, trained, training={})
            with pytest.raises(CheckpointError):
                client.push("ablation", path)
        assert list(client.tasks()) == []
        Trainer(lm, parameters, examples, settings).run()
        save_prefix(path, lm, parameters, training={})
        assert client.push("ablation", path).created
        answer = client.generate("ablation", "name: The Mill\n", max_new_tokens=2)
        assert answer.usage.prefix_tokens == P
