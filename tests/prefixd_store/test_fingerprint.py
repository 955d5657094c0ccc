import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefixd_store import InvalidRequest, TensorSample, fingerprint_folder, fingerprint_tensors
from tests.prefixd_store.checkpoints import raw_file, tiny_model


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "big": torch.randn(64, 100, generator=generator),
        "small": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
    }


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return fingerprint_folder(folder)


def test_it_is_the_digest_of_samples(tmp_path: Path) -> None:
    tags = {torch.float32: "F32", torch.bfloat16: "BF16"}
    samples = {}
    for name, tensor in weights().items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = tuple(tensor.shape)
        samples[name] = TensorSample(tags[tensor.dtype], shape, raw[:4096], raw[-4096:])
    found = save(tmp_path / "a", weights())
    assert found == fingerprint_tensors(samples)
    assert found == fingerprint_tensors(dict(reversed(samples.items())))
    assert re.fullmatch("[0-9a-f]{64}", found)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint_folder(tmp_path / "one") == fingerprint_folder(tmp_path / "many")


def test_only_the_models_own_files_count(tmp_path: Path) -> None:
    alone = save(tmp_path / "a", weights())
    save_file({"other": torch.ones(3)}, tmp_path / "a" / "adapter_model.safetensors")
    assert fingerprint_folder(tmp_path / "a") == alone
    assert save(tmp_path / "b", weights(), "weights.safetensors") == alone


@pytest.mark.parametrize("name", ["big", "small", "scalar"])
@pytest.mark.parametrize("place", [0, -1])
def test_another_value_is_another_model(tmp_path: Path, name: str, place: int) -> None:
    tensors = weights()
    before = save(tmp_path / "a", tensors)
    tensors[name].view(-1)[place] += 1
    assert save(tmp_path / "b", tensors) != before


def test_name_dtype_and_shape_count(tmp_path: Path) -> None:
    original = weights()
    renamed = {name.replace("big", "bug"): tensor for name, tensor in original.items()}
    retyped = {**original, "small": original["small"].view(torch.float16)}
    reshaped = {**original, "big": original["big"].view(100, 64)}
    found = {
        save(tmp_path / str(i), tensors)
        for i, tensors in enumerate((original, renamed, retyped, reshaped))
    }
    assert len(found) == 4


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no \*\.safetensors"):
        fingerprint_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map must"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map must"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot read"),
        ('{"weight_map": {}}', "has no"),
    ],
)
def test_a_damaged_index(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidRequest, match=message):
        fingerprint_folder(tmp_path)


def test_damaged_shards(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_file({"a": 1}))
    with pytest.raises(InvalidRequest, match="exactly dtype, shape"):
        fingerprint_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("1", "2"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidRequest, match="'a' is in two shards"):
        fingerprint_folder(tmp_path)
    shards = {"a": "1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert fingerprint_folder(tmp_path)
