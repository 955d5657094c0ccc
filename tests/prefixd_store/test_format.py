import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prefixd_store
from prefixd_store import (
    InvalidPrefix,
    Limits,
    PrefixArray,
    TooLarge,
    VersionRecord,
    arrays,
    leading_length,
    parse_prefix,
    read_manifest,
    validate_file,
    write_prefix,
)
from prefixd_store import format as format_module
from tests.prefixd_store.checkpoints import random_arrays, raw_file, to_torch

DTYPES = ["float32", "float16", "bfloat16"]


def metadata(tokens: int = 5, **changes: str | None) -> dict[str, str]:
    values = {
        "format": "prefixd",
        "format_version": "1",
        "num_virtual_tokens": str(tokens),
        "query_offset": str(tokens),
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def good_header() -> dict[str, Any]:
    """Two tensors of 64 bytes: [1, 1, 8, 2] float32."""
    tensor = {"dtype": "F32", "shape": [1, 1, 8, 2]}
    return {
        "__metadata__": metadata(8),
        "decoder.key": {**tensor, "data_offsets": [0, 64]},
        "decoder.value": {**tensor, "data_offsets": [64, 128]},
    }


# --- what is written is what is read -------------------------------------------------------------


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


SEVERAL = {
    f"{site}.{part}": (layers, 1, length, 2)
    for site, layers, length in (("cross", 1, 21), ("decoder", 1, 3), ("encoder", 2, 7))
    for part in ("key", "value")
}
"""shapes of a prefix with a length a site"""


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


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scan_bytes", [16, 8 << 20])
def test_a_value_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, value: float, scan_bytes: int
) -> None:
    monkeypatch.setattr(format_module, "_SCAN_BYTES", scan_bytes)
    tensors = random_arrays(dtype=dtype)
    bad = tensors["decoder.value"].data
    bits = PrefixArray.of(np.array([value], np.float32)).cast(dtype).data[0]
    bad[1, 2, 3, 1] = bad[1, 2, 4, 0] = bits
    expected = r"decoder\.value\[1, 2, 3, 1\] is " + ("NaN" if np.isnan(value) else "infinite")

    with pytest.raises(InvalidPrefix, match=expected) as error:
        write_prefix(tmp_path / "ours", tensors, query_offset=5)
    assert error.value.param == "decoder.value"
    assert not (tmp_path / "ours").exists()

    save_file({k: to_torch(v) for k, v in tensors.items()}, tmp_path / "theirs", metadata())
    read_manifest(tmp_path / "theirs")
    with pytest.raises(InvalidPrefix, match=expected):
        validate_file(tmp_path / "theirs")


def test_the_finite_check_agrees_with_numpy_on_every_16_bit_pattern() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for array in (PrefixArray(every.view(np.float16), "float16"), PrefixArray(every, "bfloat16")):
        finite = np.isfinite(array.to_float32())
        for i in random.Random(0).sample(range(1 << 16), 2000):
            one = PrefixArray(array.data[i : i + 1], array.dtype)
            assert (arrays.first_non_finite(one) is None) == finite[i]
        assert arrays.first_non_finite(array) == int(np.argmin(finite))


def test_bfloat16_agrees_with_torch() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(every.copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(arrays.bfloat16_to_float32(every), theirs)

    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halfway = (every.astype(np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, halfway, halfway + 1, halfway - 1]).view(np.float32)
    ours = arrays.bfloat16_to_float32(arrays.float32_to_bfloat16(values))
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_agrees_with_torch(dtype: Any) -> None:
    values = np.array([0, -0.0, 1 / 3, 1e-8, 65519, 65520, 3e38], np.float32)
    ours = to_torch(PrefixArray.of(values).cast(dtype))
    assert torch.equal(ours, torch.from_numpy(values).to(getattr(torch, dtype)))


# --- files to refuse -----------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def at(*path: str | int, value: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


def resized(shape: list[Any], nbytes: int, tag: str = "F32") -> Change:
    def change(header: dict[str, Any]) -> None:
        for i, name in enumerate(("decoder.key", "decoder.value")):
            offsets = [i * nbytes, (i + 1) * nbytes]
            header[name] = {"dtype": tag, "shape": shape, "data_offsets": offsets}

    return change


BAD_HEADERS: dict[str, tuple[Change, str]] = {
    "no format": (at("__metadata__", "format", value="pt"), "format is 'pt', expected 'prefixd'"),
    "newer version": (at("__metadata__", "format_version", value="2"), "format_version is '2'"),
    "no metadata": (lambda h: h.pop("__metadata__"), "format is missing"),
    "metadata of numbers": (at("__metadata__", "query_offset", value=8), "strings to strings"),
    "metadata is a list": (at("__metadata__", value=[]), "strings to strings"),
    "no P": (
        lambda h: h["__metadata__"].pop("num_virtual_tokens"),
        "num_virtual_tokens is missing",
    ),
    "P differs": (at("__metadata__", "num_virtual_tokens", value="9"), r"is 9 but .*1, 1, 8, 2"),
    "P is signed": (at("__metadata__", "num_virtual_tokens", value="+8"), "decimal integer"),
    "P is Arabic": (at("__metadata__", "num_virtual_tokens", value="٨"), "decimal integer"),
    "P is long": (at("__metadata__", "num_virtual_tokens", value="8" * 5000), "decimal integer"),
    "offset is 3": (at("__metadata__", "query_offset", value="3"), r"query_offset is 3; .* 0 or"),
    "offset is words": (at("__metadata__", "query_offset", value="x"), "decimal integer"),
    "empty fingerprint": (at("__metadata__", "base_fingerprint", value=""), "printable"),
    "model with a line feed": (at("__metadata__", "base_model", value="a\nb"), "printable"),
    "long model": (at("__metadata__", "base_model", value="a" * 513), "printable"),
    "source format": (at("__metadata__", "source_format", value="A B"), "source_format 'A B'"),
    "provenance is a list": (at("__metadata__", "provenance", value="[1]"), "got list"),
    "provenance is broken": (at("__metadata__", "provenance", value="{"), "provenance: not valid"),
    "provenance is deep": (
        at("__metadata__", "provenance", value='{"a":' * 40 + "1" + "}" * 40),
        "nested over 16",
    ),
    "provenance bomb": (at("__metadata__", "provenance", value='{"a":' + "[" * 50_000), "nested"),
    "provenance is big": (at("__metadata__", "provenance", value=" " * 70_000), "70000 bytes"),
    "provenance has NaN": (at("__metadata__", "provenance", value='{"a": NaN}'), "NaN is not JSON"),
    "provenance overflows": (at("__metadata__", "provenance", value='{"a": 1e999}'), "a float"),
    "provenance huge int": (
        at("__metadata__", "provenance", value='{"a": 99999999999999999999}'),
        "64 bits",
    ),
    "provenance surrogate": (
        at("__metadata__", "provenance", value='{"a": "\\ud800"}'),
        "not valid JSON",
    ),
    "provenance repeats": (
        at("__metadata__", "provenance", value='{"a": 1, "a": 2}'),
        "'a' appears twice",
    ),
    "value missing": (
        lambda h: (h.pop("decoder.value"), h["decoder.key"].update(resized_alone())),
        "decoder.value is missing",
    ),
    "no tensors": (lambda h: (h.pop("decoder.value"), h.pop("decoder.key")), "truncated or padded"),
    "unknown tensor": (
        lambda h: h.update({"decoder.bias": h.pop("decoder.value")}),
        "unknown tensor 'decoder.bias'",
    ),
    "integers": (resized([1, 1, 8, 2], 64, "I32"), "decoder.key is I32"),
    "float64": (resized([1, 1, 8, 1], 64, "F64"), "decoder.key is F64"),
    "made-up dtype": (resized([1, 1, 8, 2], 64, "F31"), "decoder.key is F31"),
    "dtype is a number": (at("decoder.key", "dtype", value=32), "dtype must be a string"),
    "dtypes differ": (
        at(
            "decoder.value",
            value={"dtype": "F16", "shape": [1, 1, 8, 4], "data_offsets": [64, 128]},
        ),
        "differ in dtype",
    ),
    "shapes differ": (
        at("decoder.value", "shape", value=[1, 2, 8, 1]),
        r"key is \[1, 1, 8, 2\] but",
    ),
    "three axes": (resized([1, 8, 2], 64), r"\[L, H_kv, P, D\]"),
    "bool in shape": (at("decoder.key", "shape", value=[True, 1, 8, 2]), "shape must be"),
    "float in shape": (at("decoder.key", "shape", value=[1.0, 1, 8, 2]), "shape must be"),
    "negative shape": (at("decoder.key", "shape", value=[-1, -1, 8, 2]), "shape must be"),
    "shape is text": (at("decoder.key", "shape", value="1182"), "shape must be"),
    "rank 17": (at("decoder.key", "shape", value=[1] * 17), "shape must be"),
    "overflowing shape": (at("decoder.key", "shape", value=[2**62, 2**62, 8, 2]), "takes"),
    "size over 64 bits": (at("decoder.key", "shape", value=[2**70, 1, 8, 2]), "64 bits"),
    "shape too big": (at("decoder.key", "shape", value=[1, 1, 8, 3]), "takes 96 bytes"),
    "offsets backwards": (at("decoder.key", "data_offsets", value=[64, 0]), "begin <= end"),
    "three offsets": (at("decoder.key", "data_offsets", value=[0, 64, 64]), "two integers"),
    "negative offset": (at("decoder.key", "data_offsets", value=[-64, 0]), "two integers"),
    "overlap": (at("decoder.value", "data_offsets", value=[32, 96]), "overlaps"),
    "same bytes twice": (at("decoder.value", "data_offsets", value=[0, 64]), "overlaps"),
    "gap": (at("decoder.value", "data_offsets", value=[72, 136]), "leaves a gap"),
    "starts late": (at("decoder.key", "data_offsets", value=[8, 72]), "leaves a gap|overlaps"),
    "tensor is a list": (at("decoder.key", value=[]), "exactly dtype, shape"),
    "an extra field": (at("decoder.key", "x", value=1), "exactly dtype, shape"),
}


def resized_alone() -> dict[str, Any]:
    return {"shape": [1, 1, 16, 2], "data_offsets": [0, 128]}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    change, message = BAD_HEADERS[name]
    raw = raw_file(changed(change), bytes(128))
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(InvalidPrefix, match=message):
        read_manifest(tmp_path / "p")
    with pytest.raises(InvalidPrefix, match=message):
        parse_prefix(raw)


GOOD = raw_file(good_header(), bytes(128))


def changed(*changes: Change) -> dict[str, Any]:
    header = good_header()
    for change in changes:
        change(header)
    return header


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes is too short"),
    "eight bytes": (bytes(8), "too short"),
    "truncated data": (GOOD[:-1], "truncated"),
    "truncated header": (GOOD[:40], "truncated"),
    "trailing bytes": (GOOD + b"\0", "truncated or padded"),
    "header past the end": ((2**63).to_bytes(8, "little") + GOOD[8:], "not a safetensors file"),
    "zero header": (bytes(8) + GOOD[8:], "not a JSON object"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "not a safetensors|truncated"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not a safetensors|truncated"),
    "JSON list": (raw_file(b"[]", bytes(8)), "not a JSON object"),
    "space before the object": (raw_file(b" " + json.dumps(good_header()).encode()), "JSON object"),
    "two objects": (raw_file(b"{}{}"), "not valid JSON"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "not a JSON object"),
    "bad UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "no tensors": (raw_file({"__metadata__": metadata()}), "holds no tensors"),
    "zero tokens": (raw_file(changed(resized([1, 1, 0, 2], 0))), "each at least 1"),
    "repeated key": (raw_file(b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "bomb": (raw_file(b'{"a":' * 100_000), "nested"),
    "shallow bomb": (raw_file(b'{"a":' * 30 + b"1" + b"}" * 30), "nested"),
    "long integer": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "unaligned": (
        raw_file(json.dumps(good_header()).encode() + b" " * 3, bytes(128), pad=False),
        "multiple of 8",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    raw, message = BAD_FILES[name]
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(InvalidPrefix, match=message):
        validate_file(tmp_path / "p")
    with pytest.raises(InvalidPrefix, match=message):
        parse_prefix(raw)


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(GOOD)
    assert validate_file(tmp_path / "p").num_virtual_tokens == 8
    assert len(json.dumps(good_header())) % 8 != 5  # so that "unaligned" above is


def test_limits_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(GOOD)
    with pytest.raises(TooLarge, match=f"{len(GOOD)} bytes, at most 100"):
        read_manifest(path, Limits(max_bytes=100))
    with pytest.raises(InvalidPrefix, match=r"header of .* at most 64"):
        read_manifest(path, Limits(max_header_bytes=64))
    with pytest.raises(InvalidPrefix, match="8 virtual tokens, at most 7"):
        read_manifest(path, Limits(max_virtual_tokens=7))
    with pytest.raises(TooLarge):
        write_prefix(tmp_path / "q", random_arrays(), query_offset=5, limits=Limits(max_bytes=300))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ({}, {}, "no tensors"),
        ({"decoder.key": (1, 1, 2, 2)}, {}, "decoder.value is missing"),
        ({"decoder.key": (1, 2, 2), "decoder.value": (1, 2, 2)}, {}, r"\[L, H_kv, P, D\]"),
        ({"decoder.key": (1, 1, 2, 2), "decoder.value": (1, 1, 2, 3)}, {}, "but decoder.value is"),
        (
            SEVERAL | {"encoder.value": (2, 1, 8, 2)},
            {},
            "encoder.key has 7 virtual tokens but encoder.value has 8",
        ),
        (SEVERAL, {"query_offset": 7}, r"query_offset is 7; .* num_virtual_tokens \(3\)"),
        (
            SEVERAL,
            {"limits": Limits(max_virtual_tokens=20)},
            "cross: 21 virtual tokens, at most 20",
        ),
        ({"decoder.key": (1, 1, 5, 2), "decoder.value": (1, 1, 5, 2)}, {"query_offset": 1}, "is 1"),
        (
            {"decoder.key": (1, 1, 5, 2), "decoder.value": (1, 1, 5, 2)},
            {"provenance": {"x": "y" * 70_000}},
            "provenance has",
        ),
    ],
)
def test_the_writer_refuses_what_the_reader_would(
    tmp_path: Path, names: Any, arguments: Any, message: str
) -> None:
    tensors = {name: PrefixArray.of(np.zeros(shape, np.float32)) for name, shape in names.items()}
    with pytest.raises(InvalidPrefix, match=message):
        write_prefix(tmp_path / "p", tensors, **{"query_offset": 0} | arguments)
    assert not (tmp_path / "p").exists()


# --- fuzz ----------------------------------------------------------------------------------------


def read_or_refuse(path: Path, raw: bytes) -> None:
    """Both readers agree, and either give arrays inside the buffer or refuse politely."""
    path.write_bytes(raw)
    outcomes: list[Any] = []
    for read in (lambda: read_manifest(path), lambda: parse_prefix(raw)):
        try:
            outcomes.append(read())
        except (InvalidPrefix, TooLarge) as error:
            outcomes.append(error.message)
    manifest, prefix = outcomes
    if isinstance(manifest, str):
        assert manifest == prefix
        return
    assert prefix.manifest == manifest
    size = sum(array.nbytes for array in prefix.arrays.values())
    assert size + min(begin for begin, _ in manifest.offsets.values()) == len(raw)
    manifest.version_record("0" * 64, len(raw)).model_dump_json()


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 700), st.binary(max_size=8)
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(edits)
def test_fuzz_bytes(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    raw = bytearray(GOOD)
    for kind, place, extra in changes:
        place %= len(raw) + 1
        if kind == "cut":
            del raw[place : place + len(extra)]
        elif kind == "insert":
            raw[place:place] = extra
        else:
            raw[place : place + len(extra)] = extra
        # Keep the length right, so that most inputs reach the JSON.
        raw[:8] = (
            bytes(8)[len(raw) :] if len(raw) < 8 else max(0, len(raw) - 136).to_bytes(8, "little")
        )
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz", bytes(raw))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
json_values = st.recursive(
    scalars | st.sampled_from(["F32", "BF16", "0", "8", "prefixd"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
places = st.sampled_from(
    [("__metadata__", key) for key in (*good_header()["__metadata__"], "provenance", "base_model")]
    + [
        (name, key)
        for name in ("decoder.key", "decoder.value")
        for key in ("dtype", "shape", "data_offsets")
    ]
    + [("__metadata__",), ("decoder.key",), ("encoder.key",), ("",)]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(places, json_values | json_values.map(json.dumps)), min_size=1, max_size=3)
)
def test_fuzz_header(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    header = copy.deepcopy(good_header())
    for place, value in changes:
        target: Any = header
        for step in place[:-1]:
            target = target[step]
        if isinstance(target, dict):
            target[place[-1]] = value
    raw = raw_file(header, bytes(128))
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz", raw)


def test_all_public_names_exist() -> None:
    assert len(set(prefixd_store.__all__)) == len(prefixd_store.__all__)
    for name in prefixd_store.__all__:
        assert getattr(prefixd_store, name) is not None
