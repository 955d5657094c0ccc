from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from prefixd import (
    AsyncClient,
    CheckpointError,
    Client,
    ConflictError,
    RequestTooLargeError,
)
from tests.client.server import Server, error


def test_a_file_goes_as_it_is(client: Client, server: Server, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    moved: list[tuple[int, int | None]] = []
    result = client.push("e2e", path, progress=lambda *at: moved.append(at))
    (seen,) = server.seen
    assert seen.body == data
    assert seen.headers["content-type"] == "application/octet-stream"
    assert seen.headers["content-length"] == str(len(data))
    assert seen.query == {"activate": "true"}
    assert (result.version, result.active, result.created) == (1, True, True)
    assert moved[0] == (0, len(data))
    assert moved[-1] == (len(data), len(data))
    assert moved == sorted(moved)
    assert len(moved) > 3  # read in pieces, not at once


def test_a_folder_goes_as_its_files(client: Client, server: Server, folder: Path) -> None:
    moved: list[tuple[int, int | None]] = []
    client.push("e2e", folder, activate=False, progress=lambda *at: moved.append(at))
    (seen,) = server.seen
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert seen.parts == [(name, (folder / name).read_bytes()) for name in names]
    assert int(seen.headers["content-length"]) > sum(len(data) for _, data in seen.parts)
    assert seen.query == {"activate": "false"}
    total = sum(len(data) for _, data in seen.parts)
    assert moved[-1] == (total, total)
    assert len(moved) > 5


def test_the_same_bytes_again(client: Client, server: Server, folder: Path) -> None:
    first = client.push("e2e", folder)
    again = client.push("e2e", folder)
    assert (first.version, first.created) == (1, True)
    assert (again.version, again.created) == (1, False)


def test_guards(client: Client, server: Server, folder: Path) -> None:
    client.push("e2e", folder, create_only=True)
    with pytest.raises(ConflictError, match="exists"):
        client.push("e2e", folder, create_only=True)
    with pytest.raises(ConflictError, match="If-Match"):
        client.push("e2e", folder, if_match="stale")
    assert server.seen[-1].headers["if-match"] == '"stale"'


def test_a_refused_upload(client: Client, server: Server, folder: Path) -> None:
    server.script.append(error(413, "body over the limit"))
    with pytest.raises(RequestTooLargeError, match="over the limit"):
        client.push("e2e", folder)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "found no files"),
        (["README.md", "optimizer.pt"], "found README.md, optimizer.pt"),
        (["adapter_config.json", "training_args.bin"], "found adapter_config.json, training_args"),
        ([f"{i:02}.txt" for i in range(12)], "09.txt, … 2 more"),
    ],
)
def test_a_folder_with_nothing_to_send(
    client: Client, server: Server, tmp_path: Path, files: list[str], found: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"expected adapter_config\.json") as caught:
        client.push("e2e", tmp_path)
    assert found in str(caught.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        client.push("e2e", tmp_path / "nope")
    assert server.seen == []


STATE = {
    "prompt_embeddings": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


def pickled_folder(folder: Path, state: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    torch.save(state, folder / "adapter_model.bin")
    return folder


def assert_same(raw: bytes, state: Mapping[str, torch.Tensor]) -> None:
    loaded = load(raw)  # safetensors's own reader judges what was written
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_pickled_weights_are_converted(client: Client, server: Server, tmp_path: Path) -> None:
    client.push("e2e", pickled_folder(tmp_path / "a", STATE))
    parts = dict(server.seen[0].parts)
    assert list(parts) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same(parts["adapter_model.safetensors"], STATE)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.bin",
    ]


def test_one_pickled_file(client: Client, server: Server, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "cache_last.pt")
    client.push("e2e", tmp_path / "cache_last.pt")
    ((name, raw),) = server.seen[0].parts
    assert name == "cache_last.safetensors"
    assert_same(raw, STATE)


def test_safetensors_wins_over_a_pickle_beside_it(
    client: Client, server: Server, folder: Path
) -> None:
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    client.push("e2e", folder)
    assert [name for name, _ in server.seen[0].parts][1:] == ["adapter_model.safetensors"]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.open, ("pwned", "w")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"x": Malicious()}, "cannot be loaded as weights"),
        ([torch.zeros(1)], "holds a list, expected a state_dict"),
        ({"x": {"y": "text"}}, "'x.y' is a str, expected a plain tensor"),
        ({"x": [[[[[[[[torch.zeros(1)]]]]]]]]}, "nested over 8 deep"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "'x' is a complex64"),
    ],
)
def test_pickles_that_are_refused(
    client: Client,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: Any,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"adapter_model.bin.*{reason}"):
        client.push("e2e", pickled_folder(tmp_path / "a", state))
    assert not (tmp_path / "pwned").exists()
    assert server.seen == []


def test_pickles_without_torch(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickled_folder(tmp_path / "a", STATE)
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import of a missing module meets
    with pytest.raises(CheckpointError, match="pip install torch"):
        client.push("e2e", folder)


async def test_async_push(server: Server, folder: Path, tmp_path: Path) -> None:
    native = tmp_path / "p.safetensors"
    native.write_bytes(os.urandom(2_500_000))
    moved: list[int] = []
    async with AsyncClient(server.url) as client:
        await client.push("a", native, progress=lambda done, _: moved.append(done))
        await client.push("b", folder)
        await client.push("c", pickled_folder(tmp_path / "a", STATE))
        with pytest.raises(CheckpointError):
            await client.push("d", tmp_path / "nope")
    assert server.seen[0].body == native.read_bytes()
    assert moved[-1] == native.stat().st_size
    assert len(server.seen[1].parts) == 2
    assert_same(server.seen[2].parts[1][1], STATE)
