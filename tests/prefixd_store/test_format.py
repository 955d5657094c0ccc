"""What is written is what is read, by us and by the safetensors library."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefixd_store import (
    PrefixArray,
    VersionRecord,
    leading_length,
    parse_prefix,
    read_manifest,
    validate_file,
    write_prefix,
)
from tests.prefixd_store.checkpoints import random_arrays, raw_file, to_torch
from tests.prefixd_store.format_files import DTYPES, SEVERAL, good_header, metadata


@pytest.mark.parametrize("sites", [("decoder",), ("cross", "decoder", "encoder")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_library_reads_our_file(tmp_path: Path, dtype: Any, sites: Any) -> None:
    tensors, path = random_arrays(dtype=dtype, sites=sites), tmp_path / "p"
    write_prefix(path, tensors, query_offset=5)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert theirs[name].dtype == getattr(torch, dtype)
        assert torch.equal(theirs[name], to_torch(array))
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "prefixd"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [("key", "value"), ("value", "key")])
def test_we_read_the_safetensors_librarys_file(tmp_path: Path, dtype: Any, order: Any) -> None:
    ours = random_arrays(dtype=dtype)
    path = tmp_path / "p"
    tensors = {f"decoder.{part}": to_torch(ours[f"decoder.{part}"]) for part in order}
    save_file(tensors, path, metadata())
    assert validate_file(path) == read_manifest(path)
    prefix = parse_prefix(path.read_bytes())
    for name, tensor in tensors.items():
        assert torch.equal(to_torch(prefix.arrays[name]), tensor)


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    header = good_header()
    header["decoder.key"]["data_offsets"], header["decoder.value"]["data_offsets"] = (
        header["decoder.value"]["data_offsets"],
        header["decoder.key"]["data_offsets"],
    )
    values = np.arange(32, dtype="<f4")
    prefix = parse_prefix(raw_file(header, values.tobytes()))
    assert prefix.arrays["decoder.key"].data[0, 0, 0, 0] == 16
    assert prefix.arrays["decoder.value"].data[0, 0, 0, 0] == 0


def test_manifest_holds_all_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "p"
    digest = write_prefix(
        path,
        random_arrays(dtype="bfloat16"),
        query_offset=0,
        base_fingerprint="ab" * 32,
        base_model="acme/model é",
        source_format="compiled",
        provenance={"text_sha256": "00", "nested": {"steps": [1, 2.5, None, True]}},
    )
    manifest = validate_file(path)
    assert manifest.sites == {"decoder": (2, 3, 5, 4)}
    record = manifest.version_record(digest, path.stat().st_size)
    assert record == VersionRecord(
        version=1,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
        num_virtual_tokens=5,
        query_offset=0,
        sites={"decoder": (2, 3, 5, 4)},
        dtype="bfloat16",
        format="compiled",
        base_fingerprint="ab" * 32,
        base_model="acme/model é",
        provenance={"text_sha256": "00", "nested": {"steps": [1, 2.5, None, True]}},
        created_at=record.created_at,
    )


@pytest.mark.parametrize("offset", [0, 3])
def test_each_site_may_have_a_length_of_its_own(tmp_path: Path, offset: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: PrefixArray.of(rng.standard_normal(shape).astype(np.float32))
        for name, shape in SEVERAL.items()
    }
    path = tmp_path / "p"
    write_prefix(path, tensors, query_offset=offset)
    manifest = validate_file(path)
    assert manifest.sites == {
        "cross": (1, 1, 21, 2),
        "decoder": (1, 1, 3, 2),
        "encoder": (2, 1, 7, 2),
    }
    # One number stands for all, and says where the decoder's prompt begins.
    assert (manifest.num_virtual_tokens, manifest.query_offset) == (3, offset)
    read = parse_prefix(path.read_bytes()).arrays
    for name, array in tensors.items():
        assert np.array_equal(read[name].data, array.data)
    theirs = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == SEVERAL


def test_one_length_stands_for_a_prefix_of_several() -> None:
    assert leading_length({"cross": 21, "encoder": 7, "decoder": 3}) == 3
    assert leading_length({"cross": 21, "encoder": 7}) == 7
    assert leading_length({"cross": 21}) == 21
    assert leading_length({}) == 0


def test_a_file_of_one_length_is_written_as_ever(tmp_path: Path) -> None:
    write_prefix(tmp_path / "p", random_arrays(sites=("cross", "encoder")), query_offset=5)
    with safe_open(tmp_path / "p", "numpy") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "prefixd",
        "format_version": "1",
        "num_virtual_tokens": "5",
        "query_offset": "5",
        "source_format": "prefixd",
        "provenance": "{}",
    }


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = random_arrays()
    backwards = dict(reversed(tensors.items()))
    first = write_prefix(tmp_path / "a", tensors, query_offset=5, provenance={"x": 1, "y": 2})
    again = write_prefix(tmp_path / "b", backwards, query_offset=5, provenance={"y": 2, "x": 1})
    other = write_prefix(tmp_path / "c", tensors, query_offset=0, provenance={"x": 1, "y": 2})
    assert first == again == hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest()
    assert first != other
    assert read_manifest(tmp_path / "a").offsets["decoder.key"][0] % 8 == 0


def test_strided_views_are_written_in_row_major_order(tmp_path: Path) -> None:
    flat = np.arange(5 * 4 * 3 * 2, dtype=np.float32).reshape(5, 4, 3, 2)
    view = PrefixArray.of(flat[:, 1::2].transpose(1, 2, 0, 3))
    write_prefix(tmp_path / "p", {"decoder.key": view, "decoder.value": view}, query_offset=5)
    read = parse_prefix((tmp_path / "p").read_bytes()).arrays["decoder.value"].data
    assert np.array_equal(read, view.data)


def test_parsing_copies_nothing(tmp_path: Path) -> None:
    write_prefix(tmp_path / "p", random_arrays(), query_offset=5)
    buffer = bytearray((tmp_path / "p").read_bytes())
    data = parse_prefix(buffer).arrays["decoder.key"].data
    assert np.shares_memory(data, np.frombuffer(buffer, np.uint8))
    assert data.flags.aligned
    assert data.flags.writeable
    assert not parse_prefix(bytes(buffer)).arrays["decoder.key"].data.flags.writeable
    assert np.array_equal(parse_prefix(memoryview(buffer)).arrays["decoder.key"].data, data)
