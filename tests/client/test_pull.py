from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
from starlette.responses import Response

from prefixd import (
    APIConnectionError,
    AsyncClient,
    Client,
    DownloadError,
    InvalidArgumentError,
    NotFoundError,
)
from tests.client.server import Server, zip_of

DATA = os.urandom(400_000)


@pytest.fixture
def target(tmp_path: Path, server: Server) -> Path:
    server.add_version("e2e", b"the first version")
    server.add_version("e2e", DATA)
    return tmp_path / "new" / "p.safetensors"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_active_version(client: Client, target: Path) -> None:
    moved: list[tuple[int, int | None]] = []
    assert client.pull("e2e", target, progress=lambda *at: moved.append(at)) == target
    assert target.read_bytes() == DATA
    assert files(target.parent) == ["p.safetensors"]
    assert moved[0] == (0, len(DATA))
    assert moved[-1] == (len(DATA), len(DATA))


def test_a_version_into_a_folder(client: Client, target: Path, tmp_path: Path) -> None:
    path = client.pull("e2e", tmp_path, version=1)
    assert path == tmp_path / "e2e@1.safetensors"
    assert path.read_bytes() == b"the first version"


def test_the_heaviest_of_a_split_without_an_active_one(
    client: Client, server: Server, target: Path
) -> None:
    answer = server.task("e2e") | {"active": None, "split": {"1": 0.9, "2": 0.1}}
    server.script.append(_json(answer))
    client.pull("e2e", target)
    assert target.read_bytes() == b"the first version"
    server.script.append(_json(answer | {"split": {}}))
    with pytest.raises(InvalidArgumentError, match="no active version"):
        client.pull("e2e", target)


def _json(body: object) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body)


@pytest.mark.parametrize("damage", [DATA[:-1], DATA + b"x", DATA[:-1] + b"x", b""])
def test_damaged_bytes_are_never_kept(
    client: Client, server: Server, target: Path, damage: bytes
) -> None:
    target.parent.mkdir()
    target.write_bytes(b"what was there before")
    sha256 = server.tasks["e2e"]["versions"][2]
    length = server.version("e2e", 2)["bytes"]
    assert length == len(DATA)
    server.blobs[sha256] = damage
    with pytest.raises(DownloadError, match=f"e2e@2: the {len(damage)} bytes .* expected {sha256}"):
        client.pull("e2e", target)
    assert files(target.parent) == ["p.safetensors"]
    assert target.read_bytes() == b"what was there before"


def test_a_connection_lost_on_the_way(client: Client, server: Server, target: Path) -> None:
    version = server.version("e2e", 2)
    cut = Response(DATA[:1000], headers={"content-length": str(len(DATA))})
    server.script += [_json(version), cut]
    with pytest.raises(APIConnectionError):
        client.pull("e2e", target, version=2)
    assert list(target.parent.iterdir()) == []


def test_an_unknown_version_leaves_nothing(client: Client, target: Path) -> None:
    with pytest.raises(NotFoundError):
        client.pull("e2e", target, version=9)
    assert not target.parent.exists()
    with pytest.raises(InvalidArgumentError, match="'torch', expected 'prefixd' or 'peft'"):
        client.pull("e2e", target, version=2, format="torch")  # type: ignore[arg-type]


PEFT = {"adapter_config.json": b'{"peft_type": "PREFIX_TUNING"}', "adapter_model.safetensors": DATA}


def test_peft_makes_a_folder(client: Client, server: Server, target: Path) -> None:
    server.zip = zip_of(PEFT)
    folder = client.pull("e2e", target.parent / "peft", format="peft")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == PEFT
    assert list(target.parent.iterdir()) == [folder]
    assert server.seen[-1].query == {"format": "peft"}
    with pytest.raises(InvalidArgumentError, match="makes a new folder"):
        client.pull("e2e", folder, format="peft")
    with pytest.raises(InvalidArgumentError, match="makes a new folder"):
        client.pull("e2e", folder / "adapter_config.json", format="peft")
    (target.parent / "empty").mkdir()
    assert files(client.pull("e2e", target.parent / "empty", format="peft")) == sorted(PEFT)


def twice(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(name, b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr(name, b"2")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"not a zip", "damaged zip"),
        (zip_of(PEFT)[:-300], "damaged zip"),
        (zip_of(PEFT).replace(DATA[:100], bytes(100)), "damaged zip"),
        (zip_of({"../escaped": b"x"}), r"'\.\./escaped', expected plain file names"),
        (zip_of({"/etc/escaped": b"x"}), "expected plain file names"),
        (zip_of({"a\\b": b"x"}), "expected plain file names"),
        (zip_of({"sub/": b""}), "expected plain file names"),
        (zip_of({"..": b"x"}), "expected plain file names"),
        (zip_of({"bomb": bytes(10 << 20)}), "unpacks to 10485760 bytes, expected at most"),
        (twice("a"), "damaged zip"),
    ],
)
def test_bad_zips(
    client: Client, server: Server, target: Path, archive: bytes, reason: str
) -> None:
    server.zip = archive
    with pytest.raises(DownloadError, match=reason):
        client.pull("e2e", target.parent / "peft", format="peft")
    assert list(target.parent.iterdir()) == []
    assert not (target.parent.parent / "escaped").exists()


async def test_async_pull(server: Server, target: Path) -> None:
    server.zip = zip_of(PEFT)
    async with AsyncClient(server.url) as client:
        assert (await client.pull("e2e", target)).read_bytes() == DATA
        folder = await client.pull("e2e", target.parent / "peft", version=1, format="peft")
        assert files(folder) == sorted(PEFT)
        server.blobs[server.tasks["e2e"]["versions"][2]] = b"damaged"
        with pytest.raises(DownloadError):
            await client.pull("e2e", target)
    assert files(target.parent) == sorted([*PEFT, "p.safetensors"])
